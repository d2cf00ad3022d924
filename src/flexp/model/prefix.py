"""Hidden states in front of what trains, kept row by row: from epoch to epoch they are the same.

A row is known by its tokens or pixels, whoever made its batch. Computed in another batch it has
other last bits, so nothing is kept in exact mode. What the server's blocks gave is kept within a
turn, as long as nothing changes there.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flexp.model.slots import Slots
from flexp.selection import ALL, Where
from flexp.tensors import PerRow, Tensors, Wear, slots_of, terms

READ = ({"input_ids", "attention_mask"}, {"pixel_values"})  # the inputs that tell all of a row
DROPS = Where(names="*lora_*")  # what dropout, or a gate's noise, is in front of
Compute = Callable[[Mapping[str, Tensor], int], Tensor]  # rows up to a block


class Key(NamedTuple):
    """A row: its ids and its mask up to the last real position, and how many these are.

    Of an image a digest of its pixels, and no end.
    """

    length: int
    ids: bytes
    mask: bytes


@dataclass(frozen=True)
class Wearer:
    """What a forward wears, and what of it trains. ``drops``: there is dropout.

    What enters a block after ``front`` has been at the server; ``far`` tells by a token what a wear
    is there.
    """

    slots: Slots
    wear: Wear
    train: Mapping[str, Where]
    drops: bool = False
    front: int | None = None
    far: Callable[[Wear], object] = lambda wear: None

    def beginning(self, most: int) -> int:
        """The first block, at most ``most``, in which anything trains or drops at random.

        0 if rows wear different things, or weights of a mix are learned.
        """
        learned = any(isinstance(t.coef, Tensor) for t in terms(self.wear))
        if learned or isinstance(self.wear, PerRow):
            return 0
        place = self.slots.place
        for slot in slots_of(self.wear):
            moves = self.train.get(slot, ~ALL)
            moves = moves | DROPS if self.drops else moves
            for name in self.slots[slot]:
                at = place(name)
                if at.block < most and moves.holds(name, at):
                    most = at.block
        return most

    def below(self, block: int) -> dict[str, Tensors]:
        """What is worn in front of a block, by slot."""
        place = self.slots.place
        return {
            slot: {k: v for k, v in self.slots[slot].items() if place(k).block < block}
            for slot in slots_of(self.wear)
        }

    def token(self, block: int) -> object:
        """What is worn at the server in front of a block; None if that is nothing."""
        return self.far(self.wear) if self.front is not None and block > self.front else None


@dataclass
class Shelf:
    """Rows as they enter a block, and what was worn below it when they were computed."""

    below: dict[str, Tensors]
    far: object = None
    rows: dict[Key, tuple[int, Tensor]] = field(default_factory=dict[Key, tuple[int, Tensor]])
    bytes: int = 0
    used: bool = True  # in this turn

    def stays(self) -> bool:
        """Whether it is of use for another turn."""
        return self.used and self.far is None

    def fits(self, below: dict[str, Tensors], far: object) -> bool:
        """Whether that is worn still: the same tensors, or tensors that are equal to the bit."""
        same = self.far == far and self.below.keys() == below.keys()
        same = same and all(
            held.keys() == below[slot].keys()
            and all(v is below[slot][k] or torch.equal(v, below[slot][k]) for k, v in held.items())
            for slot, held in self.below.items()
        )
        self.below = below if same else self.below  # to be found the same at a glance
        return same


@dataclass(frozen=True)
class Entry:
    """Where a forward begins, and what enters the block there.

    ``rows`` are numbers of the rows that are kept, 0 of others. None is another row's, ever.
    """

    first: int
    feed: Tensor
    rows: tuple[int, ...]


@dataclass
class Prefix:
    """The rows that one client keeps, within a budget of bytes; others are computed as ever.

    Each wear and block has a shelf. It goes when anything that is worn below has changed, and at
    the end of a turn that did not use it.
    """

    budget: int
    shelves: dict[tuple[Wear, int], Shelf] = field(default_factory=dict[tuple[Wear, int], Shelf])
    newest: int = 0  # number of a row

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(shelf.bytes for shelf in self.shelves.values())

    def entry(
        self, worn: Wearer, inputs: Mapping[str, Tensor], most: int, compute: Compute
    ) -> Entry | None:
        """Where a forward that trains can begin, if that is not before the first block.

        ``compute`` gives rows that are not here. Padding is blank, which nobody looks at.
        """
        first = worn.beginning(most)
        learned = any(value.requires_grad for value in inputs.values())  # what is added to pixels
        if first < 1 or learned or set(inputs) not in READ:
            return None
        shelf, keys = self._shelf(worn, first), keys_of(inputs)
        states = {n: shelf.rows[key][1] for n, key in enumerate(keys) if key in shelf.rows}
        if lacking := [n for n in range(len(keys)) if n not in states]:
            with torch.no_grad():
                fresh = compute({k: v[lacking] for k, v in inputs.items()}, first)
            for n, state in zip(lacking, fresh, strict=True):
                states[n] = state[: keys[n].length]
                self._keep(shelf, keys[n], states[n])
        rows = tuple(shelf.rows[key][0] if key in shelf.rows else 0 for key in keys)
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else len(states[0])
        return Entry(first, filled(states, length), rows)

    def end_turn(self) -> None:
        """Drops what the turn did not use, and what the server's blocks gave."""
        self.shelves = {at: shelf for at, shelf in self.shelves.items() if shelf.stays()}
        for shelf in self.shelves.values():
            shelf.used = False

    def _shelf(self, worn: Wearer, block: int) -> Shelf:
        """The shelf of a wear and block, after all that no longer fit are gone."""
        wanted, there = (worn.wear, block), worn.slots.values
        for wear, at in [*self.shelves]:
            # A slot that nobody has asked for in this turn may be on its way.
            known = (wear, at) == wanted or all(slot in there for slot in slots_of(wear))
            other = replace(worn, wear=wear)
            if known and not self.shelves[wear, at].fits(other.below(at), other.token(at)):
                del self.shelves[wear, at]
        if wanted not in self.shelves:
            self.shelves[wanted] = Shelf(worn.below(block), worn.token(block))
        self.shelves[wanted].used = True
        return self.shelves[wanted]

    def _keep(self, shelf: Shelf, key: Key, state: Tensor) -> None:
        size = state.nbytes + len(key.ids) + len(key.mask)
        if key not in shelf.rows and self.bytes + size <= self.budget:
            self.newest += 1
            shelf.rows[key] = self.newest, state.clone()
            shelf.bytes += size


def keys_of(inputs: Mapping[str, Tensor]) -> list[Key]:
    """The keys of a batch's rows."""
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].detach().cpu()
        digests = (hashlib.sha256(one.numpy().tobytes()).digest() for one in pixels)
        return [Key(sys.maxsize, digest, b"") for digest in digests]
    ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu()
    return [
        Key(end, ids[n, :end].numpy().tobytes(), mask[n, :end].numpy().tobytes())
        for n, end in enumerate(ends_of(mask))
    ]


def ends_of(mask: Tensor) -> list[int]:
    """Where each row's last real position ends."""
    count = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return [int(end) for end in ((mask != 0) * count).amax(1)]


def filled(states: Mapping[int, Tensor], length: int) -> Tensor:
    """Rows by number, [its length, ...] each, as a batch [rows, length, ...], else blank."""
    out = states[0].new_zeros(len(states), length, *states[0].shape[1:])
    for n, state in states.items():
        out[n, : len(state)] = state
    return out
