"""Batches of texts about as long: every row once per pass, less padding, chance left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
import toys

from flexp.data.examples import WINDOW, Batch, Examples, Shard, grouped
from flexp.dice import Dice
from flexp.model.cut import Cut, Seat


def padded(order: list[int], lengths: list[int], size: int) -> int:
    """Tokens of all batches, each as long as its longest row."""
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    return sum(len(some) * max(lengths[row] for row in some) for some in batches)


@pytest.mark.parametrize(("rows", "begun"), [(100, 0), (101, 0), (101, 3), (3, 2), (1, 0), (0, 0)])
def test_every_row_comes_once(rows: int, begun: int) -> None:
    order = Dice(1)("o").shuffle(rows)
    lengths = [1 + 7 * n % 40 for n in range(rows)]
    found = grouped(order, lengths, 4, Dice(1)("g"), begun=begun)
    assert sorted(found) == list(range(rows))
    assert list(found[: -begun % 4]) == list(order[: -begun % 4])  # they fill up what was begun


def test_less_is_padding() -> None:
    lengths = [1 + 13 * n % 61 for n in range(400)]
    order = list(Dice(2)("o").shuffle(400))
    found = grouped(order, lengths, 4, Dice(2)("g"))
    assert padded(found, lengths, 4) < 1.15 * sum(lengths) < padded(order, lengths, 4) / 1.3


def test_chance_decides_whom_a_row_meets_and_when() -> None:
    """Other dice, other batches and another order of lengths; the same dice, the same."""
    lengths = [n for n in range(400)]  # noqa: C416 each row as long as its number
    one, again, other = (
        grouped(Dice(seed)("o").shuffle(400), lengths, 4, Dice(seed)("g")) for seed in (3, 3, 4)
    )
    assert one == again

    def batches(order: list[int]) -> set[frozenset[int]]:
        return {frozenset(order[at : at + 4]) for at in range(0, 400, 4)}

    assert len(batches(one) & batches(other)) < 10
    longest = [max(one[at : at + 4]) for at in range(0, 4 * WINDOW, 4)]
    assert longest != sorted(longest)


@pytest.mark.parametrize("how", [{"steps": 12}, {"epochs": 2}])
def test_a_desk_groups_if_asked(how: Any) -> None:
    """Over repeated passes a batch that the end of one began is filled up by the next."""
    body = toys.backbone()
    lengths = [2 + 5 * n % 8 for n in range(18)]
    texts = Examples(
        tuple(tuple(range(1, 1 + n)) for n in lengths), (0,) * 18, tuple(map(str, range(18)))
    )
    seen: dict[bool, list[int]] = {}
    for asked in (False, True):
        with toys.at_desk(body, Seat(Cut(1, 1))) as (desk, _):
            desk.training = replace(desk.training, group_by_length=asked)
            desk.shard, desk.task = Shard(texts), Padding()
            found = [b.inputs["input_ids"] for b in islice(desk.batches(**how), 20)]
        seen[asked] = [x.numel() for x in found]
        assert len(found) == (12 if "steps" in how else 10)
        used = sorted(int(n) for x in found for n in (x > 0).sum(1))
        if "epochs" in how:
            assert used == sorted(lengths * 2)
    assert sum(seen[True]) < sum(seen[False])


class Padding(toys.ToyTask):
    """Pads to the longest of a batch."""

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        rows = [examples.ids[n] for n in indices]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
        return Batch({"input_ids": ids}, torch.zeros(len(rows), dtype=torch.int64))
