"""ZooPFL (Lu et al., 2023, arXiv 2310.05143): the server's blocks are an oracle of forwards alone.

Client i:  y = W_i g(Dec([Enc_theta(x); e_i])),  with g all frozen blocks, whoever has them. Rounds:
0.  Enc, Dec <- min |Dec([Enc(x); e]) - x|^2, e random, and averaged; after that Dec stays
1.  surgery, from slopes at c = [z; e_i] that losses alone give (``queries.py``), no backward of g:
    e_i <- e_i - eta s_e;  theta_i <- theta - eta (dz/dtheta)^T s_z;  theta <- sum_i p_i theta_i
2.  re-mapping: W_i <- W_i - eta grad f_i, first-order, as the outputs of g are seen
e_i and W_i never leave. The server gets forwards, of q queries a row, and no backward, and keeps no
graph. theta travels to those who have another.

Reconstruction, from the abstract and memory. x is the hidden state that enters the first block, or
the server's first one, coded by its mean over positions; ``form`` "residual" keeps what Dec loses
(``model/surgery.py``). Stage 0 is the clients', as the server has no rows. W_i is the last map of
the head, ``warm`` because a fresh one says nothing; in few rounds turns that alternate learn more.
p_i are the rows that clients tell. A backbone in bfloat16 rounds losses: it needs a larger ``rho``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from flexp.client.desk import Desk
from flexp.client.fit import together
from flexp.model.adapter import Head
from flexp.model.ops import Optim, SlotSpec
from flexp.model.surgery import Surgery
from flexp.parcel import Facts, Parcel
from flexp.privacy.egress import Leave
from flexp.selection import HEAD, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.strategies.operated import DECODER, ENCODER, OWN, Operated
from flexp.strategies.queries import Queries, asked, rebuilt
from flexp.tensors import Mix, Term

WORN: Mix = (Term("personal"), Term("surgery"))
BOTH = ENCODER | DECODER


@dataclass(frozen=True)
class ZooPfl(Strategy[Operated]):
    """Clients adapt what enters frozen blocks without a gradient of them, and re-map outputs.

    ``code`` and ``embedding`` are the sizes of z and e_i, ``width`` of inner layers. ``rebuild``
    rounds are stage 0 (``spread`` is e's there), ``warm`` more re-mapping. Of the rest a ``share``
    is surgery and all others re-mapping, or, ``order`` "alternate", each turn is both. Slopes are
    ``along`` coordinates (CGE) or so many random ``directions``, ``rho`` far, on one side or two;
    ``at_once`` queries share a forward (None: all). ``remap`` "head" trains all maps of the head.
    ``rate`` is the surgery's with its ``optimizer`` (None: the recipe's).
    """

    at: Literal["input", "cut"] = "input"
    form: Literal["residual", "plain"] = "residual"
    code: PositiveInt = 8
    embedding: PositiveInt = 4
    width: PositiveInt = 32
    rebuild: NonNegativeInt = 1
    rebuild_steps: NonNegativeInt | None = None
    spread: NonNegativeFloat = 0.02
    warm: NonNegativeInt = 1
    order: Literal["stages", "alternate"] = "stages"
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    along: Literal["coordinates", "signs", "normal"] = "coordinates"
    sides: Literal["one", "two"] = "one"
    rho: PositiveFloat = 5e-3
    directions: PositiveInt = 8
    at_once: PositiveInt | None = None
    steps: NonNegativeInt | None = None
    rate: PositiveFloat | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    remap: Literal["linear", "head"] = "linear"

    name: ClassVar[str] = "zoopfl"
    paper: ClassVar[str] = "Lu et al. 2023, arXiv 2310.05143"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = OWN | HEAD
    reconstruction: ClassVar[str] = "what of a hidden state is coded, and when what trains"
    alone: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(Head(), lasts="run", moments="keep"),
        "surgery": SlotSpec(Surgery(), lasts="run"),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("surgery", ENCODER, why="to be averaged"),
        Leave("surgery", DECODER, "until it is frozen", "to be averaged"),
    )

    def refuses(self, setting: Setting) -> str:
        if setting.task == "causal-lm" or not setting.head:
            return "its outputs are re-mapped by a head. Learn labels, with adapter.head=true."
        if any(seat.labels != "keep" for seat in setting.seats.values()):
            return "its heads train without the server. Set plan.labels=keep."
        if self.at == "cut" and any(s.near_only(setting.depth) for s in setting.seats.values()):
            return "a client has no block at the server to operate before. Set strategy.at=input."
        return ""

    def specs(self) -> Mapping[str, SlotSpec]:
        kind = Surgery(self.code, self.embedding, self.width, self.at, self.form == "residual")
        optim = None if self.rate is None else Optim(self.optimizer, self.rate)
        return {**self.slots, "surgery": SlotSpec(kind, lasts="run", optim=optim)}

    def start(self, scene: Scene) -> Operated:
        return Operated.begun(scene.initial(self.specs()["surgery"]))

    def phases(self, turn: Turn) -> list[str]:
        """What a turn is for, in order."""
        done, left = (n - self.rebuild - self.warm for n in (turn.round, turn.rounds))
        if turn.round < self.rebuild:
            return ["rebuild"]
        if self.order == "alternate" and done >= 0:
            return ["remap", "surgery"]
        return ["surgery"] if 0 <= done < int(self.share * left + 0.5) else ["remap"]

    def offer(self, state: Operated, client: ClientId, turn: Turn) -> Parcel:
        lacking = turn.select(client, state.shared, state.lacking(client))
        return Parcel({"surgery": lacking} if lacking else {}, facts={"for": self.phases(turn)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        done, given = list[Facts](), dict[str, Where]()
        for phase in cast("list[str]", offer.facts["for"]):
            if phase == "remap":
                done.append(desk.fit(wear=WORN, train={"personal": self.outputs(desk)}))
            elif phase == "surgery":
                given, moves = {"surgery": ENCODER}, {"surgery": ENCODER | OWN}
                loss = asked(desk, WORN, self.at, self.queries())
                done.append(desk.fit(loss, wear=WORN, train=moves, steps=self.steps))
            else:
                given, loss = {"surgery": BOTH}, rebuilt(desk, WORN, self.at, self.spread)
                done.append(desk.fit(loss, wear=WORN, train=given, steps=self.rebuild_steps))
        return desk.reply(where=given, facts=together(done))

    def outputs(self, desk: Desk) -> Where:
        """W_i."""
        last = list(desk.model.backbone.head)[-1]
        return Where(names=f"*.{last}.*") if self.remap == "linear" else HEAD

    def queries(self) -> Queries:
        """How slopes are estimated."""
        return Queries(self.along, self.sides, self.rho, self.directions, self.at_once)

    def merge(self, state: Operated, replies: Mapping[ClientId, Parcel], turn: Turn) -> Operated:
        state = state.averaged(replies)
        return state.anchored() if turn.round < self.rebuild else state

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        return Served(lambda batch: desk.model.logits(batch, WORN), None)
