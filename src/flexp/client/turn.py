"""A client's turn: opens its desk on what it kept and was offered, and puts away what lasts.

It takes a link and a seat, and knows nothing of engines and strategies: a client in the server's
process and one on a device of its own open their desks the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from flexp.client.desk import Desk, Training
from flexp.client.memory import Memory
from flexp.client.session import Session
from flexp.data.examples import Examples, Shard
from flexp.data.tasks import Balanced, Classification, Loss, Task, log_prior
from flexp.dice import Dice
from flexp.errors import CutError, LinkError
from flexp.link.messages import Link
from flexp.model.adapter import Kind, alpha_of, dropout_of
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.ops import Initial, Optim, SlotSpec, alphas_of
from flexp.model.personal import PersonalModel
from flexp.model.prefix import Prefix
from flexp.model.slots import Slots
from flexp.parcel import Parcel
from flexp.privacy.egress import Egress, Leave, Profile
from flexp.selection import FAR, NEAR, select
from flexp.tensors import Tensors

Specs = Mapping[str, SlotSpec]
ALONE = "alone until"  # a fact of a client's memory


@dataclass(frozen=True)
class Client:
    """One client as it comes to every turn: what is its own, and the backbone of its process.

    ``pool`` are training rows that stand in for its own, where a method is not federated.
    ``objective`` is what it minimises instead of its task's loss. ``prefix`` are hidden states of
    earlier turns, ``probe`` is a small model that all have whole.
    """

    name: str
    backbone: Backbone
    task: Task
    shard: Shard
    memory: Memory
    dice: Dice
    kind: Kind
    training: Training
    initial: Initial
    profile: Profile = "u-shape"
    pool: Examples | None = None
    objective: Loss | None = None
    prefix: Prefix | None = None
    probe: Backbone | None = None

    def open(
        self,
        link: Link,
        seat: Seat,
        specs: Specs,
        *,
        leaves: Sequence[Leave],
        run: str,
        round: int,
        wave: int,
        before: int = 0,
        window: int = 1,
        posts: bool = False,
    ) -> tuple[Desk, Parcel]:
        """Takes the seat: the desk, and the loose tensors and facts of the offer.

        Offered slots lie on the desk; their near parts cross the link on first use. Randomness
        does not depend on the wave, only on the client's turns ``before`` in this round. Over a
        link that ``posts``, up to ``window`` parts of a batch are under way at a time.
        """
        near = self._near(seat, specs)
        moving = {s: far for s, v in near.values.items() if (far := select(v, FAR, near.place))}
        moved = frozenset(f"slot/{s}/{k}" for s, held in moving.items() for k in held)
        egress = Egress(leaves, seat.labels, self.profile, near.place, moved)
        session = Session(link, egress, run, round, wave, window, posts)
        answer = session.join(seat, {s: spec.optim or Optim() for s, spec in specs.items()})
        facts = cast("dict[str, Any]", answer.facts)
        begun = partial(self._begun, near, seat, specs)
        if moving or facts["moved"]:
            self._move(near, moving, session, facts["moved"], begun)
        offered = {slot for slot, names in facts["offered"].items() if names}
        near.missing = self._on_first_use(near, specs, offered, begun, session.fetch)
        for slot in offered:
            near.values.pop(slot, None)
        desk = Desk(
            client=self.name,
            seat=seat,
            model=self._model(seat, near, session, specs),
            shard=self.shard if self.pool is None else replace(self.shard, train=self.pool),
            task=self.task,
            memory=self.memory,
            dice=self.dice("turn", client=self.name, round=round, wave=before),
            session=session,
            specs=specs,
            training=self.training,
            prior=self._prior(seat, self.shard.train),
            probe=self.probe,
        )
        loose = {k.removeprefix("tensor/"): v for k, v in answer.tensors.items()}
        return desk, Parcel(tensors=loose, facts=facts["facts"])

    def _near(self, seat: Seat, specs: Specs) -> Slots:
        """The near side's slots, with what the client kept of them."""
        body, alpha = self.backbone, alpha_of(self.kind)
        near = Slots(lambda name: body.place(name, seat), body.depth, alpha, fused=body.fast)
        near.alphas = alphas_of(specs)
        near.optims = {s: spec.optim for s, spec in specs.items() if spec.optim is not None}
        for slot in near.lasting(specs):
            kept = self.memory.get(f"slot/{slot}")
            if kept is not None:
                near.put(slot, kept)
        return near

    def _begun(self, near: Slots, seat: Seat, specs: Specs, slot: str) -> Tensors:
        """The near part that a slot begins with; nothing of one that is no slot of the method."""
        whole = self.initial(specs[slot], seat.rank) if slot in specs else {}
        return select(whole, NEAR, near.place)

    def _move(
        self,
        near: Slots,
        moving: Mapping[str, Tensors],
        session: Session,
        moved: Any,
        begun: Callable[[str], Tensors],
    ) -> None:
        """Puts what has become far into the tenancy, and fetches what has become near."""
        if moved is None:
            raise LinkError(
                f'Client "{self.name}" has adapters of blocks that are at the server, which does '
                "not know that it moved. Both sides must resume from the same checkpoint."
            )
        for slot, held in sorted(moving.items()):
            there = moved["there"].get(slot, ())
            if lacking := {k: v for k, v in held.items() if k not in there}:
                session.move_in(slot, lacking)
            near.put(slot, select(near[slot], NEAR, near.place))
        for slot in moved["leaving"]:
            below = near.values.get(slot, {})
            if slot not in near.values:  # a client that is alone before its first turn
                below = begun(slot)
            near.put(slot, {**below, **session.move_out(slot)})

    def _on_first_use(
        self,
        near: Slots,
        specs: Specs,
        offered: Collection[str],
        begun: Callable[[str], Tensors],
        fetch: Callable[[str], Tensors],
    ) -> Callable[[str], Tensors | None]:
        """Finds a slot's near part: what was kept, or its beginning, under what is offered."""
        kept = dict(near.values)

        def missing(slot: str) -> Tensors | None:
            if slot not in specs and slot not in offered:
                return None
            below = kept[slot] if slot in kept else begun(slot)
            above = fetch(slot) if slot in offered else {}
            return dict(sorted({**below, **above}.items()))

        return missing

    def _prior(self, seat: Seat, rows: Examples) -> Tensor | None:
        """The label frequencies of these rows, if the recipe trains relative to them."""
        task = self.task
        if not self.training.label_prior:
            return None
        if not isinstance(task, Classification) or seat.labels == "loss":
            raise CutError(
                "train.label_prior needs a classification whose loss is at the client. Switch it "
                'off, or set plan.labels to "keep" or "logits".'
            )
        return log_prior(len(task.labels), rows)

    def _model(self, seat: Seat, near: Slots, session: Session, specs: Specs) -> PersonalModel:
        layout = {k for spec in specs.values() for k in self.initial(spec, seat.rank)}
        prior = self._prior(seat, self.shard.train if self.pool is None else self.pool)
        loss = self.objective or self.task
        return PersonalModel(
            self.backbone,
            seat,
            near,
            task=loss if prior is None else Balanced(loss, prior),
            far=None if seat.near_only(self.backbone.depth) else session,
            layout=sorted(layout),
            dropout=dropout_of(self.kind),
            prefix=self.prefix,
            moves=session.moves,
        )


def hand_in(desk: Desk, reply: Parcel, *, alone: int | None = None) -> None:
    """Ends a turn: the reply goes out, what lasts goes into memory, and memory counts from now.

    ``alone`` is the round up to which the client is on its own, if it is. If this or anything
    before it fails, the turn did not happen: roll the memory back.
    """
    if desk.training.still == "refuse":
        desk.model.near.check_moved(desk.client)
    desk.session.submit(reply)
    _put_away(desk)
    desk.memory.facts.pop(ALONE, None)
    if alone is not None:
        desk.memory.facts[ALONE] = alone
    desk.memory.settle()
    desk.session.leave()
    desk.memory.commit()
    if desk.model.prefix is not None:
        desk.model.prefix.end_turn()


def _put_away(desk: Desk) -> None:
    near = desk.model.near
    lasting = near.lasting(desk.specs)
    for slot in lasting:
        if slot in near.values or slot in desk.specs:
            desk.memory.put(f"slot/{slot}", near[slot])
    for key in [k for k in desk.memory.slots if k.startswith("slot/")]:
        if key.removeprefix("slot/") not in lasting:
            del desk.memory.slots[key]
