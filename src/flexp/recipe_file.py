"""A recipe from YAML: loading, ``key=value`` overrides, and errors that name line and field.

Unknown keys are errors with the nearest name, and all problems of a recipe are told at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flexp.errors import RecipeError, nearest
from flexp.recipe import Recipe

MAX_BYTES = 1 << 20  # of a recipe file


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys and without aliases (a small file of them can be enormous)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        me = cast(Any, self)  # PyYAML has no types
        if me.check_event(yaml.events.AliasEvent):
            line = me.peek_event().start_mark.line + 1
            raise RecipeError(f"line {line}: aliases (*name) are not allowed.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = cast(Any, self).construct_object(key, deep=True)
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
        loader = cast(Any, _Loader(text))
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
    out: dict[str, Any] = json.loads(json.dumps(plain))
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise RecipeError(f'"{pair}" is not an override. Write name=value, as train.lr=1e-4.')
        here = out
        *path, last = name.split(".")
        for step in path:
            inner: Any = here.setdefault(step, {})
            if not isinstance(inner, dict):
                raise RecipeError(f'"{pair}": "{step}" holds a value, not named fields.')
            here = cast("dict[str, Any]", inner)
        here[last] = parse(f"v: {value}", pair)["v"]
        if isinstance(here[last], str):
            # YAML 1.1 reads 1e-4 as text; people mean the number.
            with suppress(ValueError):
                here[last] = float(here[last])
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
