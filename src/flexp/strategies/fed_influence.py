"""Fed-Influence (Xue et al., 2021, arXiv 2012.10936): what would be without one of the clients.

It observes a method whose merge is a mean, theta <- sum_k p_k theta_k, and changes nothing of it.
e_c stands for theta as trained without client c, less theta. It is 0 at first, and in each round

    e_c <- sum_(k != c) p_k / (1 - p_c) J_k e_c  +  p_c / (1 - p_c) (theta - theta_c)

where p_c is 0 of who does not take part, and J_k is the derivative of client k's turn. Modes:

    hvp    J_k e_c by trying the turn again from ahead and behind: for SGD prod_s (I - eta H_s)
    hvp1   (I - K eta H) e_c, H where the turn begins
    diag   (1 - eta h)^K, h the diagonal of the Fisher information, which clients hand in
    none   1

In hvp and hvp1 the server offers e_c and gets J_k e_c back; products with H are differences, which
work at any cut. In hvp a turn is all that the method does in one, clipping and alignment too, and
each watched client costs two more turns of everybody, when training without it costs one. In hvp1
and diag a turn is K plain SGD steps on the task's loss.

Reconstruction from the abstract: the recursion, hvp by differences, h from squared slopes where a
turn begins, 1 - eta h kept at 0 or more, and the check by block. What of a client's adapter is its
own counts as what it is, and so does what else is offered of theta, as flexp's reference. A tensor
that c alone trains in a round stays behind without c. `flexp influence` tells what e_c does to the
test loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

from pydantic import PositiveFloat, PositiveInt

from flexp.client.desk import Desk
from flexp.dice import Dice
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.strategies import slopes
from flexp.strategies.base import ClientId, Scene, Setting, Turn
from flexp.strategies.left_out import Carry, Mean, moved, unchanged, within
from flexp.strategies.observer import Observer
from flexp.tensors import Tensors, Term, add, scale

CURVE = "curve"


@dataclass(frozen=True)
class Watched:
    """The observed method's state, where it began, e_c by client, and how many turns each had."""

    of: Tensors
    begun: Tensors
    shifts: Mapping[ClientId, Tensors]
    turns: Mapping[ClientId, int]


@dataclass(frozen=True)
class FedInfluence(Observer[Watched]):
    """Follows what a method that averages would have learned without each of its clients.

    ``of`` is that method's name, or a mapping with its name and options. ``watch`` are the clients
    that may be missed (none: all; hvp and hvp1 need names). ``reach`` is how far along e_c
    differences look. ``rows`` are those of a squared slope. By block, e_c is at most ``most`` times
    as long as theta's way from the beginning, and ``growth`` times as it was a round before (None:
    no bound).
    """

    mode: Literal["hvp", "hvp1", "diag", "none"] = "diag"
    watch: tuple[str, ...] = ()
    reach: PositiveFloat = 0.125
    rows: PositiveInt = 1
    most: PositiveFloat | None = None
    growth: PositiveFloat | None = None

    name: ClassVar[str] = "fed_influence"
    paper: ClassVar[str] = "Xue et al. 2021, arXiv 2012.10936"
    reconstruction: ClassVar[str] = "recursion, modes and the check by block, from the abstract"
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave(CURVE, why="mode diag: the server carries e_c on with it"),
        Leave("shift/*", why="modes hvp and hvp1: e_c as the client's turn carries it on"),
    )

    def refuses(self, setting: Setting) -> str:
        how, names = setting.training, ", ".join(setting.seats)
        plain = how.optim.name == "sgd" and not how.optim.momentum
        whole = plain and not how.optim.weight_decay and how.clip_norm is None
        asks = self.mode in ("hvp", "hvp1")
        if set(self.watch) - setting.seats.keys() or (asks and not self.watch):
            return (
                f"mode {self.mode} needs names of clients in strategy.watch, from these: {names}."
            )
        if not {"none": True, "hvp": plain}.get(self.mode, whole):
            return (
                f"mode {self.mode} derives SGD steps. Set train.optimizer=sgd without momentum, "
                "and but for hvp without weight_decay and clip_norm. Or set strategy.mode=none."
            )
        return super().refuses(setting)

    def slots_by_client(self) -> dict[ClientId, str]:
        """The slots of those whom desks are asked about."""
        return {c: f"shift/{n}" for n, c in enumerate(self.watch)}

    def beside(self) -> tuple[str, ...]:
        own = {"none": (), "diag": (CURVE,)}.get(self.mode, tuple(self.slots_by_client().values()))
        return (*own, *slopes.SLOTS) if own else ()

    def leaving(self) -> tuple[Leave, ...]:
        own = {"none": self.leaves[:0], "diag": self.leaves[:1]}.get(self.mode, self.leaves[1:])
        part = self.observed.averages()
        return (*super().leaving(), *(replace(leave, where=part) for leave in own))

    def start(self, scene: Scene) -> Watched:
        begun = scene.initial(self.observed.specs()["personal"])
        shifts = {c: scale(begun, 0.0) for c in self.watch or scene.clients}
        return Watched(self.observed.start(scene), begun, shifts, dict.fromkeys(shifts, 0))

    def waves(
        self, state: Watched, chosen: Sequence[ClientId], dice: Dice
    ) -> Sequence[Sequence[ClientId]]:
        return self.observed.waves(state.of, chosen, dice)

    def offer(self, state: Watched, client: ClientId, turn: Turn) -> Parcel:
        parcel, part = self.observed.offer(state.of, client, turn), self.observed.averages()
        asks = self.mode in ("hvp", "hvp1")
        slots = self.slots_by_client() if asks else {}
        shifts = {s: turn.select(client, state.shifts[c], part) for c, s in slots.items()}
        asked = {slot: e for slot, e in shifts.items() if moved(e)}  # of 0 nothing comes
        facts = {**parcel.facts, "shifts": list(asked)}
        return replace(parcel, adapters={**parcel.adapters, **asked}, facts=facts)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if self.mode == "none":
            return self.observed.train(desk, offer)
        desk.assign(slopes.BEGUN, (Term("personal"),))
        reply = self.observed.train(desk, offer)
        with slopes.beside(desk):
            answers = self.answers(desk, offer, steps_of(reply))
        more = desk.reply(where=dict.fromkeys(answers, self.observed.averages()))
        adapters = {**reply.adapters, **more.adapters}
        return replace(reply, adapters=adapters, far={**reply.far, **more.far})

    def answers(self, desk: Desk, offer: Parcel, steps: int) -> list[str]:
        """The slots with what the server wants to know of this turn."""
        part, told = self.observed.averages(), cast("Any", offer.facts)
        trains = part & self.observed.moving()
        if self.mode == "diag":
            slopes.bent(desk, CURVE, self.rows, trains)
            return [CURVE]
        for name in told["shifts"]:
            desk.assign(name, (Term(name, 0.0),), where=~part)
            if self.mode == "hvp":
                slopes.turned(desk, name, self.reach, partial(self.observed.train, desk, offer))
            else:
                slopes.turned_at_once(desk, name, self.reach, steps, trains)
        return list(told["shifts"])

    def merge(self, state: Watched, replies: Mapping[ClientId, Parcel], turn: Turn) -> Watched:
        # The server has seen the rows of what was tried beside turns, too.
        rows = {c: int(n) for c, n in zip(replies, turn.told(replies), strict=True)}
        turn, part = replace(turn, rows=rows), self.observed.averages()
        after = self.observed.merge(state.of, replies, turn)
        trained = {c: turn.select(c, r.adapters["personal"], part) for c, r in replies.items()}
        weights = dict(zip(replies, turn.weights(list(replies)), strict=True))
        mean = Mean(trained, weights, {**state.begun, **state.of}, {**state.begun, **after})
        carry, way = self.carry(mean, replies), add(mean.after, state.begun, -1.0)
        shifts = {c: mean.without(c, e, carry) for c, e in state.shifts.items()}
        for c, e in shifts.items():
            growth = self.growth if moved(state.shifts[c]) else None
            grown = within(e, state.shifts[c], growth, turn.block_of)
            shifts[c] = within(grown, way, self.most, turn.block_of)
        turns = {c: n + (c in replies) for c, n in state.turns.items()}
        return Watched(after, state.begun, shifts, turns)

    def carry(self, mean: Mean, replies: Mapping[ClientId, Parcel]) -> Carry:
        """How turns carry e_c on: J_k e_c, in the mean over all but c."""
        if self.mode == "none":
            return unchanged
        if self.mode == "diag":
            left = {c: r.adapters[CURVE] for c, r in replies.items()}
            return mean.scaled({c: powered(v, steps_of(replies[c])) for c, v in left.items()})
        slots = self.slots_by_client()
        told = {
            client: {c: r.adapters[slot] for c, r in replies.items() if slot in r.adapters}
            for client, slot in slots.items()
        }
        return mean.answered(told)

    def without(self, state: Watched, client: ClientId, times: float = 1.0) -> Watched:
        """The state as it would be without a client, or so much of the way there."""
        shift = state.shifts[client]
        return replace(state, of={k: v + times * shift[k] for k, v in state.of.items()})


def powered(curve: Tensors, steps: int) -> Tensors:
    """(1 - eta h)^K, of what does not overshoot."""
    return {k: (1.0 - v).clamp(min=0.0) ** steps for k, v in curve.items()}


def steps_of(reply: Parcel) -> int:
    """The steps that a client took in its turn."""
    told: Any = reply.facts
    return int(told["steps"]) - int(told["skipped"])
