"""The rows of many tenants in one pass of the trunk, against one tenant after another (S5)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

from torch import Tensor

from flexp.bench.clock import Work, in_turns
from flexp.bench.job import Job, Scale
from flexp.bench.machine import Machine
from flexp.bench.merge import distance
from flexp.bench.rows import Gate, Row
from flexp.bench.server import STEP, Server, name
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.tensors import Tensors
from flexp.threads import adopt

WHAT = "times less processor time of the server, {} clients of {} tokens at once, cuts 1 to 4, {}"
MOST_ROUNDS = 5  # of steps of thousands of tokens
AIMS = {  # clients and tokens of each: target and limit
    (16, 16): (4.5, 7.4),
    (32, 16): (4.5, 7.4),
    (32, 64): (2.4, 3.4),
    (4, 512): (1.0, None),
}
MIXED = 4  # cuts after one block, two, three, four
CLOSE = 1e-5  # of two gradients in fp32, relative


def tenants(scale: Scale, machine: Machine) -> list[Row]:
    """Threads send at once to a trunk that takes messages together, and to one that does not."""
    job, small = scale.job, scale.rounds == 1
    scale = replace(scale, rounds=min(MOST_ROUNDS, scale.rounds))
    body, aims = job.backbone(machine.faster), dict(list(AIMS.items())[:1]) if small else AIMS
    gate = Gate("joint gradients off those alone in fp32, relative", apart(job), CLOSE)
    rows = [against(scale, body, size, aim, gate) for size, aim in aims.items()]
    return [*rows, mixed(scale, body, *next(iter(aims)))]


class Clients:
    """Clients of one server, a thread each, in lockstep where the server takes them together."""

    def __init__(self, server: Server, count: int, rows: int, length: int) -> None:
        self.server, self.count, self.step = server, count, 0
        self.drawn = [server.drawn(n, rows, length) for n in range(count)]
        self.threads = ThreadPoolExecutor(count, initializer=adopt)
        for n in range(count):
            server.sits(n)
        if server.trunk.together:
            server.trunk.line.begins([[name(n) for n in range(count)]])

    def turn(self) -> list[Tensor]:
        """One step of everybody; the optimizer's step of the one before rides on it."""
        self.step += 1
        return list(self.threads.map(self._one, range(self.count)))

    def _one(self, n: int) -> Tensor:
        hidden, slope = self.drawn[n]
        self.server.forward(n, self.step, hidden, STEP if self.step > 1 else ())
        return self.server.backward(n, self.step, slope)

    def close(self) -> None:
        """Ends threads and server."""
        self.threads.shutdown()
        self.server.close()


def spread(job: Job, n: int) -> Seat:
    """Every client's cut, one after another of a few."""
    return Seat(Cut(1 + n % min(MIXED, job.depth - 1)))


def opened(
    job: Job,
    body: Backbone,
    size: tuple[int, int],
    seats: Callable[[int], Seat],
    *,
    together: bool,
) -> Clients:
    """So many clients, of one row of so many tokens each, in rows of 128 at most."""
    count, tokens = size
    rows = max(1, tokens // 128)
    begun: Tensors = job.adapted(body)
    server = Server(job, body, begun, seats, together=together)
    return Clients(server, count, rows, tokens // rows)


def against(
    scale: Scale,
    body: Backbone,
    size: tuple[int, int],
    aim: tuple[float, float | None],
    gate: Gate,
) -> Row:
    """Together against one after another."""
    seats, (count, tokens), (target, floor) = partial(spread, scale.job), size, aim
    with ExitStack() as stack:
        ways = {
            name: stack.enter_context(closing(opened(scale.job, body, size, seats, together=joint)))
            for name, joint in (("alone", False), ("together", True))
        }
        works: dict[str, Work] = {name: clients.turn for name, clients in ways.items()}
        took = in_turns(works, scale.rounds)
    details = {
        "tokens_per_cpu_second": {
            name: round(count * tokens / held.seconds, 1) for name, held in took.items()
        },
        "wall_ratio": round(took["alone"].wall_over(took["together"]), 3),
        "spread": took["alone"].spread(took["together"]),
    }
    what, ratio = (
        WHAT.format(count, tokens, body.dtype).replace("torch.", ""),
        took["alone"].over(took["together"]),
    )
    return Row(
        f"tenants.{count}x{tokens}", ratio, "×", what, target, floor, gate=gate, details=details
    )


def mixed(scale: Scale, body: Backbone, count: int, tokens: int) -> Row:
    """Clients with different cuts against clients with one, for as many blocks."""
    job = scale.job
    kinds: dict[str, Callable[[int], Seat]] = {
        "mixed": partial(spread, job),
        "equal": lambda n: Seat(Cut(min(2, job.depth - 1))),
    }
    blocks = {
        kind: sum(job.depth - seats(n).cut.front for n in range(count))
        for kind, seats in kinds.items()
    }
    with ExitStack() as stack:
        works: dict[str, Work] = {
            kind: stack.enter_context(
                closing(opened(job, body, (count, tokens), seats, together=True))
            ).turn
            for kind, seats in kinds.items()
        }
        took = in_turns(works, scale.rounds, warm=2)
    dearer = took["mixed"].over(took["equal"]) * blocks["equal"] / blocks["mixed"] - 1
    what = (
        f"dearer per block: {count} clients of {tokens} tokens with cuts 1 to 4 than with one cut"
    )
    details = {"spread": took["mixed"].spread(took["equal"]), "blocks": blocks}
    return Row("tenants.mixed", 100 * dearer, "%", what, 3.0, 0.0, "lower", details=details)


def apart(job: Job) -> float:
    """How far joint gradients are from those alone, of hidden states and of adapters."""
    body, count = job.backbone("fp32"), 6
    size, seats = (count, min(16, job.length)), partial(spread, job)
    found: list[tuple[list[Tensor], list[Tensors]]] = []
    for joint in (False, True):
        with closing(opened(job, body, size, seats, together=joint)) as clients:
            hidden = clients.turn()
            homes = clients.server.tenants.homes.values()
            found.append((hidden, [dict(home.slots.grads["personal"]) for home in homes]))
    (alone, adapters), (joined, theirs) = found
    pairs = list(zip(alone, joined, strict=True))
    for mine, other in zip(adapters, theirs, strict=True):
        pairs += [(mine[k], other[k]) for k in mine]
    return max(distance(b, a) for a, b in pairs)
