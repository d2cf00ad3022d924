"""Rows of several clients in one forward: each gets on before its own block and off after it.

The frozen products are made once for all rows that are there; what each client wears is its own.
Of what a model hands to a block, some has a row for each of the batch (masks, positions): a probe
with two and with three rows finds out what, and only the rows that are there go in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from flexp.model.worn import Group, Groups, Worn

Path = tuple[int | str, ...]  # to a tensor among the arguments of a block
Rowwise = Mapping[int, frozenset[Path]]  # by block


@dataclass(frozen=True)
class Member:
    """One client's rows: blocks ``first`` to ``last``, fed with ``feed`` [rows, length, width]."""

    first: int
    last: int
    feed: Tensor
    worn: Worn


class Joint:
    """One forward of several members. ``out`` has the hidden state of each at its last block."""

    def __init__(self, members: Sequence[Member], rowwise: Rowwise) -> None:
        self.members, self.rowwise = members, rowwise
        self.length = max(m.feed.shape[1] for m in members)
        self.out: list[Tensor | None] = [None] * len(members)
        self.worn: Worn | None = None
        ends = [0]
        for member in members:
            ends.append(ends[-1] + len(member.feed))
        self._rows = [range(a, b) for a, b in pairwise(ends)]  # of all
        self._aboard: list[int] = []
        self._index: Tensor | None = None  # of the rows that are there, unless all are

    def arrives(self, block: int, hidden: Tensor) -> Tensor | None:
        """Lets members off and on before a block; the rows that it is to run, if there are any."""
        off = [n for n in self._aboard if self.members[n].last == block]
        on = [
            n
            for n, m in enumerate(self.members)
            if m.first == block and m.last > block and n not in self._aboard
        ]
        if not off and not on:
            return hidden if self._aboard else None
        parts = self._parts(hidden)
        for n in off:
            self._ends(n, parts.pop(n))
        for n in on:
            feed = self.members[n].feed
            parts[n] = functional.pad(feed, (0, 0, 0, self.length - feed.shape[1]))
        self._aboard = sorted(parts)
        self._dress()
        if not parts:
            return None
        return torch.cat([parts[n] for n in self._aboard])

    def over(self, hidden: Tensor) -> None:
        """Lets off who stays until after the last block."""
        for n, part in self._parts(hidden).items():
            self._ends(n, part)
        self._aboard = []

    @property
    def done(self) -> bool:
        """Whether all have been where they go."""
        return all(out is not None for out in self.out)

    def sliced(
        self, block: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block for the rows that are there."""
        index, paths = self._index, self.rowwise[block]
        if index is None:
            return args, dict(kwargs)

        def cut(path: Path, value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.index_select(0, index) if path in paths else value
            if isinstance(value, tuple | list):
                items = cast("Sequence[Any]", value)
                parts = [cut((*path, n), v) for n, v in enumerate(items)]
                return tuple(parts) if isinstance(value, tuple) else parts
            return value

        return (
            tuple(cut((n,), v) for n, v in enumerate(args)),
            {k: cut((k,), v) for k, v in kwargs.items()},
        )

    def _parts(self, hidden: Tensor) -> dict[int, Tensor]:
        """The rows that are there, by member."""
        if not self._aboard:
            return {}
        sizes = [len(self._rows[n]) for n in self._aboard]
        return dict(zip(self._aboard, torch.split_with_sizes(hidden, sizes), strict=True))

    def _ends(self, n: int, hidden: Tensor) -> None:
        self.out[n] = hidden[:, : self.members[n].feed.shape[1]]

    def _dress(self) -> None:
        groups, at = list[Group](), 0
        for n in self._aboard:
            rows, member = len(self._rows[n]), self.members[n]
            groups.append(Group(member.worn, torch.arange(at, at + rows), member.feed.shape[1]))
            at += rows
        self.worn = Worn(groups=Groups.made(groups)) if groups else None
        whole = len(self._aboard) == len(self.members)
        rows = [row for n in self._aboard for row in self._rows[n]]
        self._index = None if whole else torch.tensor(rows, dtype=torch.long)


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor among the arguments of a block but the hidden state, with its path."""

    def walk(path: Path, value: Any) -> Iterator[tuple[Path, Tensor]]:
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, tuple | list):
            for n, each in enumerate(cast("Sequence[Any]", value)):
                yield from walk((*path, n), each)

    for n, value in enumerate(args):
        if n:
            yield from walk((n,), value)
    for name, value in kwargs.items():
        if name != "hidden_states":
            yield from walk((name,), value)


def following(seen: Callable[[int, bool], Mapping[int, Mapping[Path, int]]]) -> Rowwise:
    """Paths whose first dimension follows the rows, by block.

    ``seen`` gives the first dimension of all tensors for so many rows, with or without padding.
    """
    found: dict[int, set[Path]] = {}
    for padded in (False, True):
        two, three = seen(2, padded), seen(3, padded)
        for block, paths in two.items():
            mine = found.setdefault(block, set())
            mine |= {p for p, n in paths.items() if n == 2 and three[block].get(p) == 3}
    return {block: frozenset(paths) for block, paths in found.items()}
