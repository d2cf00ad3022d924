"""pFedPT (Li et al., 2023, arXiv 2303.08678): a personal prompt at the input of a shared model.

Round, with delta_i the client's own prompt, which lasts and never leaves:
    delta_i <- E_p epochs with theta frozen      plain SGD of its own, with momentum
    theta_i <- E epochs from theta with delta_i frozen;  theta <- sum_i p_i theta_i
Served are theta as received and delta_i. In the paper delta is a frame of pixels that is added
to the border of pictures. Reconstruction: its forms for texts, soft prompts that are added to the
first tokens or stand in front of them or behind the first one; ``share`` "trunk"; that a frozen
backbone stays so, where theta is its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from flexp.client.desk import Desk
from flexp.model.adapter import Frame, Kind, Prompt
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, FAR, NONE, Where
from flexp.strategies.base import ClientId, MethodKind, Served, Setting, Turn
from flexp.strategies.fedavg import FedAvg
from flexp.tensors import Mix, Tensors, Term, mean_by_name

WORN: Mix = (Term("personal"), Term("prompt"))


@dataclass(frozen=True)
class PFedPt(FedAvg):
    """FedAvg of a model that each client wears with a prompt of its own, which is trained first.

    ``form``: a "frame" of pixels ``width`` wide, or ``tokens`` "front", "behind" or "added". It
    begins with ``spread`` (None: 1 for pixels, 0.02 else), and takes ``prompt_steps`` (None: the
    recipe's) of SGD, each rate ``fade`` times the one before. ``share`` "trunk" averages what is
    far alone.
    """

    form: Literal["front", "behind", "added", "frame"] = "front"
    tokens: PositiveInt = 8
    width: PositiveInt = 2
    gray: bool = False
    spread: NonNegativeFloat | None = None
    prompt_steps: NonNegativeInt | None = None
    prompt_lr: PositiveFloat = 1.0
    prompt_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    fade: Annotated[float, Field(gt=0, le=1)] = 1.0
    share: Literal["all", "trunk"] = "all"

    name: ClassVar[str] = "pfedpt"
    paper: ClassVar[str] = "Li et al. 2023, arXiv 2303.08678"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = Where(names="prompt_*") | Where(names="frame_*")
    reconstruction: ClassVar[str] = "soft prompts for texts, and that the trunk may be all there is"
    alone: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(), "prompt": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="to be averaged"),)

    def refuses(self, setting: Setting) -> str:
        if (setting.task == "images") != (self.form == "frame") and self.form != "behind":
            wanted = "frame" if setting.task == "images" else "front"
            return f'form "{self.form}" is not for this task. Set strategy.form={wanted}.'
        if isinstance(setting.adapter, Prompt):
            return (
                "it trains a model under its own prompt. Set adapter.kind to another than prompt."
            )
        return super().refuses(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        optim = Optim("sgd", lr=self.prompt_lr, momentum=self.prompt_momentum)
        if self.form == "frame":
            kind: Kind = Frame(self.width, 1.0 if self.spread is None else self.spread, self.gray)
        else:
            kind = Prompt(self.tokens, head=False, at=self.form)
            kind = kind if self.spread is None else replace(kind, spread=self.spread)
        lasts: Literal["run", "round"] = "run" if self.share == "trunk" else "round"
        prompt = SlotSpec(kind, lasts="run", optim=optim)
        return {"personal": SlotSpec(lasts=lasts), "prompt": prompt}

    def owns(self) -> Where:
        return self.own | ~self.given()

    def averages(self) -> Where:
        return NONE

    def given(self) -> Where:
        """What is averaged."""
        return FAR if self.share == "trunk" else ALL

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": turn.select(client, state, self.given())})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        desk.fit(wear=WORN, train={"prompt": ALL}, steps=self.prompt_steps, fade=self.fade)
        facts = desk.fit(wear=WORN, train={"personal": ALL})
        return desk.reply("personal", where=self.given(), facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        if self.share == "all":
            return super().merge(state, replies, turn)
        trained = [reply.adapters["personal"] for reply in replies.values()]
        return {**state, **mean_by_name(trained, turn.weights(list(replies)))}

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        return Served(lambda batch: desk.model.logits(batch, WORN), None)
