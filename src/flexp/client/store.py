"""A client's memory on its own disk: one file per turn that counted, so that it can go back."""

from __future__ import annotations

import re
from pathlib import Path

from flexp.client.memory import Memory
from flexp.errors import CheckpointError
from flexp.parcel import Parcel, load, save, sweep

_TURN = re.compile(r"(0\d{5}|[1-9]\d{5,17})\.parcel", re.ASCII)


class StoredMemory(Memory):
    """What a client keeps after each of its turns, in ``folder/NNNNNN.parcel``.

    It is on disk before the server hears that the turn is over, so that the two never disagree:
    the server says how many turns count, and the client goes on from that one.
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

        CheckpointError if that is not there.
        """
        if turns < 0 or (turns and turns not in self.held()):
            known = ", ".join(map(str, self.held())) or "none"
            raise CheckpointError(
                f"The server goes on after turn {turns} of this client, but {self.folder} has "
                f"{known}. Join with the folder that the client had, or under another name."
            )
        kept = load(self._path(turns)) if turns else Parcel()
        self.slots = {slot: dict(held) for slot, held in kept.adapters.items()}
        self.facts = dict(kept.facts)
        self.turns = turns - 1  # so that commit counts up to it
        self.commit()
        for old in self.held():
            if old < min(floor, turns):
                self._path(old).unlink()

    def settle(self) -> None:
        """Writes how it is now as the next turn."""
        save(self._path(self.turns + 1), Parcel(self.slots, facts=self.facts))

    def commit(self) -> None:
        """Makes the changes of this turn count."""
        super().commit()
        self.turns += 1

    def _path(self, turns: int) -> Path:
        return self.folder / f"{turns:06d}.parcel"
