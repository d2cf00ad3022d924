"""Several clients' messages in one pass: each gets what it would get alone, and counts alone."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import batches_for
from wires import DOUBLE, U, Wire, body, served

from flexp.errors import LinkError
from flexp.link.messages import Answer, Do
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Grad, SlotSpec, Step
from flexp.server.compute import Compute, ForwardJob
from flexp.server.trunk import Trunk

SEATS = (Seat(Cut(1, 1)), Seat(Cut(2, 1)), Seat(Cut(1, 0)))
HEADS = (Seat(Cut(1), "loss"), Seat(Cut(2), "logits"), Seat(Cut(1, 1)))
Taught = dict[str, Tensor]


class Passes:
    """How many messages were computed together, pass by pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        plain = Compute.together

        def counted(compute: Compute, jobs: Any) -> Any:
            self.sizes.append(len(jobs))
            return plain(compute, jobs)

        monkeypatch.setattr(Compute, "together", counted)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def set_up(
    *seats: Seat,
    together: bool,
    spec: SlotSpec = SlotSpec(),  # noqa: B008
) -> tuple[Trunk, list[Wire]]:
    trunk, wires = served(*seats, spec=spec)
    if together:
        trunk.take_together()
    for n, wire in enumerate(wires):
        wire.batch = batches_for(body(), len(wires))[n]
        wire.join()
    return trunk, wires


def at_once(trunk: Trunk, messages: Mapping[Wire, Any]) -> dict[Wire, Future[Answer]]:
    """All of them wait before the first is served."""
    trunk.line.begins([[wire.client for wire in messages]])
    with ThreadPoolExecutor(len(messages)) as threads:
        futures = {wire: threads.submit(wire.send, m) for wire, m in messages.items()}
    for wire in messages:
        trunk.line.ends(wire.client)
    return futures


def steps(trunk: Trunk, wires: list[Wire], count: int = 3) -> Taught:
    """Training: every client's results, gradients and slots, all of them waiting together."""
    out: Taught = {}
    for step in range(count):
        ops = (Grad(("personal",), ("g",)), Step("personal", "g")) if step else ()
        sent = {w: w.forward(step, ops=ops) for w in wires}
        there = at_once(trunk, sent)
        outs = {w: there[w].result().tensors[sent[w].until] for w in wires}
        back = at_once(trunk, {w: w.backward(sent[w], outs[w]) for w in wires})
        for w in wires:
            out[f"{step} {w.client} out"] = outs[w]
            out[f"{step} {w.client} grad"] = back[w].result().tensors["grad"]
            out |= {f"{step} {w.client} {k}": v for k, v in w.held().items()}
    return out


def close(one: Taught, other: Taught) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(v, other[k], rtol=1e-5, atol=1e-6) for k, v in one.items())


@pytest.mark.parametrize("seats", [SEATS, HEADS], ids=["hidden", "heads at the server"])
def test_steps_of_several_clients_are_those_of_each_alone(
    seats: tuple[Seat, ...], passes: Passes
) -> None:
    trunk, wires = set_up(*seats, together=True)
    joint = steps(trunk, wires)
    trunk.close()
    assert passes.sizes == [3] * 6
    trunk, wires = set_up(*seats, together=False)
    alone = steps(trunk, wires)
    trunk.close()
    assert passes.sizes == [3] * 6
    assert close(joint, alone)
    moved = [
        k for k in joint if k.startswith("2") and not torch.equal(joint[k], joint["0" + k[1:]])
    ]
    assert len(moved) > 20


def test_the_same_messages_give_the_same_bits(passes: Passes) -> None:
    found: list[Taught] = []
    for _ in range(2):
        trunk, wires = set_up(*SEATS, together=True)
        found.append(steps(trunk, wires))
        trunk.close()
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
    assert len(passes.sizes) == 12


def test_who_is_late_for_its_pass_is_computed_again(passes: Passes) -> None:
    """Two of three are differentiated; the third one's graph is gone, and it gets its own."""
    found: list[Taught] = []
    for together in (True, False):
        trunk, wires = set_up(*SEATS, together=together)
        sent = {w: w.forward() for w in wires}
        there = at_once(trunk, sent)
        out: Taught = {}
        for some in (wires[:2], wires[2:]):
            asks = {w: w.backward(sent[w], there[w].result().tensors["hidden"]) for w in some}
            for wire, future in at_once(trunk, asks).items():
                out[wire.client] = future.result().tensors["grad"]
        for w in wires:
            w.send(Do(w.key("do"), (Grad(("personal",), ("g",)),)))
            out |= {f"{w.client} {k}": v for k, v in w.held("g").items()}
        found.append(out)
        trunk.close()
    assert passes.sizes == [3, 2]
    assert close(*found)


def test_what_one_client_does_wrong_hurts_nobody_else(passes: Passes) -> None:
    trunk, wires = set_up(*SEATS, together=True)
    odd, good, _ = wires
    sent = {w: w.forward(ops=(DOUBLE,)) for w in wires}
    sent[odd] = replace(sent[odd], mask=torch.ones(1, 1))
    before = odd.held()
    there = at_once(trunk, sent)
    with pytest.raises(LinkError, match="mask"):
        there[odd].result()
    assert there[good].result().tensors["hidden"].isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in odd.held().items())
    assert passes.sizes == [2]
    trunk.close()


@pytest.mark.parametrize("half", [False, True], ids=["at once", "with its graph gone"])
def test_a_pass_that_fails_is_tried_one_by_one(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a walk back that has used up the graph before it failed."""
    plain = Compute.together

    def fails(compute: Compute, jobs: Any) -> Any:
        if half and not isinstance(jobs[0], ForwardJob):
            plain(compute, jobs)
        elif half:
            return plain(compute, jobs)
        raise RuntimeError("odd")

    monkeypatch.setattr(Compute, "together", fails)
    trunk, wires = set_up(*SEATS, together=True)
    joint = steps(trunk, wires, 2)
    trunk.close()
    trunk, wires = set_up(*SEATS, together=False)
    alone = steps(trunk, wires, 2)
    trunk.close()
    assert close(joint, alone)


@pytest.mark.parametrize("case", ["one copy for all", "counted"])
def test_what_cannot_be_shared_is_alone(case: str, passes: Passes) -> None:
    spec = SlotSpec(home="server" if case == "one copy for all" else "tenant")
    trunk, wires = set_up(U, U, together=True, spec=spec)
    trunk.flops = {} if case == "counted" else None
    sent = {w: w.forward() for w in wires}
    there = at_once(trunk, sent)
    assert all(future.result().tensors for future in there.values())
    assert passes.sizes == []
    trunk.close()


def test_graphs_of_a_pass_are_counted_by_their_share() -> None:
    """And measured once for clients of those cuts, however long their texts are."""
    trunk, wires = set_up(*SEATS, together=True)
    trunk.pending.budget = 1 << 40
    total: list[int] = []
    for step in range(2):
        sent = {w: w.forward(step) for w in wires}
        for w in wires if step else ():
            sent[w] = replace(
                sent[w],
                hidden=sent[w].hidden[:, :-1],
                mask=None,
                shapes={k: (s[0], s[1] - 1) for k, s in sent[w].shapes.items()},
            )
        at_once(trunk, sent)
        shares = [next(iter(trunk.pending.held[w.client].values())).bytes for w in wires]
        assert all(share > 0 for share in shares)
        assert trunk.pending.bytes() == sum(shares)
        total.append(sum(shares))
    assert len(trunk.pending.sizes) == 1
    assert total[0] / 2 < total[1] < total[0]
    trunk.close()
