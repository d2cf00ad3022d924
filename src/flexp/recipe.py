"""The validated, frozen, hashed description of a run; ``recipe_file`` reads one from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from flexp.recipe_clients import ChangeRecipe, ClientRecipe, ParticipationRecipe
from flexp.recipe_clients import Part as _Part


class DataRecipe(_Part):
    """Whose data: a file or folder or packaged set, how it is divided, and into which splits."""

    path: str = "vader"
    text: str = "text"
    image: str = "image"
    label: str = "label"
    prompt: str | None = None
    client: str | None = None
    partition: Literal[
        "auto", "column", "iid", "dirichlet", "shards", "quantity", "label-skew", "dominant"
    ] = "auto"
    clients: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 0.5
    per_client: Annotated[int, Field(ge=1)] = 2
    share: Annotated[float, Field(ge=0, le=1)] = 0.9
    group: str | None = None
    biggest: Annotated[int, Field(ge=1)] | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    minimum: Annotated[int, Field(ge=1)] = 1
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    one_class: Literal["refuse", "allow"] = "refuse"

    @model_validator(mode="after")
    def _sums(self) -> DataRecipe:
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError("split: three fractions of at least 0 that add up to 1")
        return self


class TaskRecipe(_Part):
    """What is learned. ``labels`` fixes their names and order; empty takes them from the data."""

    kind: Literal["classification", "causal-lm", "images"] = "classification"
    labels: tuple[str, ...] = ()
    max_length: Annotated[int, Field(ge=2)] = 128


class ModelRecipe(_Part):
    """The backbone: an asset's name, a local folder or a hub id."""

    source: str = "minilm"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "int8", "nf4"] = "none"
    device: str = "cpu"
    blocks_at: str | None = None


class AdapterRecipe(_Part):
    """What is trained; a kind reads its own fields and ignores the others."""

    kind: Literal["lora", "colora", "ia3", "prompt", "dense", "head"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()
    tokens: Annotated[int, Field(ge=1)] = 8
    at: Literal["front", "added", "behind", "cut"] = "front"
    dora: bool = False
    groups: Annotated[int, Field(ge=1)] = 4
    aligned: str | None = None
    head: bool = True


class TrainRecipe(_Part):
    """How clients train: steps of a turn (or epochs), optimizer, clipping.

    ``label_prior`` trains a classifier relative to each client's own label frequencies and serves
    it on the client's own rows with them added (logit adjustment). ``cache`` is how many bytes of
    hidden states a client keeps in front of the first block that trains, for later epochs.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    head_lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    label_prior: bool = False
    still: Literal["refuse", "allow"] = "refuse"
    cache: int | str = 0
    group_by_length: bool = False

    @model_validator(mode="after")
    def _one(self) -> TrainRecipe:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


Speed = Annotated[float, Field(gt=0)]


class DeviceRecipe(_Part):
    """A kind of device, by a well-known profile, declared values, or both (declared ones count).

    ``memory`` like "600MB" or "1.5GiB"; speeds are for the planner and the simulated clock.
    """

    name: str | None = None
    profile: str | None = None
    memory: int | str | None = None
    gflops: Speed | None = None
    up_mbit: Speed | None = None
    down_mbit: Speed | None = None
    latency_ms: Annotated[float, Field(ge=0)] | None = None


class PlanRecipe(_Part):
    """Where models are cut. ``cut`` [front, back] for all, or per client in ``cuts``; else devices.

    Clients take the devices in turn, in order of their names, unless ``assign`` says otherwise.
    ``ranks`` gives single clients another LoRA rank than the adapter's. Without ``goal`` it is
    optimized where all speeds are known, else memory_only.
    """

    labels: Literal["keep", "logits", "loss"] = "keep"
    cut: tuple[int, int] | None = None
    cuts: Mapping[str, tuple[int, int]] = {}
    devices: tuple[DeviceRecipe, ...] = ()
    server: DeviceRecipe | None = None
    assign: Mapping[str, str] = {}
    slow: Mapping[str, Annotated[float, Field(ge=1)]] = {}
    ranks: Mapping[str, Annotated[int, Field(ge=1)]] = {}
    goal: Literal["optimized", "memory_only", "static", "random"] | None = None
    static: tuple[int, int] | None = None
    weights: Mapping[Literal["accuracy", "time", "memory"], Annotated[float, Field(ge=0)]] = {
        "accuracy": 1.0,
        "time": 1.0,
        "memory": 0.1,
    }
    accuracy: Mapping[float, float] = {}
    min_front: Annotated[int, Field(ge=1)] = 1
    min_back: Annotated[int, Field(ge=0)] = 0
    max_depth: Annotated[int, Field(ge=1)] | None = None
    changes: tuple[ChangeRecipe, ...] = ()

    @model_validator(mode="after")
    def _once(self) -> PlanRecipe:
        told = [(c.round, c.client) for c in self.changes]
        if len(set(told)) < len(told):
            raise ValueError("changes: one change of a client in a round")
        return self


class StrategyRecipe(BaseModel):
    """The method and its options; which options there are is the method's to say."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "flexp"

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


Wire = Literal["fp32", "bf16", "fp16", "int8", "int8-group"]


class LinkRecipe(_Part):
    """How hidden states, logits and their gradients travel; all else travels as it is.

    fp32 changes nothing. int8 has a scale for each position of each row, int8-group one for every
    64 values. What is rounded is the same on any machine, so it goes with ``mode: exact`` too.
    ``window`` 2 takes every batch in at least two parts, and over a network one part is computed
    while the other is on its way. It trains bit for bit what the parts train one after the other.
    With ``ahead`` the front of the next batch is computed and sent while this batch waits for its
    gradient, so a step has one wait instead of two. The price: the front of every batch but a
    turn's first lacks one step. That is so in one process too, with the same bits. Trunk and tail
    lack nothing, so it is exact where nothing in the front trains.
    """

    wire: Wire = "fp32"
    wires: Mapping[str, Wire] = {}
    window: Annotated[int, Field(ge=1, le=2)] = 1
    ahead: bool = False

    def of(self, client: str) -> Wire:
        """How a client's messages travel."""
        return self.wires.get(client, self.wire)


class EvaluateRecipe(_Part):
    """When models are scored (0: only at the end), and how many test rows each client pools."""

    every: Annotated[int, Field(ge=0)] = 0
    global_rows: Annotated[int, Field(ge=1)] | None = None


class PrivacyRecipe(_Part):
    """The profile: what the run may let the server see."""

    profile: Literal["u-shape", "open"] = "u-shape"


def _one_folder(name: str) -> str:
    if not (name.isprintable() and name.strip(". ") and len(name.encode()) <= 100):
        raise ValueError("a folder is named after the run: write 1 to 100 letters and digits")
    if set(name) & set("/\\"):
        raise ValueError("a folder is named after the run: no slashes. Say where with out")
    return name


class Recipe(_Part):
    """One run."""

    name: Annotated[str, AfterValidator(_one_folder)] = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: Annotated[int, Field(ge=1)] = 10
    mode: Literal["exact", "fast"] = "exact"
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0
    data: DataRecipe = DataRecipe()
    task: TaskRecipe = TaskRecipe()
    model: ModelRecipe = ModelRecipe()
    adapter: AdapterRecipe = AdapterRecipe()
    train: TrainRecipe = TrainRecipe()
    plan: PlanRecipe = PlanRecipe()
    strategy: StrategyRecipe = StrategyRecipe()
    link: LinkRecipe = LinkRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    privacy: PrivacyRecipe = PrivacyRecipe()
    participation: Mapping[str, ParticipationRecipe] = {}
    clients: Mapping[str, ClientRecipe] = {}
    out: str = "runs"

    @model_validator(mode="after")
    def _unclipped(self) -> Recipe:
        if self.link.ahead and self.train.clip_norm is not None:
            raise ValueError(
                "link.ahead: the far step is sent before the near gradient is there, so it cannot "
                "be clipped by the norm of both; remove train.clip_norm, or switch link.ahead off"
            )
        return self

    @model_validator(mode="after")
    def _alike(self) -> Recipe:
        if self.train.cache and self.mode == "exact":
            raise ValueError(
                "train.cache: a row that was computed in another batch has other last bits, so "
                "nothing is kept in exact mode; set mode to fast, or train.cache to 0"
            )
        return self

    @model_validator(mode="after")
    def _in_time(self) -> Recipe:
        last = [(c.round, f"plan.changes of {c.client}") for c in self.plan.changes]
        for client, held in self.participation.items():
            last += [(r, f"participation.{client}") for r in (*held.absent, *held.alone)]
        late = [(r, what) for r, what in last if r >= self.rounds]
        if late:
            r, what = late[0]
            raise ValueError(f"{what}: round {r} never comes; rounds 0 to {self.rounds - 1} do")
        return self

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON data, with every default written out."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """SHA-256 of everything that can change a result (all but ``out``)."""
        plain = {k: v for k, v in self.plain().items() if k != "out"}
        line = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(line.encode()).hexdigest()

    def changed(self, other: Mapping[str, Any]) -> list[str]:
        """Dotted names of fields in which a recipe's plain form differs from this one."""
        mine, theirs = dict(_leaves("", self.plain())), dict(_leaves("", other))
        names = sorted(mine.keys() | theirs.keys())
        return [n for n in names if n != "out" and mine.get(n) != theirs.get(n)]


def _leaves(stem: str, plain: Any) -> list[tuple[str, Any]]:
    if isinstance(plain, Mapping):
        held = cast("Mapping[str, Any]", plain).items()
        named = ((f"{stem}.{key}" if stem else str(key), value) for key, value in held)
        return [pair for name, value in named for pair in _leaves(name, value)]
    return [(stem, plain)]
