"""Hidden states in front of what trains are computed once, as long as nothing in front changes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from mail import posting
from toys import at_desk, backbone, examples, gap, play, same, toy_task, whole

from flexp import recipe_file
from flexp.client.desk import Desk, Training
from flexp.data.examples import Batch
from flexp.errors import PlanError, RecipeError
from flexp.model.adapter import Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.model.prefix import Prefix
from flexp.recipe import Recipe
from flexp.selection import ALL, FAR, FRONT, Where
from flexp.server.trunk import Trunk
from flexp.stage import training
from flexp.strategies.flexp import FlexP
from flexp.tensors import PerRow, Tensors, Term

ROOM, SGD = 1 << 20, Optim("sgd", lr=0.3)
U, V = Seat(Cut(2, 1)), Seat(Cut(2), "loss")
LAST = FAR | (FRONT & Where(nearest=1))
HEAD = Where(part="head")
NOTHING = ~ALL


@contextmanager
def watched(body: Backbone) -> Generator[list[int]]:
    """Notes how many rows each run of the first block has."""
    station: Any = body.model.get_submodule(f"{body.blocks_path}.0").forward
    inner, seen = station.forward, list[int]()

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))
        return inner(*args, **kwargs)

    station.forward = noted
    try:
        yield seen
    finally:
        station.forward = inner


def trained(
    seat: Seat,
    where: Where,
    cache: int,
    *,
    family: str = "bert-cls",
    kind: Kind = Lora(rank=3),  # noqa: B008
    ahead: bool = False,
    window: int = 1,
    epochs: int = 3,
) -> tuple[Tensors, list[int]]:
    """The adapter after three epochs, other rows together in each; rows through the first block."""
    body = backbone(family)
    with at_desk(body, seat, kind=kind, optim=SGD, cache=cache) as (desk, _):
        desk.training, begun = replace(desk.training, ahead=ahead), desk.whole()
        way = posting(desk, window) if window > 1 else nullcontext()
        with watched(body) as rows, way:
            desk.fit(train=where, batches=desk.batches(epochs=epochs, size=5))
        found = desk.whole()
        assert gap(begun, found) > 1e-3
        return found, rows


CASES: dict[str, tuple[str, Seat, Where]] = {
    "the last block": ("bert-cls", U, LAST),
    "the last block, the head far": ("llama", V, LAST),
    "the last block, positions by the mask": ("opt", U, LAST),
    "nothing in front": ("gpt2", U, FAR),
    "the last of all": ("modernbert-cls", whole(), Where(last=1)),
    "the head alone": ("bert-cls", whole(), HEAD),
    "a batch in parts": ("bert-cls", replace(U, accumulate=2), LAST),
    "blocks again": ("bert-cls", replace(U, recompute=2), LAST),
}


@pytest.mark.parametrize("name", CASES)
def test_later_epochs_begin_where_training_does(name: str) -> None:
    family, seat, where = CASES[name]
    plain, every = trained(seat, where, 0, family=family)
    kept, some = trained(seat, where, ROOM, family=family)
    assert (sum(every), sum(some)) == (36, 12)  # the whole shard once
    assert gap(kept, plain) <= 1e-6


TAIL = Where(part="tail") | HEAD
BEHIND: dict[str, tuple[str, Seat, Where, int]] = {  # and how many rows the first block ran
    "the head alone": ("bert-cls", U, HEAD, 12),
    "the tail and the head": ("modernbert-cls", U, TAIL, 12),
    "no tail": ("gpt2-cls", Seat(Cut(2, 0)), HEAD, 12),
    "the last of two": ("llama-cls", Seat(Cut(1, 2)), Where(last=1), 12),
    "next tokens": ("gpt2", U, TAIL, 12),
    "a batch in parts": ("bert-cls", replace(U, accumulate=2), HEAD, 12),
    "the head far": ("llama-cls", V, HEAD, 12),
}


@pytest.mark.parametrize("name", BEHIND)
def test_later_epochs_begin_behind_the_trunk_if_training_does(name: str) -> None:
    family, seat, where, count = BEHIND[name]
    plain, every = trained(seat, where, 0, family=family)
    kept, some = trained(seat, where, ROOM, family=family)
    assert (sum(every), sum(some)) == (36, count)
    assert gap(kept, plain) <= 1e-6


@pytest.mark.parametrize("window", [1, 2])
def test_fronts_ahead_begin_where_they_did_and_parts_under_way_behind_it(window: int) -> None:
    seat = replace(U, accumulate=window)
    for ahead in (False, True):
        plain, _ = trained(seat, TAIL, 0, ahead=ahead, window=window)
        kept, _ = trained(seat, TAIL, ROOM, ahead=ahead, window=window)
        assert gap(kept, plain) <= 1e-6


@pytest.mark.parametrize(("ahead", "window"), [(True, 1), (False, 2), (True, 2)])
def test_parts_under_way_and_fronts_ahead_share_it(ahead: bool, window: int) -> None:
    seat = replace(U, accumulate=window)
    plain, _ = trained(seat, LAST, 0, ahead=ahead, window=window)
    kept, rows = trained(seat, LAST, ROOM, ahead=ahead, window=window)
    assert sum(rows) == 12
    assert gap(kept, plain) <= 1e-6


@pytest.mark.parametrize(
    ("where", "kind"),
    [(ALL, Lora(rank=3)), (LAST, Lora(rank=3, dropout=0.3))],
    ids=["all trains", "dropout in front"],
)
def test_nothing_is_kept_behind_what_moves_or_drops(where: Where, kind: Kind) -> None:
    plain, kept = (trained(U, where, cache, kind=kind) for cache in (0, ROOM))
    assert plain[1] == kept[1]
    assert same(plain[0], kept[0])


# ---- what changes below


def batch(desk: Desk) -> Batch:
    return toy_task(desk.model.backbone).collate(examples(1, 5), range(5))


def step(desk: Desk, where: Where = LAST) -> None:
    desk.fit(train=where, batches=iter([batch(desk)]))


def doubled(desk: Desk) -> None:
    desk.assign("personal", (Term("personal", 2.0),), where=FRONT)


def put(desk: Desk) -> None:
    desk.model.near.put("personal", {k: v + 0.1 for k, v in desk.model.near["personal"].items()})


def behind(desk: Desk) -> None:
    desk.assign("personal", (Term("personal", 2.0),), where=LAST)


def put_back(desk: Desk) -> None:
    desk.model.near.put("personal", desk.model.near["personal"])


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (doubled, True),
        (put, True),
        (lambda desk: step(desk, ALL), True),
        (behind, False),
        (put_back, False),
        (step, False),
    ],
    ids=["assigned", "put", "stepped", "behind it", "the same values", "the last block stepped"],
)
def test_what_changes_in_front_empties_it(change: Any, again: bool) -> None:
    left: list[Tensors] = []
    for cache in (0, ROOM):
        body = backbone()
        with at_desk(body, U, kind=Lora(rank=3), optim=SGD, cache=cache) as (desk, _):
            step(desk, ALL)  # so that the products are not zero
            step(desk)
            change(desk)
            with watched(body) as rows:
                step(desk)
            assert sum(rows) == (5 if again or not cache else 0)
            left.append(desk.whole())
    assert gap(*left) <= 1e-6


def crossings(change: Any, seat: Seat = U) -> tuple[int, int]:
    """How many rows went up in a step that follows one like it and a change."""
    rows = [0, 0]
    with at_desk(backbone(), seat, kind=Lora(rank=3), optim=SGD, cache=ROOM) as (desk, ledger):
        step(desk, ALL)  # so that the products are not zero
        for n in range(2):
            before = ledger.kinds.get(("up", "hidden"), 0)
            step(desk, HEAD)
            rows[n] = (ledger.kinds.get(("up", "hidden"), 0) - before) // (9 * 32 * 4)
            change(desk)
    return rows[0], rows[1]


def far_doubled(desk: Desk) -> None:
    desk.assign("personal", (Term("personal", 2.0),), where=FAR)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda _: None, 0),
        (far_doubled, 5),
        (lambda desk: step(desk, FAR), 5),
        (lambda desk: step(desk, HEAD), 0),
        (doubled, 5),
        (lambda desk: prefix(desk).end_turn(), 5),
    ],
    ids=["nothing", "the trunk set", "the trunk stepped", "the head", "the front", "a new turn"],
)
def test_what_changes_at_the_server_empties_it(change: Any, again: int) -> None:
    assert crossings(change) == (5, again)


def test_another_turn_knows_nothing_of_the_trunk_in_this_one() -> None:
    """Its numbers begin anew, so they may be the same; a turn that failed never ended."""
    with at_desk(backbone(), U, kind=Lora(rank=3), optim=SGD, cache=ROOM) as (desk, ledger):
        step(desk, HEAD)
        desk.model.turn = object()
        before = ledger.sent
        step(desk, HEAD)
        assert ledger.sent > before


def test_every_wear_has_its_own() -> None:
    body = backbone()
    with at_desk(body, U, kind=Lora(rank=3), optim=SGD, cache=ROOM) as (desk, _):
        desk.assign("other@tmp", (Term("personal", 2.0),))
        with watched(body) as rows:
            for wear in ("personal", "other@tmp") * 2:
                with desk.model.training({"personal": LAST}, None):
                    desk.model.loss(batch(desk), wear)
        assert rows == [5, 5]


def test_rows_that_wear_different_things_and_learned_mixes_are_computed() -> None:
    body = backbone()
    with at_desk(body, U, kind=Lora(rank=3), cache=ROOM) as (desk, _):
        learned = (Term("personal", torch.ones((), requires_grad=True)),)
        for wear in (PerRow(("personal",), (0,) * 5), learned):
            with desk.model.training({"personal": NOTHING}, None):
                desk.model.loss(batch(desk), wear)
        assert prefix(desk).bytes == 0


def test_only_training_fills_it() -> None:
    with at_desk(backbone(), U, kind=Lora(rank=3), cache=ROOM) as (desk, _):
        desk.score(split="train")
        desk.model.logits(batch(desk))
        with desk.model.training({"personal": LAST}, None), torch.no_grad():
            desk.model.loss(batch(desk))
        assert prefix(desk).bytes == 0
        step(desk)
        assert prefix(desk).bytes > 0


def prefix(desk: Desk) -> Prefix:
    assert desk.model.prefix is not None
    return desk.model.prefix


# ---- how much, and how long


def test_the_budget_is_kept_and_padding_takes_none_of_it() -> None:
    plain, _ = trained(U, LAST, 0)
    with at_desk(backbone(), U, kind=Lora(rank=3), optim=SGD, cache=ROOM) as (desk, _):
        desk.fit(train=LAST, batches=desk.batches(epochs=1, size=5))
        (shelf,) = prefix(desk).shelves.values()
        lengths = sorted(len(state) for _, state in shelf.rows.values())
        assert lengths == sorted(9 - n % 3 for n in range(12))
        assert prefix(desk).bytes == sum(n * (32 * 4 + 16) for n in lengths)
        room = prefix(desk).bytes // 2
    half, rows = trained(U, LAST, room)
    assert 12 < sum(rows) < 36  # some rows are computed three times
    assert gap(half, plain) <= 1e-6
    with at_desk(backbone(), U, kind=Lora(rank=3), cache=room) as (desk, _):
        desk.fit(train=LAST, batches=desk.batches(epochs=2, size=5))
        assert 0 < prefix(desk).bytes <= room


def frozen(cache: int) -> tuple[dict[str, Tensors], list[int]]:
    body, how = backbone(), Training(SGD, batch=4, epochs=1, cache=cache)
    with watched(body) as rows:
        left = play(FlexP(front="frozen"), U, rounds=3, training=how, body=body, seeds=(1, 2))
    return left.adapters, rows


def test_it_stays_from_turn_to_turn_while_nothing_in_front_changes() -> None:
    (plain, every), (kept, some) = frozen(0), frozen(ROOM)
    assert (sum(every), sum(some)) == (2 * 3 * 12, 2 * 12)
    assert all(gap(adapter, kept[client]) <= 1e-6 for client, adapter in plain.items())


def test_what_a_turn_does_not_use_goes_at_its_end() -> None:
    with at_desk(backbone(), U, kind=Lora(rank=3), cache=ROOM) as (desk, _):
        step(desk)
        prefix(desk).end_turn()
        assert prefix(desk).bytes > 0
        prefix(desk).end_turn()
        assert prefix(desk).bytes == 0


# ---- recipe and plan


def recipe(cache: int | str) -> Recipe:
    return recipe_file.make({"mode": "fast", "train": {"cache": cache}})


def test_exact_mode_keeps_nothing_and_sizes_are_read() -> None:
    assert training(recipe(0)).cache == 0
    assert training(recipe("64MB")).cache == 64_000_000
    with pytest.raises(PlanError, match=r"train\.cache.*not a size"):
        training(recipe("much"))
    with pytest.raises(RecipeError, match="other last bits"):
        recipe_file.make({"train": {"cache": "64MB"}})


# ---- rows that the server keeps


class Nothing(dict[int, int]):
    """What a client knows of sent rows that never names one."""

    def get(self, _: int, otherwise: Any = None) -> Any:
        return otherwise


def crossed(seat: Seat, what: str, *, ahead: bool = False, window: int = 1) -> tuple[Tensors, int]:
    """The adapter after three epochs, and how many rows of hidden states went up."""
    body, optim = backbone(), replace(SGD, momentum=0.9)
    how: dict[str, Any] = {"kind": Lora(rank=3), "optim": optim, "cache": ROOM}
    with at_desk(body, seat, keep_crossings=True, **how) as (desk, ledger):
        rows = server_of(desk).pending.rows
        rows.each = 0 if what == "never kept" else ROOM
        desk.session.there = Nothing() if what == "never named" else {}

        def batches() -> Generator[Batch]:
            for n, each in enumerate(desk.batches(epochs=3, size=5)):
                if n == 4 and what == "lost":
                    rows.drop("me")
                yield each

        desk.training = replace(desk.training, ahead=ahead)
        with posting(desk, window) if window > 1 or ahead else nullcontext():
            desk.fit(train=FAR, batches=batches())
        up = [c for c in ledger.crossings or () if (c.way, c.name) == ("up", "hidden")]
        down = [c for c in ledger.crossings or () if (c.phase, c.way) == ("backward", "down")]
        assert not down  # nobody asks for a gradient at the front
        return desk.whole(), sum(c.shape[0] for c in up)


def server_of(desk: Desk) -> Trunk:
    link: Any = desk.session.link
    return link.inner.handle.__self__


@pytest.mark.parametrize(
    ("seat", "window", "ahead"), [(U, 1, False), (V, 1, True), (U, 2, False), (U, 2, True)]
)
def test_rows_cross_once_and_train_the_same_bits(seat: Seat, window: int, ahead: bool) -> None:
    seat = replace(seat, accumulate=window)
    ways = ("never named", "kept", "lost", "never kept")
    left = {what: crossed(seat, what, ahead=ahead, window=window) for what in ways}
    counts = {what: count for what, (_, count) in left.items()}
    assert (counts["never named"], counts["kept"], counts["never kept"]) == (36, 12, 36)
    assert 12 < counts["lost"] < 36
    assert all(same(left["never named"][0], adapter) for adapter, _ in left.values())
