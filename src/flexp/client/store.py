"""A client's memory on its own disk: one file per turn that counted, so that it can go back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from flexp.client.memory import Memory
from flexp.errors import CheckpointError, ParcelError
from flexp.parcel import JSON, Parcel, encode, load, save, sweep
from flexp.tensors import Tensors

_TURN = re.compile(r"(0\d{5}|[1-9]\d{5,17})\.parcel", re.ASCII)


class StoredMemory(Memory):
    """What a client keeps after each of its turns, in ``folder/NNNNNN.parcel``.

    It is on disk before the server hears that the turn is over, so that the two never disagree:
    the server says how many turns count, and the client goes on from that one. Each file has the
    number of its turn and a digest of the rest.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.turns = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)

    def held(self) -> tuple[int, ...]:
        """The turns that can be gone on from, besides the beginning."""
        names = [p.name for p in self.folder.iterdir()]
        return tuple(sorted(int(found[1]) for name in names if (found := _TURN.fullmatch(name))))

    def open(self, turns: int, floor: int = 0) -> None:
        """Goes to how it was after so many turns; what is older than ``floor`` is not kept.

        CheckpointError if that is not there, or not as it was written.
        """
        if turns < 0 or (turns and turns not in self.held()):
            known = ", ".join(map(str, self.held())) or "none"
            raise CheckpointError(
                f"The server goes on after turn {turns} of this client, but {self.folder} has "
                f"{known}. Join with the folder that the client had, or under another name."
            )
        kept = self._kept(turns) if turns else Parcel()
        self.slots = {slot: dict(held) for slot, held in kept.adapters.items()}
        self.facts = dict(kept.facts)
        self.turns = turns - 1  # so that commit counts up to it
        self.commit()
        for old in self.held():
            if old < min(floor, turns):
                self._path(old).unlink()

    def settle(self) -> None:
        """Writes how it is now as the next turn."""
        turn = self.turns + 1
        facts = {"turn": turn, "facts": self.facts, "digest": _digest(self.slots, self.facts)}
        save(self._path(turn), Parcel(self.slots, facts=facts))

    def commit(self) -> None:
        """Makes the changes of this turn count."""
        super().commit()
        self.turns += 1

    def _kept(self, turns: int) -> Parcel:
        path = self._path(turns)
        try:
            found = load(path)
            facts = cast("dict[str, Any]", found.facts)
            if facts.keys() != {"turn", "facts", "digest"} or not isinstance(facts["facts"], dict):
                raise ParcelError("It is no turn as this version writes them.")
            kept = Parcel(found.adapters, facts=cast("dict[str, JSON]", facts["facts"]))
            if facts["turn"] != turns or facts["digest"] != _digest(kept.adapters, kept.facts):
                raise ParcelError("It was changed or damaged, or is another turn's.")
        except ParcelError as problem:
            raise CheckpointError(
                f"{path} cannot be gone on from: {problem} Put this client's folder back from a "
                "backup, or join under another name with another folder."
            ) from problem
        return kept

    def _path(self, turns: int) -> Path:
        return self.folder / f"{turns:06d}.parcel"


def _digest(slots: Mapping[str, Tensors], facts: Mapping[str, JSON]) -> str:
    return hashlib.sha256(encode(Parcel(slots, facts=facts))).hexdigest()
