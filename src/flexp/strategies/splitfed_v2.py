"""SplitFed v2 (Thapa et al., 2022, arXiv 2004.12088): one server net, client after client.

Round: in random order, each client trains its front from w_C, together with the one server net,
which goes on from where the client before left it;  at the end  w_C <- sum_i p_i w_C,i.
The server net keeps one optimizer for the run (public code makes a new one per batch: a slip). With
cuts of several depths a tensor is averaged over those who have it near.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.dice import Dice
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import NEAR
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean_by_name


@dataclass(frozen=True)
class Fronts:
    """The averaged fronts, and those that have come in since with their rows.

    ``count`` averages were made so far, and client c has had those up to ``had[c]``. ``rank`` is
    that of clients whose seats name none, where ranks may differ, and ``worth`` what matrices are
    allotted theirs by.
    """

    common: Tensors
    count: int = 0
    had: Mapping[ClientId, int] = field(default_factory=dict[ClientId, int])
    arrived: Mapping[ClientId, Tensors] = field(default_factory=dict[ClientId, Tensors])
    rows: Mapping[ClientId, float] = field(default_factory=dict[ClientId, float])
    rank: int = 0
    worth: Mapping[str, float] = field(default_factory=dict[str, float])

    def in_order(self) -> tuple[list[Tensors], list[float]]:
        """What has come in and its rows, in order of clients."""
        order = sorted(self.arrived)
        return [self.arrived[c] for c in order], [self.rows[c] for c in order]

    def renewed(self, common: Tensors) -> Fronts:
        """With another average, from when on others come in."""
        return replace(self, common=common, count=self.count + 1, arrived={}, rows={})


@dataclass(frozen=True)
class SplitFedV2(Strategy[Fronts]):
    """One server net, trained by client after client; fronts are averaged after each round."""

    name: ClassVar[str] = "splitfed_v2"
    paper: ClassVar[str] = "Thapa et al. 2022, arXiv 2004.12088"
    kind: ClassVar[MethodKind] = "split"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(home="server", moments="keep")}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", NEAR, why="fronts are averaged"),)

    def start(self, scene: Scene) -> Fronts:
        return Fronts(scene.initial(self.slots["personal"]))

    def waves(
        self, state: Fronts, chosen: Sequence[ClientId], dice: Dice
    ) -> Sequence[Sequence[ClientId]]:
        return [[client] for client in drawn(chosen, dice)]

    def offer(self, state: Fronts, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": turn.select(client, state.common, NEAR)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        return desk.reply("personal", where=NEAR, facts=facts)

    def merge(self, state: Fronts, replies: Mapping[ClientId, Parcel], turn: Turn) -> Fronts:
        arrived = {c: reply.adapters["personal"] for c, reply in replies.items()}
        rows = dict(zip(replies, turn.weights(list(replies)), strict=True))
        state = replace(
            state,
            arrived={**state.arrived, **arrived},
            rows={**state.rows, **rows},
            had={**state.had, **dict.fromkeys(replies, state.count)},
        )
        return self.averaged(state) if turn.last_wave and self.due(turn.round) else state

    def averaged(self, state: Fronts) -> Fronts:
        """The mean of the fronts that have come in; tensors without any stay."""
        return state.renewed({**state.common, **mean_by_name(*state.in_order())})

    def due(self, round: int) -> bool:
        """Whether fronts are averaged at the end of this round."""
        return True


def drawn(chosen: Sequence[ClientId], dice: Dice) -> list[ClientId]:
    """Clients in a random order that does not depend on the order in which they are given."""
    numbers = {client: float(dice("order", client=client).uniform()) for client in chosen}
    return sorted(chosen, key=lambda c: (numbers[c], c))
