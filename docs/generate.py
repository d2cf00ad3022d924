"""Writes the reference pages from the code: recipe, methods, command line, events.

.venv/bin/python docs/generate.py
"""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from flexp import commands, events
from flexp.cli import app
from flexp.privacy.egress import Egress
from flexp.recipe import DeviceRecipe, Recipe
from flexp.recipe_clients import (
    ChangeRecipe,
    ClientRecipe,
    ObjectiveRecipe,
    OwnTaskRecipe,
    ParticipationRecipe,
)
from flexp.strategies import BUILT_IN
from flexp.tensors import Place

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py; change the code or docs/keys.yaml, then run it. -->\n"
SENT = """Whatever the method. In the V-shape `grad` is also the gradient of the logits. Beside
tensors, shapes and a method's facts go along (mean loss, steps, skipped steps, rows).
"""
BY_CLIENT: dict[str, type[BaseModel]] = {
    "participation": ParticipationRecipe,
    "clients": ClientRecipe,
    "clients.task": OwnTaskRecipe,
    "clients.objective": ObjectiveRecipe,
}
WORDS: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def main() -> None:
    for name, text in pages().items():
        (HERE / "reference" / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Every generated page by its file name in ``reference/``."""
    made = {"recipe.md": recipe, "methods.md": methods, "cli.md": cli, "events.md": told}
    return {name: make() for name, make in made.items()}


# ---- recipe


def recipe() -> str:
    """All keys, with types and defaults from the models and meanings from ``keys.yaml``."""
    meanings: dict[str, str] = yaml.safe_load((HERE / "keys.yaml").read_text("utf-8"))
    used: set[str] = set()
    parts = {name: part for name, info in Recipe.model_fields.items() if (part := part_of(info))}
    text = f"""{NOTE}
# Recipes

A YAML file. Unknown keys are errors; what is not written has its default. On the command line
`key=value` changes a key, as `train.lr=1e-4`; the value is YAML.
"""
    top = {k: v for k, v in Recipe.model_fields.items() if k not in parts}
    text += f"\n## Top level\n\n{keys('', top, meanings, used)}"
    for name, part in parts.items():
        text += (
            f"\n## {name}\n\n{prose(part)}\n\n{keys(f'{name}.', part.model_fields, meanings, used)}"
        )
        if name == "plan":
            for inner_name, inside in (("devices", DeviceRecipe), ("changes", ChangeRecipe)):
                inner = keys(f"plan.{inner_name}.", inside.model_fields, meanings, used)
                text += f"\n### plan.{inner_name}\n\nA list. {prose(inside)}\n\n{inner}"
    for name, inside in BY_CLIENT.items():
        inner = keys(f"{name}.", inside.model_fields, meanings, used)
        text += (
            f"\n{'##' if name in top else '###'} {name}\n\nBy client. {prose(inside)}\n\n{inner}"
        )
    if unknown := meanings.keys() - used:
        raise KeyError(f"docs/keys.yaml explains keys that no recipe has: {sorted(unknown)}")
    return text


def part_of(info: FieldInfo) -> type[BaseModel] | None:
    """The model of a nested part of the recipe."""
    kind = info.annotation
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def keys(
    stem: str, found: Mapping[str, FieldInfo], meanings: Mapping[str, str], used: set[str]
) -> str:
    """A table of keys; KeyError for one that ``keys.yaml`` does not explain."""
    rows: list[list[str]] = []
    for name, info in found.items():
        full = f"{stem}{name}"
        if full not in meanings:
            raise KeyError(f'docs/keys.yaml does not say what "{full}" means.')
        used.add(full)
        default = "required" if info.is_required() else f"`{value(info.get_default())}`"
        rows.append([f"`{full}`", takes(info.annotation, info.metadata), default, meanings[full]])
    return table(["key", "takes", "default", "meaning"], rows)


def takes(kind: Any, limits: Iterable[Any] = ()) -> str:
    """What a field takes, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [m for a in args[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return takes(args[0], inner)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(takes(one, limits) for one in args if one is not type(None))
    if origin is tuple:
        inside = args[:1] if args[-1] is ... else args
        words = ", ".join(takes(one) for one in inside)
        return f"list of {words}" if args[-1] is ... else f"[{words}]"
    if origin is not None and issubclass(origin, Mapping):
        return f"names to {takes(args[1])}"
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return "mappings"
    return WORDS[kind] + "".join(limit(one) for one in limits)


def limit(one: Any) -> str:
    """A bound of a number, as pydantic keeps it."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(one, name)}" for name, sign in signs.items() if hasattr(one, name)]
    return f", {' and '.join(found)}" if found else ""


def value(default: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(default, str):
        return default
    return json.dumps(default, default=list)


# ---- methods


def methods() -> str:
    """The listing of ``flexp methods``, then each method's own words."""
    own = {method.name: method for method in BUILT_IN}
    found = [row for row in commands.listing() if row["method"] in own]
    rows = [
        [
            f"[`{m['method']}`](#{m['method']})",
            m["kind"],
            m["does"],
            m["reference"],
            m["split"],
            m["personal"],
            "; ".join(f"`{one['what']}` ({one['part']}): {one['why']}" for one in m["leaves"])
            or "–",
            m["reconstruction"] or "–",
        ]
        for m in found
    ]
    heads = [
        "method",
        "kind",
        "what it does",
        "reference",
        "on a cut",
        "personal",
        "leaves a client, beyond the cut's own",
        "reconstruction",
    ]
    text = f"{NOTE}\n# Methods\n\nWhat `flexp methods` lists.\n\n{table(heads, rows)}"
    text += f"\n## What the cut itself sends\n\n{SENT}\n{structural()}"
    for m in found:
        method = own[m["method"]]
        module = sys.modules[method.__module__]
        file = module.__name__.replace(".", "/")
        text += f"\n## {m['method']}\n\n`src/{file}.py`\n\n```text\n{inspect.getdoc(module)}\n```\n"
        if m["options"]:
            options = [[f"`strategy.{k}`", f"`{value(v)}`"] for k, v in m["options"].items()]
            text += f"\n{prose(method)}\n\n{table(['option', 'default'], options)}"
    return text


def structural() -> str:
    """What leaves a client by the cut alone."""
    near = Place("near", "front", 0, 1)
    first = Egress((), "keep", "open", lambda name: near).structural()
    all_of_it = Egress((), "loss", "open", lambda name: near, frozenset(["x"])).structural()
    under = {"labels": "`plan.labels: loss`", "slot/*": "`plan.changes`, `participation`"}
    rows = [
        [f"`{one.what}`", one.when, one.why, "always" if one in first else under[one.what]]
        for one in all_of_it
    ]
    return table(["what", "when", "why", "under"], rows)


# ---- command line


def cli() -> str:
    """Every command with its arguments and options, from the application itself."""
    group: Any = get_command(app)
    text = f"""{NOTE}
# The command line

`flexp COMMAND --help` says the same. Exit codes: 0 done; 1 `assets verify` found something; 2 an
error that the message tells how to mend; 130 stopped by Ctrl-C.
"""
    for name, command in leaves(group):
        usage, rows = [f"flexp {name}"], list[list[str]]()
        for one in command.params:
            argument = one.param_type_name == "argument"
            label = one.name.upper() + ("..." if one.nargs == -1 else "")
            if not argument:
                label = one.opts[0] + ("" if one.is_flag else f" {one.name.upper()}")
            usage.append(label if one.required else f"[{label}]")
            plain = one.default is None or one.default is False or one.required
            rows.append([f"`{label}`", one.help, "" if plain else f"`{one.default}`"])
        text += f"\n## {name}\n\n{command.help}\n\n```text\n{' '.join(usage)}\n```\n\n"
        text += table(["argument or option", "meaning", "default"], rows)
    return text


def leaves(group: Any, stem: str = "") -> Iterator[tuple[str, Any]]:
    """Commands by what is typed, those of groups within as well."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{stem}{name} ")
        else:
            yield f"{stem}{name}", command


# ---- events


def told() -> str:
    """Every kind of line in ``events.jsonl``."""
    text = f"""{NOTE}
# Events

Each line of `events.jsonl` is one JSON object: `event` (the name), `at` (seconds since 1970) and
the fields below. Rounds and waves count from 0. NaN is written as null, infinity as text.
`flexp.events.read(path)` gives them back as objects.
"""
    rows = [
        [
            f"`{kind.__name__}`",
            prose(kind),
            ", ".join(f"`{f.name}: {f.type}`" for f in fields(kind)),
        ]
        for kind in events.Event.__args__
    ]
    return f"{text}\n{table(['event', 'when', 'fields'], rows)}"


# ---- Markdown


def prose(thing: Any) -> str:
    """A docstring as Markdown."""
    return (inspect.getdoc(thing) or "").replace("``", "`")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in x)} |\n" for x in lines)


if __name__ == "__main__":
    main()
