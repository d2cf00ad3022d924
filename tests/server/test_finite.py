"""Nothing that is not finite comes in at the server's door, wherever a client puts it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import play, same
from wires import DOUBLE, U, V, Wire, served

from flexp.errors import LinkError
from flexp.link.messages import Answer, Backward, Continue, Do, Join, Message, Put, Submit
from flexp.model.ops import Assign, Optim, Pull, SlotSpec, Step
from flexp.parcel import digest
from flexp.selection import FAR
from flexp.server.trunk import Trunk
from flexp.strategies.local import Local
from flexp.tensors import Term

ODD = (math.nan, math.inf, -math.inf)
LEARNED = (Term("personal", math.nan),)
FINE = (1e38, -0.0, 1e-45, 3.4028234e38)


@pytest.fixture
def wire() -> Iterator[Wire]:
    trunk, wires = served(U)
    wires[0].join()
    yield wires[0]
    trunk.close()


def spoilt(tensor: Tensor, odd: float) -> Tensor:
    """The tensor with its last number changed."""
    out = tensor.clone()
    out.view(-1)[-1] = odd
    return out


def state(trunk: Trunk) -> dict[str, str]:
    """Everything that a client's message can change at a server, as digests."""
    out = {"shared " + slot: digest(held) for slot, held in trunk.tenants.shared.values.items()}
    for client, home in trunk.tenants.homes.items():
        out |= {f"{client} {slot}": digest(held) for slot, held in home.slots.values.items()}
        out |= {f"{client} {slot}@g": digest(held) for slot, held in home.slots.grads.items()}
        out[f"{client} rows"] = f"{home.rows} {home.stepped} {home.seen} {home.reply is None}"
        out[f"{client} waits"] = str(sorted(trunk.pending.held.get(client, {})))
    return out


def messages(wire: Wire, odd: float) -> dict[str, tuple[Message, str]]:
    """Messages with one odd number, and what the refusal names."""
    near = {"personal": {"near.w": torch.tensor([1.0, odd])}}
    coefs = (spoilt(torch.ones(6), odd),)
    ahead = wire.forward(keep=True)
    wire.send(ahead)
    grad = spoilt(torch.ones_like(ahead.hidden), odd)
    forward = wire.forward()

    def submit(**more: Any) -> Submit:
        plain: dict[str, Any] = {"near": {}, "far": {}, "loose": {}, "facts": {}}
        return Submit(wire.key("submit"), **{**plain, **more})

    def do(op: Any) -> Do:
        return Do(wire.key("do"), (DOUBLE, op))

    return {
        "hidden": (replace(forward, hidden=spoilt(forward.hidden, odd)), 'Tensor "hidden"'),
        "coefficients": (wire.forward(wear=LEARNED, coefs=coefs), 'Tensor "coef/0"'),
        "gradient": (wire.backward(ahead, grad), 'Tensor "grad"'),
        "talk": (
            Continue(wire.key("continue"), 1, "personal", spoilt(forward.hidden[:1], odd), 0),
            'Tensor "hidden"',
        ),
        "reply": (submit(near=near), 'Tensor "slot/personal/near.w"'),
        "loose": (submit(loose={"mask": torch.tensor(odd)}), 'Tensor "tensor/mask"'),
        "facts": (submit(facts={"deep": [1, {"loss": odd}]}), r"facts\.deep\[1\]\.loss"),
        "put": (Put(wire.key("put"), "personal", near["personal"]), 'Tensor "slot/personal/near'),
        "scale": (do(Step("personal", "personal", scale=odd)), "as scale of its do"),
        "share": (do(Step("personal", "personal", share=odd)), "as share of its do"),
        "pull": (do(Pull("personal", "personal", odd, "personal")), "as weight of its do"),
        "mix": (do(Assign("personal", (Term("personal", odd),))), "as coef of its do"),
        "clip": (do(Assign("personal", (Term("personal"),), clip=(0.0, odd))), "as clip of its do"),
        "riding": (wire.forward(ops=(Step("personal", "g", odd),)), "as scale of its forward"),
        "rate": (Join(wire.key("join"), wire.seat, {"personal": Optim(lr=odd)}), "as lr of its"),
    }  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_number_is_refused_by_name_and_changes_nothing(wire: Wire, odd: float) -> None:
    made = messages(wire, odd)
    for name, (message, told) in made.items():
        before = state(wire.trunk)
        with pytest.raises(LinkError, match=told) as caught:
            wire.send(message)
        assert f'"{wire.client}"' in str(caught.value), name
        assert state(wire.trunk) == before, name


def test_an_infinite_coefficient_is_no_learned_one(wire: Wire) -> None:
    with pytest.raises(LinkError, match="as coef of its forward"):
        wire.send(wire.forward(wear=(Term("personal", math.inf),)))


def test_a_gradient_that_was_refused_may_come_again(wire: Wire) -> None:
    ahead = wire.forward()
    out = wire.send(ahead).tensors["hidden"]
    behind = wire.backward(ahead, torch.ones_like(out))
    with pytest.raises(LinkError, match="NaN or infinity"):
        wire.send(replace(behind, grad=spoilt(behind.grad, math.nan)), "odd")
    assert torch.isfinite(wire.send(behind, "right").tensors["grad"]).all()


@pytest.mark.parametrize("fine", FINE)
def test_what_is_finite_is_accepted_however_large_or_small(wire: Wire, fine: float) -> None:
    whole = torch.full((4096,), fine)  # their sum is beyond the range
    wire.send(Submit(wire.key("submit"), {}, {}, {"prior": whole}, {"x": fine}))
    reply = wire.trunk.tenants[wire.client].reply
    assert reply is not None
    assert torch.equal(reply.tensors["prior"], whole)
    ahead = wire.forward()
    wire.send(replace(ahead, hidden=spoilt(ahead.hidden, fine)))


def test_what_a_server_made_of_finite_numbers_is_not_handed_in_if_it_is_not(wire: Wire) -> None:
    """A client may spoil what is its own far part; nobody else gets it."""
    huge = Assign("personal", (Term("personal", 1e38),))
    wire.send(Do(wire.key("do"), (huge, huge)))
    with pytest.raises(LinkError, match=r'Tensor "slot/personal/.*" of client "c0"'):
        wire.send(Submit(wire.key("submit"), {}, {"personal": FAR}, {}, {}))
    assert wire.trunk.tenants[wire.client].reply is None


def test_nobody_can_spoil_the_one_copy_of_all() -> None:
    trunk, (one, _) = served(V, V, spec=SlotSpec(home="server"))
    one.join()
    before = state(trunk)
    huge = Assign("personal", (Term("personal", 1e38),))
    for message in (Do(one.key("do"), (huge, huge)), one.forward(ops=(huge, huge))):
        with pytest.raises(LinkError, match=r'Tensor "slot/personal/.*" of client "c0"'):
            one.send(message)
        assert state(trunk) == before
    trunk.close()


# ---- the other end: an honest client skips the step


@dataclass(frozen=True)
class Spoiling:
    """A way to the server on which some forwards' results come back huge."""

    inner: Any
    seen: list[type[Message]]

    def send(self, message: Message) -> Answer:
        self.seen.append(type(message))
        answer = self.inner.send(message)
        if self.seen.count(type(message)) != 2 or "hidden" not in answer.tensors:
            return answer
        return replace(answer, tensors={"hidden": answer.tensors["hidden"] * math.nan})

    def close(self) -> None:
        self.inner.close()


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted() -> None:
    seen: list[type[Message]] = []

    def wrap(client: str, link: Any) -> Any:
        return Spoiling(link, seen) if client == "c0" else link

    found = play(Local(), U, rounds=1, wrap=wrap)
    first = next(a for a in found.arrivals if a.client == "c0")
    assert first.failure is None
    assert first.reply is not None
    assert first.reply.facts["skipped"] == 1
    assert math.isfinite(float(str(first.reply.facts["loss"])))
    assert seen.count(Backward) == int(str(first.reply.facts["steps"])) - 1
    assert all(bool(torch.isfinite(v).all()) for v in found.adapters["c0"].values())
    plain = play(Local(), U, rounds=1)
    assert same(found.adapters["c1"], plain.adapters["c1"])
