"""What crosses between a client and the server: nine messages and one kind of answer, all data.

``Backward`` never steps. Operations ride on the next ``Forward``, so they cost no round trip of
their own. Every message names the step it belongs to; the server's step table runs each once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from flexp.dice import Dice
from flexp.model.cut import Seat
from flexp.model.ops import Op, Optim
from flexp.parcel import JSON, Facts
from flexp.selection import ALL, Where
from flexp.tensors import BlockScalars, Tensors, Wear

Phase = Literal["join", "fetch", "put", "forward", "backward", "continue", "do", "submit", "leave"]


@dataclass(frozen=True)
class StepKey:
    """The unique key of a message of one client; ``call`` counts forwards within a step."""

    run: str
    round: int
    wave: int
    step: int
    call: int
    phase: Phase


@dataclass(frozen=True)
class Join:
    """Takes the seat: the slots it will use and their optimizers."""

    key: StepKey
    seat: Seat
    optims: Mapping[str, Optim]

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        return {}


@dataclass(frozen=True)
class Fetch:
    """Asks for near parts of an offered slot, or (``far``) for the client's own far part of one.

    ``leaving``: for what was far until the client moved and is near now.
    """

    key: StepKey
    slot: str
    far: bool = False
    where: Where = ALL
    leaving: bool = False

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        return {}


@dataclass(frozen=True)
class Put:
    """Hands tensors of a slot to the tenancy that were near until the client moved."""

    key: StepKey
    slot: str
    values: Mapping[str, Tensor]

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        return {f"slot/{self.slot}/{k}": v for k, v in self.values.items()}


@dataclass(frozen=True)
class Forward:
    """One far forward. ``keep`` holds its graph until ``Backward``; ``ops`` run before it.

    ``part`` tells parts of a batch apart that share a step because they are under way together.
    ``wants``: the gradient of the hidden state may be asked for. With ``rows`` it is not, and each
    row of the batch has a number there: under n the server keeps the row for the turn if it can,
    -n is the row that came under n and is not in ``hidden`` now, 0 is not to be kept. What it has
    no more it names in the answer's facts as ``lacks``; it has computed nothing then.
    """

    key: StepKey
    wear: Wear
    train: Mapping[str, Where] | None
    until: Literal["hidden", "logits", "loss"]
    hidden: Tensor
    coefs: tuple[Tensor, ...]
    shapes: Mapping[str, tuple[int, ...]]
    mask: Tensor | None
    labels: Tensor | None
    dropout: Dice | None
    keep: bool
    ops: tuple[Op, ...] = ()
    part: int = 0
    wants: bool = True
    rows: tuple[int, ...] = ()

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        out = {"hidden": self.hidden}
        if self.mask is not None:
            out["mask"] = self.mask
        if self.labels is not None:
            out["labels"] = self.labels
        return out | {f"coef/{n}": c for n, c in enumerate(self.coefs)}


@dataclass(frozen=True)
class Backward:
    """The gradient of a kept forward's result; adds to the gathered gradients of far slots."""

    key: StepKey
    grad: Tensor
    hidden: bool

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        return {"grad": self.grad}


@dataclass(frozen=True)
class Continue:
    """The next positions of a growing text, ``before`` of which came earlier.

    Another ``talk`` than before begins a new conversation, and ends the one before.
    """

    key: StepKey
    talk: int
    wear: Wear
    hidden: Tensor
    before: int

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        return {"hidden": self.hidden}


@dataclass(frozen=True)
class Do:
    """Operations whose answers are needed now, or that no forward followed."""

    key: StepKey
    ops: tuple[Op, ...]

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        return {}


@dataclass(frozen=True)
class Submit:
    """The reply of a turn: near tensors of slots, which far ones belong to it, and facts."""

    key: StepKey
    near: Mapping[str, Mapping[str, Tensor]]
    far: Mapping[str, Where]
    loose: Mapping[str, Tensor]
    facts: Facts

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        out = {f"slot/{s}/{k}": v for s, held in self.near.items() for k, v in held.items()}
        return out | {f"tensor/{k}": v for k, v in self.loose.items()}


@dataclass(frozen=True)
class Leave:
    """Gives the seat up for this turn; far slots that last for the run stay."""

    key: StepKey

    def tensors(self) -> Tensors:
        """The tensors on board, by name."""
        return {}


Message = Join | Fetch | Put | Forward | Backward | Continue | Do | Submit | Leave


@dataclass(frozen=True)
class Answer:
    """What comes back: named tensors, a vector of block scalars per ``Dot``, and facts."""

    tensors: Tensors = field(default_factory=dict[str, Tensor])
    scalars: tuple[BlockScalars, ...] = ()
    facts: Facts = field(default_factory=dict[str, JSON])


class Link(Protocol):
    """One method, so that a link in a process, over TLS, metered or faulty are interchangeable."""

    def send(self, message: Message) -> Answer:
        """Delivers one message and waits for its answer; raises LinkError or StepError."""
        ...

    def close(self) -> None:
        """Gives up the connection."""
        ...


@dataclass(frozen=True)
class Reply:
    """An answer on its way: ``future`` is done when it is here, and ``take`` gives it, once."""

    future: Future[Any]
    take: Callable[[], Answer]


@runtime_checkable
class Posting(Protocol):
    """A link that can have several messages on their way; they are handled in their order."""

    def begin(self, message: Message) -> Reply:
        """Sends one message and does not wait."""
        ...
