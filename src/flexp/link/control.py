"""What a client and a server say to each other beside the messages of a step.

A client asks and is answered: hello, device, ready, read, echo, outcome. The server tells, unasked:
begin, order, refused, end. Everything is data; no code and no class name crosses.
"""

from __future__ import annotations

from typing import Literal

from msgspec import field

from flexp.link.schema import Part
from flexp.model.cut import Seat

PROTOCOL = 1


class Hello(Part, frozen=True):
    """The first words of every stream. ``name`` counts only where there are no certificates.

    ``process`` is drawn by the client's process, ``server`` the server's last one that it knows,
    ``order`` the newest order that it has.
    """

    protocol: int
    program: str
    torch: str
    name: str
    process: str
    server: str = ""
    order: int = 0
    wants: Literal["train", "speak"] = "train"


class Welcome(Part, frozen=True):
    """What the run is, before the client has said anything about itself.

    ``recipe`` and ``config`` are JSON; ``model`` and ``tokenizer`` are digests. A stream that goes
    on where another broke off has nothing but ``server`` and ``resumed``.
    """

    server: str
    resumed: bool = False
    client: str = ""
    recipe: str = ""
    hash: str = ""
    model: str = ""
    tokenizer: str = ""
    config: str = ""


class Measured(Part, frozen=True):
    """What the client's device has: bytes, operations and bytes per second, seconds."""

    memory: int
    flops: float | None = None
    uplink: float | None = None
    downlink: float | None = None
    latency: float = 0.0


class Proposal(Part, frozen=True):
    """Where the client would sit, as far as who is there now decides it, and its bytes there."""

    seat: Seat
    bytes: int
    parts: dict[str, int]
    reason: str
    final: bool = False


class Ready(Part, frozen=True):
    """The owner has agreed to the recipe of that hash.

    ``rows`` of train, validation and test; ``space`` is the kind of task and its labels.
    """

    accepted: str
    rows: tuple[int, int, int]
    space: tuple[str, ...]
    more: int = 0  # turns of its own that it wants after the end


class Begin(Part, frozen=True):
    """The run begins, or goes on, with this seat; the labels of the task are these."""

    seat: Seat
    reason: str
    labels: tuple[str, ...] = ()


class Order(Part, frozen=True):
    """What a client is to do now; ``turns`` of its own count so far, ``floor`` must be kept."""

    number: int
    kind: Literal["train", "look", "adapter", "speak"]
    seat: Seat
    round: int = 0
    wave: int = 0
    before: int = 0
    turns: int = 0
    floor: int = 0
    split: Literal["train", "val", "test"] = "test"
    rounds: int = 0


class Outcome(Part, frozen=True):
    """How an order went: scores by whose data, or the kind of an error.

    Never an error's text, which may speak of the client's data or of its folders.
    """

    order: int
    error: str = ""
    cells: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


class Read(Part, frozen=True):
    """Asks for a part of a file of the model's folder; without a path for the list of files."""

    path: str = ""
    begin: int = 0
    size: int = 0


class Echo(Part, frozen=True):
    """Measures the way: bytes that mean nothing, and how many to send back."""

    data: bytes
    back: int = 0


class Enroll(Part, frozen=True):
    """Asks for a certificate, with the ticket of a start-up kit; answered by ``Data``."""

    csr: bytes


class Data(Part, frozen=True):
    """Bytes."""

    data: bytes


class Noted(Part, frozen=True):
    """Heard; nothing else is to be said."""


class Problem(Part, frozen=True):
    """An asked thing could not be done: the kind of error, and its message for people."""

    kind: str
    text: str


class Refused(Part, frozen=True):
    """The server does not go on with this stream; ``again`` is whether to come back.

    ``after`` is in how many seconds at the earliest.
    """

    text: str
    again: bool = False
    after: int = 0


class End(Part, frozen=True):
    """The run is over."""

    rounds: int


class Bye(Part, frozen=True):
    """The client goes: until it comes back.

    ``why`` is the kind of an error of its own, without its text, which may speak of its data.
    ``back``: its system ends it and will start it again, so its turn waits for it as for anybody
    who has lost the connection.
    """

    why: str = ""
    back: bool = False


Control = (
    Hello | Welcome | Measured | Proposal | Ready | Begin | Order | Outcome | Read | Echo | Enroll
    | Data | Noted | Problem | Refused | End | Bye
)  # fmt: skip
