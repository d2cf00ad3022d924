"""The validated, frozen, hashed description of a run: YAML, ``key=value`` overrides, errors.

Unknown keys are errors with the nearest name, and all problems of a recipe are told at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flexp.errors import RecipeError, nearest

MAX_BYTES = 1 << 20  # of a recipe file


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataRecipe(_Part):
    """Whose data: a file or folder or packaged set, how it is divided, and into which splits."""

    path: str = "vader"
    text: str = "text"
    label: str = "label"
    prompt: str | None = None
    client: str | None = None
    partition: Literal[
        "auto", "column", "iid", "dirichlet", "shards", "quantity", "label-skew"
    ] = "auto"
    clients: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 0.5
    per_client: Annotated[int, Field(ge=1)] = 2
    group: str | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    minimum: Annotated[int, Field(ge=1)] = 1
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    one_class: Literal["refuse", "allow"] = "refuse"

    @model_validator(mode="after")
    def _sums(self) -> DataRecipe:
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError("split: three fractions of at least 0 that add up to 1")
        if self.partition == "label-skew" and self.group is None:
            raise ValueError('partition "label-skew" needs group, the column of the domains')
        return self


class TaskRecipe(_Part):
    """What is learned. ``labels`` fixes their names and order; empty takes them from the data."""

    kind: Literal["classification", "causal-lm"] = "classification"
    labels: tuple[str, ...] = ()
    max_length: Annotated[int, Field(ge=2)] = 128


class ModelRecipe(_Part):
    """The backbone: an asset's name, a local folder or a hub id."""

    source: str = "minilm"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    blocks_at: str | None = None


class AdapterRecipe(_Part):
    """What is trained; fields that a kind does not use must stay at their defaults."""

    kind: Literal["lora", "ia3", "prompt", "dense", "head"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()
    tokens: Annotated[int, Field(ge=1)] = 8
    dora: bool = False
    head: bool = True


class TrainRecipe(_Part):
    """How clients train: steps of a turn (or epochs), optimizer, clipping."""

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    head_lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> TrainRecipe:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class DeviceRecipe(_Part):
    """A kind of device; ``memory`` like "600MB" or "1.5GiB"."""

    name: str
    memory: int | str


class PlanRecipe(_Part):
    """Where models are cut. ``cut`` [front, back] for all, or per client in ``cuts``; else devices.

    Clients take the devices in turn, in order of their names, unless ``assign`` says otherwise.
    """

    labels: Literal["keep", "logits", "loss"] = "keep"
    cut: tuple[int, int] | None = None
    cuts: Mapping[str, tuple[int, int]] = {}
    devices: tuple[DeviceRecipe, ...] = ()
    assign: Mapping[str, str] = {}
    goal: Literal["memory_only", "static", "random"] = "memory_only"
    min_back: Annotated[int, Field(ge=0)] = 0
    max_depth: Annotated[int, Field(ge=1)] | None = None


class StrategyRecipe(BaseModel):
    """The method and its options; which options there are is the method's to say."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "flexp"

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


class EvaluateRecipe(_Part):
    """When models are scored (0: only at the end), and how many test rows each client pools."""

    every: Annotated[int, Field(ge=0)] = 0
    global_rows: Annotated[int, Field(ge=1)] | None = None


class PrivacyRecipe(_Part):
    """The profile: what the run may let the server see."""

    profile: Literal["u-shape", "open", "dp-local"] = "u-shape"


class Recipe(_Part):
    """One run."""

    name: str = "run"
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
    evaluate: EvaluateRecipe = EvaluateRecipe()
    privacy: PrivacyRecipe = PrivacyRecipe()
    out: str = "runs"

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


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys and without aliases (a small file of them can be enormous)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise RecipeError(f"line {event.start_mark.line + 1}: aliases (*name) are not allowed.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                line = key.start_mark.line + 1
                raise RecipeError(f'line {line}: "{name}" is given twice. Remove one of them.')
            seen.add(name)
        return super().construct_mapping(node, deep)


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides like ``train.lr=1e-4``. Raises RecipeError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: a recipe has at most {MAX_BYTES} bytes.")
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise RecipeError(f"{path}: {problem.strerror}. Check the recipe's path.") from problem
    except UnicodeDecodeError as problem:
        raise RecipeError(f"{path}: not UTF-8 at byte {problem.start}.") from problem
    plain = parse(text, str(path))
    return make(override(plain, overrides), str(path))


def parse(text: str, where: str) -> dict[str, Any]:
    """YAML as plain data; RecipeError names the line."""
    try:
        loader = _Loader(text)
        try:
            plain = loader.get_single_data()
        finally:
            loader.dispose()
    except RecipeError as problem:
        raise RecipeError(f"{where}: {problem}") from problem
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(problem, "problem", None) or "not YAML"
        raise RecipeError(f"{where}{line}: {what}.") from problem
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of names to values.")
    return cast("dict[str, Any]", plain)


def override(plain: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    """Sets dotted names: values are YAML.

    >>> override({"train": {"lr": 1}}, ["train.lr=0.5", "rounds=2"])
    {'train': {'lr': 0.5}, 'rounds': 2}
    """
    out = json.loads(json.dumps(plain))
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise RecipeError(f'"{pair}" is not an override. Write name=value, as train.lr=1e-4.')
        here = out
        *path, last = name.split(".")
        for step in path:
            here = here.setdefault(step, {})
            if not isinstance(here, dict):
                raise RecipeError(f'"{pair}": "{step}" holds a value, not named fields.')
        here[last] = parse(f"v: {value}", pair)["v"]
        if isinstance(here[last], str):
            # YAML 1.1 reads 1e-4 as text; people mean the number.
            try:
                here[last] = float(here[last])
            except ValueError:
                pass
    return out


def make(plain: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validates plain data; a RecipeError lists every problem, unknown keys with the nearest."""
    try:
        return Recipe.model_validate(plain)
    except ValidationError as problem:
        lines = [_sentence(dict(one)) for one in problem.errors()]
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from problem


def _sentence(one: Mapping[str, Any]) -> str:
    loc = [str(part) for part in one["loc"]]
    name = ".".join(loc)
    if one["type"] == "extra_forbidden":
        return f'unknown key "{name}". {nearest(loc[-1], _fields(loc[:-1]))}'
    message = str(one["msg"]).removeprefix("Value error, ")
    given = f" (given: {one['input']!r})" if name and not isinstance(one["input"], dict) else ""
    return f"{name or 'recipe'}: {message}{given}."


def _fields(path: Sequence[str]) -> list[str]:
    part: Any = Recipe
    for step in path:
        field = part.model_fields.get(step) if hasattr(part, "model_fields") else None
        if field is None:
            break
        inner = field.annotation
        args = getattr(inner, "__args__", ())
        part = args[0] if args else inner
    return list(getattr(part, "model_fields", {}))


def _leaves(stem: str, plain: Any) -> list[tuple[str, Any]]:
    if isinstance(plain, Mapping):
        held = cast("Mapping[str, Any]", plain)
        return [
            pair
            for key, value in held.items()
            for pair in _leaves(f"{stem}.{key}" if stem else str(key), value)
        ]
    return [(stem, plain)]
