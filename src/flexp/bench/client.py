"""What a client saves that trains only its last block, or nothing of its own (S8)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flexp.bench.clock import in_turns, timed
from flexp.bench.job import Job, Scale, at_work, step
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row
from flexp.link.messages import Answer, Backward, Forward, Link, Message
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.selection import FAR, FRONT, Where
from flexp.tensors import Tensors

LAST = FRONT & Where(nearest=1)
BATCHES, LATER = 2, 4  # of an epoch, and epochs after the first
CACHE = 64 << 20  # bytes of hidden states, more than there are


@dataclass
class Echo:
    """A server that computes nothing: losses are 0, gradients are drawn once."""

    inner: Link
    hidden: Tensor | None = None

    def send(self, message: Message) -> Answer:
        """Answers for the trunk and the head; the rest goes on."""
        if isinstance(message, Forward):
            if self.hidden is None or self.hidden.shape != message.hidden.shape:
                stream = torch.Generator().manual_seed(0)
                drawn = torch.randn(message.hidden.shape, generator=stream)
                self.hidden = drawn.to(message.hidden.dtype)
            return Answer({message.until: torch.zeros(())})
        if isinstance(message, Backward):
            wanted = self.hidden if message.hidden else None
            return Answer({} if wanted is None else {"grad": wanted})
        return self.inner.send(message)

    def close(self) -> None:
        """Closes the link inside."""
        self.inner.close()


def client(scale: Scale, machine: Machine) -> list[Row]:
    """A client alone, with four blocks and with six."""
    del machine
    job, body = scale.job, scale.job.backbone("fp32")
    most = job.depth - 1
    counts = {min(4, most): (4.3, 4.4), min(6, most): (6.5, 6.7)}
    rows = [last_of(scale, body, n, *aims) for n, aims in counts.items()]
    return [*rows, still(job, body, min(4, most))]


def echoed(client: str, link: Link) -> Link:
    """A link to a server that computes nothing."""
    del client
    return Echo(link)


def seated(blocks: int) -> Seat:
    """The server has the head, so that all of the client is its front."""
    return Seat(Cut(blocks), "loss")


def last_of(scale: Scale, body: Backbone, blocks: int, target: float, floor: float) -> Row:
    """All of a client's blocks against the last of them, of which it has kept what enters."""
    job = scale.job
    work = partial(at_work, job, body, seat=seated(blocks), wrap=echoed, cache=CACHE)
    with work() as whole, work() as some:
        batch = job.batch()
        works = {
            "all": partial(step, whole.desk, batch, train=FRONT),
            "last": partial(step, some.desk, batch, train=LAST),
        }
        took = in_turns(works, scale.rounds)
    return Row(
        f"client.last_of_{blocks}",
        took["all"].over(took["last"]),
        "×",
        f"times less processor time of a client that trains the last, not all, of {blocks} blocks",
        target,
        floor,
        gate=Gate("the last block's gradients differ", apart(job, body, blocks), 0.0),
        details={
            "all_cpu_seconds": round(took["all"].seconds, 4),
            "last_cpu_seconds": round(took["last"].seconds, 4),
            "wall_ratio": round(took["all"].wall_over(took["last"]), 3),
            "spread": took["all"].spread(took["last"]),
        },
    )


def apart(job: Job, body: Backbone, blocks: int) -> float:
    """How far the last block's gradients are from each other, whatever else trains."""
    whole, last = (gradient(job, body, blocks, where) for where in (FRONT, LAST))
    moved = {k: g for k, g in last.items() if bool(g.any())}
    if not moved:
        return float("inf")
    return max(float((whole[k] - g).abs().max()) for k, g in moved.items())


def gradient(job: Job, body: Backbone, blocks: int, where: Where) -> Tensors:
    """A client's gradient; the server's is drawn, and the same every time."""
    small = replace(job, rows=1, length=min(16, job.length))
    adapter = small.adapted(body)
    work = partial(at_work, small, body, seat=seated(blocks), wrap=echoed, adapter=adapter)
    with work(cache=CACHE) as place:
        desk = place.desk
        for _ in range(2):  # the second time from what was kept
            with desk.model.training({"personal": where}, None):
                desk.grad(desk.model.loss(small.batch()), ["personal"], ["personal@g"])
        return dict(desk.model.near["personal@g"])


def still(job: Job, body: Backbone, blocks: int) -> Row:
    """A later epoch against the first, where nothing of the client trains."""
    batches = [job.batch(n) for n in range(BATCHES)]
    with at_work(job, body, seat=seated(blocks), wrap=echoed, cache=CACHE) as place:
        epoch = partial(step, place.desk, *batches, train=FAR)
        first = timed(epoch)[0]
        later = statistics.median(timed(epoch)[0] for _ in range(LATER))
    return Row(
        "client.later_epoch",
        100 * later / first,
        "%",
        "of the first epoch's processor time: a later one, of a client without adapter",
        1.0,
        0.0,
        "lower",
        details={"first_cpu_seconds": round(first, 4), "later_cpu_seconds": round(later, 4)},
    )
