"""pFedPG (Yang et al., 2023, arXiv 2308.15367): the server makes each client's prompt.

Server: base prompts P_0 (m x d), a descriptor D_i (d) per client, attention W_Q, W_K, W_V, W_O:
    P_i = P_0 + softmax(D_i W_Q (P_0 W_K)^T / sqrt k) (P_0 W_V) W_O      one row, added to all m
Round: t_i <- E local epochs of P_i and a personal head under a frozen backbone;  P_i - t_i is sent
    psi <- one optimizer step along sum_i p_i (d P_i / d psi)^T (P_i - t_i),  psi = all of these
which is the slope of |P_i - t_i|^2 / 2: old less new. At the cut (``adapter.at``) a prompt is far,
and nothing of it travels. `pfedhn` is the same for whole adapters.

Reconstruction: texts; how the W begin; ``learn`` "slope", where the prompt stays as it was made and
its summed slopes are sent; that a late client's first turns move its descriptor alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.fit import together
from flexp.model.adapter import Prompt
from flexp.model.ops import Optim, SlotSpec
from flexp.model.prompts import FRONT
from flexp.parcel import Facts, Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.strategies.prompt_generator import Generator, Sizes, begun
from flexp.tensors import Term

PROMPT = Where(names="prompt_*")


@dataclass(frozen=True)
class PFedPg(Strategy[Generator]):
    """The server makes a prompt for each client and learns from how it moved; heads are personal.

    ``optimizer`` with ``rate``; a round's clients ``step`` "together" or one after another, counted
    by ``weights``. ``keys`` and ``values`` are k and v (None: d; no values are P_0 for all), and
    ``bound`` is of P_0 and D (None: sqrt(3 / d), VPT's rule where a patch has d numbers).
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    rate: PositiveFloat = 1e-3
    step: Literal["together", "in turn"] = "together"
    weights: Literal["rows", "equal", "sum"] = "rows"
    learn: Literal["change", "slope"] = "change"
    keys: PositiveInt | None = None
    values: NonNegativeInt | None = None
    bound: PositiveFloat | None = None
    descriptor_bound: PositiveFloat | None = None
    settle: NonNegativeInt = 1

    name: ClassVar[str] = "pfedpg"
    paper: ClassVar[str] = "Yang et al. 2023, arXiv 2308.15367"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    reconstruction: ClassVar[str] = "prompts of texts, how attention begins, and late clients"
    alone: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run")}
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("personal", PROMPT, why="the generator learns from how it moved"),
        Leave("slope", PROMPT, why="the generator learns from it"),
    )

    def refuses(self, setting: Setting) -> str:
        if not isinstance(setting.adapter, Prompt):
            return "it makes prompts, and this adapter is none. Set adapter.kind=prompt."
        return super().refuses(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        return {**self.slots, **({"slope": SlotSpec()} if self.learn == "slope" else {})}

    def start(self, scene: Scene) -> Generator:
        sizes = Sizes(self.keys, self.values, self.bound, self.descriptor_bound)
        adapter = scene.initial(self.slots["personal"])
        return begun(adapter, scene.clients, scene.dice, sizes)

    def offer(self, state: Generator, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": {state.name: state.made(client)}})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if self.learn == "change":
            return desk.reply("personal", where=PROMPT, facts=desk.fit())
        desk.assign("made", (Term("personal"),))
        desk.assign("slope", (Term("personal", 0.0),))
        done = list[Facts]()
        for batch in desk.batches():
            done.append(desk.fit(batches=iter([batch])))
            desk.assign("slope", (Term("slope"), Term("personal@g")))
            desk.assign("personal", (Term("made"),), where=PROMPT)
        return desk.reply("slope", where=PROMPT, facts=together(done))

    def merge(self, state: Generator, replies: Mapping[ClientId, Parcel], turn: Turn) -> Generator:
        rows = turn.weights(list(replies)) if self.weights == "rows" else [1.0] * len(replies)
        whole = 1.0 if self.weights == "sum" else sum(rows)
        shares = {c: row / whole for c, row in zip(replies, rows, strict=True)}
        changes = {c: self.change(state, c, reply) for c, reply in replies.items()}
        groups = [changes] if self.step == "together" else [{c: v} for c, v in changes.items()]
        for group in groups if replies else ():
            optim = Optim(self.optimizer, self.rate)
            state = state.stepped(group, shares, optim, settle=self.settle)
        return state

    def change(self, state: Generator, client: ClientId, reply: Parcel) -> Tensor:
        """P_i - t_i, or the slopes."""
        if self.learn == "slope":
            return reply.adapters["slope"][state.name]
        return state.made(client).double() - reply.adapters["personal"][state.name]

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        alone = set(desk.model.layout) == {FRONT}  # the one prompt that PEFT has
        return Served(desk.model.logits, "personal" if alone else None)
