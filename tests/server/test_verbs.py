"""The verbs of the desk: eight published update rules, the same whole and at any cut."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import CLASSES, H, V, at_desk, backbone, batches_for, gap, same, toy_task, whole

from flexp.client.desk import Desk, Drag
from flexp.data.examples import Batch
from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model.adapter import Head, Ia3, Kind, Lora, Prompt
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.selection import FAR, HEAD, NEAR, Where
from flexp.tensors import PerRow, Stacked, Tensors, Term, Wear, dot, total

KIND = Lora(rank=3, alpha=6.0)
SEATS = [
    Seat(Cut(1, 0)),
    Seat(Cut(2, 1)),
    Seat(Cut(2), "logits"),
    Seat(Cut(1), "loss"),
]
Results = dict[str, Tensor]


@functools.cache
def body(family: str = "bert-cls") -> Backbone:
    return backbone(family)


@functools.cache
def drawn(model: Backbone, seed: int) -> Tensors:
    """An adapter with random values everywhere, so that both LoRA factors have a gradient."""
    start = model.initial(KIND, Dice(1))
    stream = Dice(seed)("drawn")
    return {
        k: v + 0.3 * torch.randn(v.shape, generator=stream("tensor", name=k).generator())
        for k, v in start.items()
    }


def offering(model: Backbone, names: Sequence[str]) -> tuple[dict[str, SlotSpec], Parcel]:
    adapters = {s: drawn(model, n) for n, s in enumerate(names) if s != "mask"}
    if "mask" in names:
        ones = drawn(model, 0)
        adapters["mask"] = {k: torch.full_like(v, 0.5) for k, v in ones.items()}
    return {s: SlotSpec() for s in names}, Parcel(adapters)


# ---- eight update rules


def fedbasis(desk: Desk) -> Results:
    """A learned blend of three bases: blend and bases move."""
    psi = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    bases = [f"v{k}" for k in range(3)]
    for batch in desk.batches(steps=2):
        psi.grad = None
        blend = psi.softmax(0)
        loss = desk.model.loss(batch, tuple(Term(v, blend[k]) for k, v in enumerate(bases)))
        desk.grad(loss, bases, [f"g{k}" for k in range(3)])
        assert psi.grad is not None
        for k, v in enumerate(bases):
            desk.assign(v, (Term(v), Term(f"g{k}", -0.1)))
        with torch.no_grad():
            psi -= 1.0 * psi.grad
    return {"psi": psi.detach(), **desk.whole("v0"), **marked("v2", desk)}


def scaffold(desk: Desk) -> Results:
    """Control variates: y <- y - eta (g - c_i + c), then c_i <- c_i - c + (w - y) / (K eta)."""
    steps, eta = 3, 0.1
    desk.assign("y", (Term("w"),))
    for batch in desk.batches(steps=steps):
        desk.grad(desk.model.loss(batch, "y"), ["y"], ["g"])
        desk.assign("y", (Term("y"), Term("g", -eta), Term("ci", eta), Term("c", -eta)))
    back = 1 / (steps * eta)
    desk.assign("ci", (Term("ci"), Term("c", -1.0), Term("w", back), Term("y", -back)))
    return {**desk.whole("ci"), **marked("y", desk)}


def per_fedavg(desk: Desk) -> Results:
    """First-order MAML: the gradient after one inner step, applied at the original point."""
    for batch, other in zip(desk.batches(steps=2), desk.batches(steps=2, split="val"), strict=True):
        desk.grad(desk.model.loss(batch, "w"), ["w"], ["g"])
        desk.assign("inner", (Term("w"), Term("g", -0.2)))
        desk.grad(desk.model.loss(other, "inner"), ["inner"], ["g"])
        desk.assign("w", (Term("w"), Term("g", -0.1)))
    return desk.whole("w")


def pfedme(desk: Desk) -> Results:
    """Moreau envelopes: inner steps on f + lambda/2 |theta - w|^2, then w follows theta."""
    eta, pull = 0.1, 2.0
    for batch in desk.batches(steps=2):
        desk.assign("t", (Term("w"),))
        for _ in range(2):
            desk.grad(desk.model.loss(batch, "t"), ["t"], ["g"])
            desk.assign("t", (Term("t", 1 - eta * pull), Term("g", -eta), Term("w", eta * pull)))
        desk.assign("w", (Term("w", 0.7), Term("t", 0.3)))
    return desk.whole("w")


def apfl(desk: Desk) -> Results:
    """A mixture of a shared and an own adapter whose weight is learned too."""
    alpha = torch.tensor(0.5, requires_grad=True)
    for batch in desk.batches(steps=2):
        alpha.grad = None
        desk.grad(desk.model.loss(batch, "w"), ["w"], ["gw"])
        mix = (Term("v", alpha), Term("w", 1 - alpha, detach=True))
        desk.grad(desk.model.loss(batch, mix), ["v"], ["gv"])
        assert alpha.grad is not None
        desk.assign("w", (Term("w"), Term("gw", -0.1)))
        desk.assign("v", (Term("v"), Term("gv", -0.1)))
        with torch.no_grad():
            alpha -= 0.1 * alpha.grad
    return {"alpha": alpha.detach(), **desk.whole("v"), **marked("w", desk)}


def fedala(desk: Desk) -> Results:
    """Element-wise weights between own and global, learned and clipped to [0, 1]."""
    mix = (Term("own"), Term("global", 1.0, "mask"), Term("own", -1.0, "mask"))
    for batch in desk.batches(steps=2):
        desk.grad(desk.model.loss(batch, mix), ["mask"], ["g"])
        desk.assign("mask", (Term("mask"), Term("g", -20.0)), clip=(0.0, 1.0))
    desk.assign("own", mix)
    return {**desk.whole("mask"), **marked("own", desk)}


def hessian_product(desk: Desk, eps: float = 1e-2) -> Results:
    """H e by central difference: (g(w + eps e) - g(w - eps e)) / (2 eps)."""
    batch = next(iter(desk.batches(steps=1)))
    for name, by in (("plus", eps), ("minus", -eps)):
        desk.assign(name, (Term("w"), Term("e", by)))
        desk.grad(desk.model.loss(batch, name), [name], [f"g/{name}"])
    desk.assign("he", (Term("g/plus", 0.5 / eps), Term("g/minus", -0.5 / eps)))
    return desk.whole("he")


def fedfomo(desk: Desk) -> Results:
    """Peers weighted by the fall of the validation loss per distance."""
    weights: dict[str, float] = {}
    batch = next(iter(desk.batches(steps=1, split="val")))
    with torch.no_grad():
        before = desk.model.loss(batch, "b")
        for peer in ("p1", "p2"):
            desk.assign("d", (Term(peer), Term("b", -1.0)))
            distance = total(desk.dot("d", "d")) ** 0.5
            # Either sign counts here, so that something always moves.
            weights[peer] = abs(float(before - desk.model.loss(batch, peer))) / distance
    scale = 1 / sum(weights.values())
    rest = 1.0 - sum(w * scale for w in weights.values())
    desk.assign("b", (Term("b", rest), *(Term(p, w * scale) for p, w in weights.items())))
    return {"weights": torch.tensor(list(weights.values())), **desk.whole("b")}


def accumulate(desk: Desk) -> Results:
    """Three forwards wait at once and their gradients add up."""
    losses = [desk.model.loss(batch, "w") for batch in desk.batches(steps=3)]
    desk.grad(losses[0] + losses[1] + 2 * losses[2], ["w"], ["g"])
    return desk.whole("g")


def representation(desk: Desk) -> Results:
    """A loss of one's own on the last hidden state."""
    for batch in desk.batches(steps=2):
        hidden = desk.model.hidden(batch, "w")
        loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
        desk.grad(loss, ["w"], ["g"])
        desk.assign("w", (Term("w"), Term("g", -0.1)))
    return desk.whole("w")


def fitted(desk: Desk) -> Results:
    """All that ``fit`` can do at once: an added mix, two pulls, a clip, and parts in turn."""
    pull = [
        Drag("ci", 0.3, form="product"),
        Drag("c", 0.2, where=Where(last=2) | Where(names="*query*")),
    ]
    desk.fit(wear="w", steps=1, add=(Term("c", 0.3), Term("ci", -0.3)), pull=pull, clip_norm=0.5)
    desk.fit(wear="w", steps=2, train=HEAD)
    desk.fit(wear="w", steps=2, train=~HEAD, clip_norm=0.01)
    return desk.whole("w")


def marked(slot: str, desk: Desk) -> Results:
    return {f"{slot}:{k}": v for k, v in desk.whole(slot).items()}


RULES: dict[str, tuple[Callable[[Desk], Results], tuple[str, ...]]] = {
    "FedBasis": (fedbasis, ("v0", "v1", "v2")),
    "SCAFFOLD": (scaffold, ("w", "c", "ci")),
    "Per-FedAvg": (per_fedavg, ("w",)),
    "pFedMe": (pfedme, ("w",)),
    "APFL": (apfl, ("w", "v")),
    "FedALA": (fedala, ("own", "global", "mask")),
    "Hessian product": (hessian_product, ("w", "e")),
    "FedFomo": (fedfomo, ("b", "p1", "p2")),
    "accumulation": (accumulate, ("w",)),
    "representation": (representation, ("w",)),
    "fit": (fitted, ("w", "c", "ci")),
}


def ruled(name: str, seat: Seat, family: str = "bert-cls") -> Results:
    model = body(family)
    rule, names = RULES[name]
    slots, offer = offering(model, names)
    with at_desk(model, seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        batch = next(iter(desk.batches(steps=1)))
        out = rule(desk)
        with torch.no_grad():
            out["logits"] = desk.model.logits(batch, names[0])
            out["loss"] = desk.model.loss(batch, names[0])
        before = offer.adapters[names[0]]
    still = [k for k in before if k in out and torch.equal(out[k], before[k])]
    assert all("classifier" in k for k in still), "nothing moved"
    assert not still or name == "representation"  # whose loss does not see the head
    return out


@pytest.mark.parametrize("name", RULES)
def test_an_update_rule_is_the_same_whole_and_cut(name: str) -> None:
    expected = ruled(name, whole(4))
    for seat in SEATS:
        assert same(ruled(name, seat), expected), seat


def test_an_update_rule_of_a_language_model() -> None:
    expected = ruled("FedBasis", whole(4), "llama")
    for seat in (Seat(Cut(1, 2)), Seat(Cut(3), "loss")):
        assert same(ruled("FedBasis", seat, "llama"), expected), seat


# ---- the verbs against arithmetic on dictionaries


MIX = (0.7, -0.4, 1.3)


def by_hand(given: Mapping[str, Tensors], coefs: Sequence[Tensor | float]) -> Tensors:
    """``c0 a + c1 b + c2 a * mask`` of the offered slots."""
    a, b, mask = given["a"], given["b"], given["mask"]
    return {k: coefs[0] * a[k] + coefs[1] * b[k] + coefs[2] * (a[k] * mask[k]) for k in a}


@pytest.mark.parametrize("seat", [whole(4), *SEATS], ids=str)
def test_gradients_of_a_mix_are_those_of_autograd(seat: Seat) -> None:
    names = ("a", "b", "mask")
    slots, offer = offering(body(), names)
    leaves = {
        s: {k: v.clone().requires_grad_() for k, v in held.items()}
        for s, held in offer.adapters.items()
    }
    hand = [torch.tensor(c, requires_grad=True) for c in MIX]
    ours = [torch.tensor(c, requires_grad=True) for c in MIX]
    with at_desk(body(), whole(4), kind=KIND, slots=slots, offer=offer) as (desk, _):
        batch = next(iter(desk.batches(steps=1)))
        near = by_hand(leaves, hand)
        expected = toy_task(body()).loss(desk.model.logits(batch, "a", near=near), batch.labels)
        expected.backward()
    with at_desk(body(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        wear = (Term("a", ours[0]), Term("b", ours[1]), Term("a", ours[2], "mask"))
        loss = desk.model.loss(batch, wear)
        desk.grad(loss, names, [f"g/{s}" for s in names])
        found = {s: desk.whole(f"g/{s}") for s in names}
    assert torch.allclose(loss, expected, atol=1e-6)
    for mine, theirs in zip(ours, hand, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert theirs.grad.abs() > 1e-4
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for slot in names:
        assert gap(found[slot], {k: grad_of(v) for k, v in leaves[slot].items()}) < 1e-6, slot


def grad_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("seat", SEATS[:3], ids=str)
def test_assign_and_dot_are_arithmetic_on_both_sides(seat: Seat) -> None:
    slots, offer = offering(body(), ("a", "b", "mask"))
    a, b = offer.adapters["a"], offer.adapters["b"]
    with at_desk(body(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        place = desk.model.near.place
        mix = (Term("a", MIX[0]), Term("b", MIX[1]), Term("a", MIX[2], "mask"))
        desk.assign("sum", mix)
        assert gap(desk.whole("sum"), by_hand(offer.adapters, MIX)) < 1e-6
        desk.assign("a", (Term("b"),), where=FAR)
        moved = desk.whole("a")
        for k in a:
            assert torch.equal(moved[k], b[k] if place(k).side == "far" else a[k]), k
        desk.assign("fresh", (Term("b"),), where=NEAR, clip=(-0.1, 0.2))
        fresh = desk.whole("fresh")
        for k in a:
            near = place(k).side == "near"
            assert torch.equal(fresh[k], b[k].clamp(-0.1, 0.2) if near else 0 * b[k]), k
        blocks = desk.dot("b", "sum")
        last = desk.dot("b", "sum", where=Where(last=1))
    assert len(blocks) == 6
    assert total(blocks) == pytest.approx(dot(b, by_hand(offer.adapters, MIX)), rel=1e-5)
    assert blocks[0] == 0  # nothing lies before the blocks
    assert all(x != 0 for x in blocks[1:])
    assert last == (0, 0, 0, 0, *blocks[4:])


@pytest.mark.parametrize("seat", SEATS)
def test_what_an_assignment_leaves_of_an_offer_that_nobody_has_read(seat: Seat) -> None:
    slots, offer = offering(body(), ("a", "b"))
    part = Where(names="*lora_A*")
    with at_desk(body(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        desk.assign("a", (Term("b"),), where=part)
        found = desk.whole("a")
    for k, v in found.items():
        assert torch.equal(v, offer.adapters["b" if "lora_A" in k else "a"][k]), k


def test_grad_moves_only_what_was_asked_and_drops_the_rest() -> None:
    slots, offer = offering(body(), ("a", "b"))
    with at_desk(body(), SEATS[1], kind=KIND, slots=slots, offer=offer) as (desk, _):
        batch = next(iter(desk.batches(steps=1)))
        desk.grad(desk.model.loss(batch, (Term("a"), Term("b"))), ["a"], ["g"])
        once = desk.whole("g")
        desk.grad(desk.model.loss(batch, "a"), ["b"], ["none"])  # b was not worn this time
        assert not any(bool(v.any()) for v in desk.whole("none").values())
        desk.grad(desk.model.loss(batch, (Term("a"), Term("b"))), ["a"], ["again"])
        assert same(desk.whole("again"), once)


def test_a_detached_term_has_no_gradient_but_its_coefficient_does() -> None:
    slots, offer = offering(body(), ("a", "b"))
    for seat in (whole(4), SEATS[1]):
        coef = torch.tensor(0.5, requires_grad=True)
        with at_desk(body(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
            batch = next(iter(desk.batches(steps=1)))
            loss = desk.model.loss(batch, (Term("a"), Term("b", coef, detach=True)))
            desk.grad(loss, ["a", "b"], ["ga", "gb"])
            assert any(bool(v.any()) for v in desk.whole("ga").values())
            assert not any(bool(v.any()) for v in desk.whole("gb").values())
        assert coef.grad is not None
        assert coef.grad != 0


@pytest.mark.parametrize("clip", [0.75, 1e6], ids=["clipped", "within"])
def test_fit_is_made_of_the_verbs(clip: float) -> None:
    """One SGD step: w - lr s (g + add + pulls), with s the clip over near and far together."""
    slots, offer = offering(body(), ("w", "c"))
    w, c = offer.adapters["w"], offer.adapters["c"]
    optim = Optim("sgd", lr=0.5)
    with at_desk(body(), SEATS[1], kind=KIND, slots=slots, offer=offer, optim=optim) as (desk, _):
        batch = next(iter(desk.batches(steps=1)))
        desk.grad(desk.model.loss(batch, "w"), ["w"], ["g"])
        bent = {k: g + 0.3 * c[k] + 0.2 * (w[k] - c[k]) for k, g in desk.whole("g").items()}
        add, pull = (Term("c", 0.3),), [Drag("c", 0.2)]
        facts = desk.fit(wear="w", add=add, pull=pull, clip_norm=clip, batches=iter([batch]))
        found = desk.whole("w")
    assert (facts["steps"], facts["skipped"], facts["rows"]) == (1, 0, 4)
    norm = dot(bent, bent) ** 0.5
    assert norm > 0.75
    scale = min(1.0, clip / norm)
    assert gap(found, {k: w[k] - 0.5 * scale * v for k, v in bent.items()}) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_are_those_of_torch(name: Literal["adamw", "sgd"]) -> None:
    slots, offer = offering(body(), ("w", "g", "g2"))
    optim = Optim(name, lr=0.1, weight_decay=0.01, momentum=0.9, betas=(0.8, 0.95))
    params = {k: torch.nn.Parameter(v.clone()) for k, v in offer.adapters["w"].items()}
    if name == "adamw":
        theirs: Any = torch.optim.AdamW(params.values(), 0.1, (0.8, 0.95), weight_decay=0.01)
    else:
        theirs = torch.optim.SGD(params.values(), 0.1, 0.9, weight_decay=0.01)
    with at_desk(body(), SEATS[1], kind=KIND, slots=slots, offer=offer, optim=optim) as (desk, _):
        for grad in ("g", "g2", "g"):
            desk.step("w", grad=grad, scale=0.5)
            for k, p in params.items():
                p.grad = 0.5 * offer.adapters[grad][k]
            theirs.step()
        assert gap(desk.whole("w"), {k: p.detach() for k, p in params.items()}) < 1e-6


def test_parts_that_step_in_turn_step_as_in_torch() -> None:
    slots, offer = offering(body(), ("w", "g"))
    params = {k: torch.nn.Parameter(v.clone()) for k, v in offer.adapters["w"].items()}
    theirs = torch.optim.AdamW(params.values(), 0.1, weight_decay=0.0)
    with at_desk(body(), SEATS[1], kind=KIND, slots=slots, offer=offer, optim=Optim(lr=0.1)) as (
        desk,
        _,
    ):
        for where in (HEAD, HEAD, ~HEAD):
            desk.step("w", grad="g", where=where)
            for k, p in params.items():
                chosen = where.holds(k, desk.model.near.place(k))
                p.grad = offer.adapters["g"][k].clone() if chosen else None
            theirs.step()
        assert gap(desk.whole("w"), {k: p.detach() for k, p in params.items()}) < 1e-6


def test_a_slot_of_another_kind_trains_far_too() -> None:
    """Only blocks 1 and 2 move, so nothing in front of them asks for a gradient."""
    slots, only = {"personal": SlotSpec(kind=KIND)}, Where(names="*layer.[12].*")
    batches = batches_for(body(), 2)
    found: list[Tensors] = []
    for seat in (whole(4), Seat(Cut(1, 1))):
        with at_desk(body(), seat, kind=Head(), slots=slots) as (desk, _):
            before = desk.whole("personal")
            desk.fit(train=only, batches=iter(batches))
            found.append(desk.whole("personal"))
    moved = {body().block_of(k) for k, v in found[0].items() if not torch.equal(v, before[k])}
    assert moved == {1, 2}
    assert same(*found)


def test_a_slot_that_nobody_has_is_refused_by_name() -> None:
    with at_desk(body(), SEATS[1], kind=KIND) as (desk, _):
        with pytest.raises(AdapterError, match='no slot "nobody"'):
            desk.assign("x", (Term("nobody"),))
        desk.dot("personal", "personal")  # and nothing of it reached the server


# ---- a Hessian product against the exact one


def doubled(model: Backbone) -> Backbone:
    sizes: dict[str, Any] = {
        "vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_attention_heads": 2,
        "max_position_embeddings": 32, "num_labels": CLASSES, "num_hidden_layers": model.depth,
    }  # fmt: skip
    config = hf.BertConfig(**sizes)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        made = hf.BertForSequenceClassification(config)
    return Backbone(made.double(), task="classification")


def test_hessian_product_by_central_difference_is_the_exact_one() -> None:
    wide = doubled(body())
    slots, small = offering(body(), ("w", "e"))
    offer = Parcel({s: {k: v.double() for k, v in a.items()} for s, a in small.adapters.items()})
    with at_desk(wide, whole(4), kind=KIND, slots=slots, offer=offer) as (desk, _):
        batch = next(iter(desk.batches(steps=1)))
        exact = hessian_times(desk, batch, offer.adapters["w"], offer.adapters["e"])
    with at_desk(wide, SEATS[1], kind=KIND, slots=slots, offer=offer) as (desk, _):
        found = hessian_product(desk, eps=1e-4)
    size = dot(exact, exact) ** 0.5
    error = {k: found[k] - exact[k] for k in exact}
    assert size > 1e-2
    assert dot(error, error) ** 0.5 < 1e-6 * size


def hessian_times(desk: Desk, batch: Batch, at: Tensors, by: Tensors) -> Tensors:
    params = {k: v.clone().requires_grad_() for k, v in at.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        loss = desk.task.loss(desk.model.logits(batch, "w", near=params), batch.labels)
        first = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        slope = torch.stack([(g * by[k]).sum() for g, k in zip(first, params, strict=True)]).sum()
        second = torch.autograd.grad(slope, list(params.values()))
    return dict(zip(params, second, strict=True))


# ---- several adapters at once


STACK = Stacked((Term("a", 0.5), Term("b", -1.5)))


def worn(seat: Seat, wear: Wear, batch: Batch) -> Results:
    slots, offer = offering(body(), ("a", "b"))
    with at_desk(body(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        logits = desk.model.logits(batch, wear)
        weights = torch.arange(1.0, logits.numel() + 1).view_as(logits)
        desk.grad((logits * weights).sum(), ["a", "b"], ["ga", "gb"])
        return {"logits": logits.detach(), **marked("ga", desk), **marked("gb", desk)}


def test_stacked_adapters_are_cut_alike() -> None:
    batch = batches_for(body(), 1)[0]
    expected = worn(whole(4), STACK, batch)
    for seat in SEATS:
        assert same(worn(seat, STACK, batch), expected), seat


def concatenated(a: Tensors, b: Tensors, by: tuple[float, float]) -> Tensors:
    out: Tensors = {}
    for k in a:
        if ".lora_A." in k:
            out[k] = torch.cat([a[k], b[k]])
        elif ".lora_B." in k:  # the scaling alpha / rank halves as the rank doubles
            out[k] = torch.cat([2 * by[0] * a[k], 2 * by[1] * b[k]], dim=1)
        else:
            out[k] = by[0] * a[k] + by[1] * b[k]
    return out


def test_stacked_adapters_are_their_ranks_concatenated() -> None:
    batch = batches_for(body(), 1)[0]
    slots, offer = offering(body(), ("a", "b"))
    joined = concatenated(offer.adapters["a"], offer.adapters["b"], by=(0.5, -1.5))
    with at_desk(body(), whole(4), kind=KIND, slots=slots, offer=offer) as (desk, _):
        expected = desk.model.logits(batch, "a", near=joined)
        plain = desk.model.logits(batch, (Term("a", 0.5), Term("b", -1.5)))
        found = desk.model.logits(batch, STACK)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)  # a mix of factors is something else


@pytest.mark.parametrize("times", [None, "mask"])
def test_weights_of_a_stack_scale_products(times: str | None) -> None:
    slots, offer = offering(body(), ("a", "b", "mask"))
    batch = batches_for(body(), 1)[0]

    def at(seat: Seat, by: float, learn: bool) -> tuple[float, Tensor | None]:
        coef = torch.tensor(by, requires_grad=learn)
        wear = Stacked((Term("a", coef if learn else by, times), Term("b")))
        with at_desk(body(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
            loss = desk.model.loss(batch, wear)
            desk.grad(loss, ["a"], ["g"])
        return float(loss.detach()), coef.grad

    # The mask is a half everywhere, so A and B are halved, and then the product by 0.5.
    a, b = offer.adapters["a"], offer.adapters["b"]
    half = 0.5 if times else 1.0
    joined = concatenated({k: half * v for k, v in a.items()}, b, by=(0.5, 1.0))
    with at_desk(body(), whole(4), kind=KIND, slots=slots, offer=offer) as (desk, _):
        expected = desk.task.loss(desk.model.logits(batch, "a", near=joined), batch.labels)
    value, slope = at(whole(4), 0.5, learn=True)
    assert slope is not None
    assert value == pytest.approx(float(expected), abs=1e-5)
    assert value == pytest.approx(at(whole(4), 0.5, learn=False)[0], abs=1e-6)
    step = (at(whole(4), 0.51, learn=False)[0] - at(whole(4), 0.49, learn=False)[0]) / 0.02
    assert float(slope) == pytest.approx(step, rel=1e-2, abs=1e-3)
    for seat in SEATS[:2]:
        assert at(seat, 0.5, learn=True) == (value, slope), seat


def test_rows_that_wear_different_slots_are_cut_alike() -> None:
    batch = batches_for(body(), 1)[0]
    wear = PerRow(("a", "b"), (1, 0, 1))
    expected = worn(whole(4), wear, batch)
    for seat in SEATS:
        assert same(worn(seat, wear, batch), expected), seat


def test_rows_that_wear_different_slots_equal_each_group_alone() -> None:
    batch = batches_for(body(), 1)[0]
    rows = {"a": [1], "b": [0, 2]}
    slots, offer = offering(body(), ("a", "b"))
    for seat in (whole(4), SEATS[1]):
        with at_desk(body(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
            logits = desk.model.logits(batch, PerRow(("a", "b"), (1, 0, 1)))
            desk.grad(logits.square().sum(), ["a", "b"], ["ga", "gb"])
            for slot, held in rows.items():
                alone = Batch({k: v[held] for k, v in batch.inputs.items()}, batch.labels[held])
                expected = desk.model.logits(alone, slot)
                assert torch.allclose(logits[held], expected, atol=1e-6)
                desk.grad(expected.square().sum(), [slot], ["alone"])
                assert gap(desk.whole("alone"), desk.whole(f"g{slot}")) < 1e-5


@pytest.mark.parametrize(
    ("kind", "wear"),
    [
        (Prompt(tokens=3), PerRow(("personal",), (0, 0, 0))),
        (Prompt(tokens=3), Stacked((Term("personal"),))),
        (Ia3(), Stacked((Term("personal"),))),
    ],
    ids=["prompt per row", "prompt stacked", "ia3 stacked"],
)
def test_what_a_kind_cannot_wear_is_refused(kind: Kind, wear: Wear) -> None:
    with (
        at_desk(body(), whole(4), kind=kind) as (desk, _),
        pytest.raises(AdapterError),
    ):
        desk.model.logits(batches_for(body(), 1)[0], wear)


def test_every_row_must_wear_something() -> None:
    with (
        at_desk(body(), whole(4)) as (desk, _),
        pytest.raises(AdapterError),
    ):
        desk.model.logits(batches_for(body(), 1)[0], PerRow(("personal",), (0, 0)))


@pytest.mark.parametrize("seat", [Seat(Cut(1, 0)), Seat(Cut(4))], ids=["far", "near"])
@pytest.mark.parametrize("lr", [1e-12, 1e-2])
def test_a_turn_in_which_nothing_moves_is_told_by_name(seat: Seat, lr: float) -> None:
    """So small a rate is lost in rounding; three steps are enough to see it."""
    model = body()
    names, offer = offering(model, ["personal"])
    optim = Optim("sgd", lr=lr)
    with at_desk(model, seat, slots=names, offer=offer, optim=optim) as (desk, _):
        desk.fit(batches=iter(batches_for(model, 3)), wear="personal")
        if lr > 1e-6:
            desk.model.near.check_moved("me")
            desk.session.leave()
            return
        near = partial(desk.model.near.check_moved, "me")
        end = near if seat.near_only(model.depth) else desk.session.leave
        with pytest.raises(AdapterError, match=r'adapter tensors of client "me" have not moved'):
            end()


def test_two_steps_prove_nothing() -> None:
    model = body()
    names, offer = offering(model, ["personal"])
    with at_desk(model, SEATS[0], slots=names, offer=offer, optim=Optim("sgd", lr=1e-12)) as (
        desk,
        _,
    ):
        desk.fit(batches=iter(batches_for(model, 2)), wear="personal")
        desk.model.near.check_moved("me")
        desk.session.leave()
