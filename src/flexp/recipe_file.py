"""A recipe from YAML: loading, ``key=value`` overrides, and errors that name line and field.

Unknown keys are errors with the nearest name, and all problems of a recipe are told at once.
"""

from __future__ import annotations

import copy
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flexp.errors import RecipeError, nearest
from flexp.recipe import Recipe

MAX_BYTES = 1 << 20  # of a recipe file
MAX_NODES = 20_000  # names and values in it; PyYAML takes about 1 kB for each
MAX_DEPTH = 16  # of values within values
MAX_TOLD = 20  # problems in one message
_SHOWN = 80  # characters of a name or value in a message
_KINDS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "null"))
# YAML 1.1 reads 1e-4 as text; people mean the number.
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """Plain data from YAML: names are text as written, values are text, numbers, true and null.

    Without aliases (a small file of them can be enormous), tags, dates, merges, duplicate names,
    and more depth or more nodes than a recipe can have.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - how PyYAML is told
        first: [(tag, pattern) for tag, pattern in known if tag in _KINDS]
        for first, known in cast(Any, yaml.SafeLoader).yaml_implicit_resolvers.items()
    }
    depth, nodes = 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        me = cast(Any, self)  # PyYAML has no types
        event = me.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.events.AliasEvent):
            raise RecipeError(f"line {line}: aliases (*name) are not allowed.")
        if event.tag is not None:
            raise RecipeError(f"line {line}: tags (!name) are not allowed. Write the value alone.")
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH:
            raise RecipeError(f"line {line}: more than {MAX_DEPTH} values within each other.")
        if self.nodes > MAX_NODES:
            raise RecipeError(f"line {line}: more than {MAX_NODES} names and values.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return cast(Any, super()).construct_object(node, deep)
        except ValueError as problem:  # an integer of thousands of digits, say
            line = node.start_mark.line + 1
            raise RecipeError(f"line {line}: not a value that can be read.") from problem

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"line {line}: a name must be text, not a list or a mapping.")
            name = str(key.value)
            if name in found:
                raise RecipeError(
                    f'line {line}: "{name:.{_SHOWN}}" is given twice. Remove one of them.'
                )
            found[name] = self.construct_object(value, deep=True)
        return found


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides like ``train.lr=1e-4``. Raises RecipeError."""
    return make(override(load(path), overrides), str(path))


def load(path: Path) -> dict[str, Any]:
    """The plain data in a YAML file; RecipeError if there is none, or too much."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise RecipeError(f"{path}: not a file. Check the path.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise RecipeError(f"{path}: {problem.strerror}. Check the path.") from problem
    return parse_bytes(data, str(path))


def parse_bytes(data: bytes, where: str = "recipe") -> dict[str, Any]:
    """YAML in UTF-8 as plain data; RecipeError, and nothing else, names the line."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{where}: a recipe has at most {MAX_BYTES} bytes.")
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise RecipeError(
            f"{where}, line {line}: not UTF-8 at byte {problem.start} of the file. "
            "Save it as UTF-8."
        ) from problem
    return parse(text, where)


def parse(text: str, where: str) -> dict[str, Any]:
    """YAML as plain data; RecipeError names the line."""
    try:
        loader = cast(Any, _Loader(text))
        try:
            plain = loader.get_single_data()
        finally:
            loader.dispose()
    except RecipeError as problem:
        raise RecipeError(f"{where}, {problem}") from problem
    except yaml.YAMLError as problem:
        raise RecipeError(f"{where}{_told(problem, text)}.") from problem
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of names to values.")
    return cast("dict[str, Any]", plain)


def _told(problem: yaml.YAMLError, text: str) -> str:
    """Line and reason of what is not YAML."""
    if isinstance(problem, yaml.reader.ReaderError):
        line = text.count("\n", 0, problem.position) + 1
        return f", line {line}: a character (number {problem.character}) that YAML does not take"
    mark = getattr(problem, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    return f"{line}: {getattr(problem, 'problem', None) or 'not YAML'}"


def override(plain: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    """Sets dotted names: values are YAML.

    >>> override({"train": {"lr": 1}}, ["train.lr=0.5", "rounds=2"])
    {'train': {'lr': 0.5}, 'rounds': 2}
    """
    out: dict[str, Any] = copy.deepcopy(dict(plain))
    for pair in pairs:
        shown = f'"{pair:.{_SHOWN}}"'
        name, equals, value = pair.partition("=")
        *path, last = name.split(".")
        if not equals or not all((*path, last)) or len(path) >= MAX_DEPTH:
            raise RecipeError(f"{shown} is not an override. Write name=value, as train.lr=1e-4.")
        here = out
        for step in path:
            inner: Any = here.setdefault(step, {})
            if not isinstance(inner, dict):
                raise RecipeError(f'{shown}: "{step}" holds a value, not named fields.')
            here = cast("dict[str, Any]", inner)
        held = parse(f"v: {value}", shown)
        if len(held) > 1:
            raise RecipeError(f"{shown}: more than one value. Write one override for each.")
        here[last] = held["v"]
        if isinstance(here[last], str) and _NUMBER.fullmatch(here[last]):
            here[last] = float(here[last])
    return out


def make(plain: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validates plain data; a RecipeError lists every problem, unknown keys with the nearest."""
    try:
        return Recipe.model_validate(plain)
    except ValidationError as problem:
        found = problem.errors()
        lines = [_sentence(dict(one)) for one in found[:MAX_TOLD]]
        if found[MAX_TOLD:]:
            lines.append(f"and {len(found) - MAX_TOLD} more problems.")
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from problem


def _sentence(one: Mapping[str, Any]) -> str:
    loc = [f"{part!s:.{_SHOWN}}" for part in one["loc"]]
    name = ".".join(loc)
    if one["type"] == "extra_forbidden":
        return f'unknown key "{name}". {nearest(loc[-1], _fields(loc[:-1]))}'
    message = str(one["msg"]).removeprefix("Value error, ")
    given = (
        f" (given: {one['input']!r:.{_SHOWN}})"
        if name and not isinstance(one["input"], dict)
        else ""
    )
    return f"{name or 'recipe'}: {message}{given}."


def _fields(path: Sequence[str]) -> list[str]:
    """The fields of the part of a recipe at a path; keys and places of containers are steps."""
    part: type[BaseModel] = Recipe
    steps = iter(path)
    for step in steps:
        field = part.model_fields.get(step)
        inner = None if field is None else _part(field.annotation)
        if inner is None:
            return []
        if get_origin(field.annotation if field else None) in (Mapping, tuple):
            next(steps, None)
        part = inner
    return list(part.model_fields)


def _part(annotation: Any) -> type[BaseModel] | None:
    """The part within an annotation such as ``Mapping[str, Part]`` or ``Part | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_part(inner) for inner in get_args(annotation))
    return next((part for part in found if part is not None), None)
