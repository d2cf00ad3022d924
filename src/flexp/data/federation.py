"""From a recipe's data part to a shard per client, checked before anything else starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from flexp.data import partition
from flexp.data.columns import cell_of, in_order, label_names, label_of, text_of
from flexp.data.examples import Shard
from flexp.data.images import Pixels
from flexp.data.objectives import Objective, objective_of
from flexp.data.shards import check
from flexp.data.sources import SPLITS, Row
from flexp.data.tasks import CausalLM, Classification, Task
from flexp.dice import Dice
from flexp.errors import DataError, nearest
from flexp.parcel import file_name
from flexp.recipe import DataRecipe, TaskRecipe
from flexp.recipe_clients import ClientRecipe, OwnTaskRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_NAME = 200  # bytes of a client's name as that of a file; systems take 255 with an ending


@dataclass(frozen=True)
class Federation:
    """Everybody's shards, the recipe's task, and what was noticed about the data.

    ``own`` are the tasks of clients that have another one, ``objectives`` what clients minimise
    that do not take their task's loss.
    """

    shards: Mapping[str, Shard]
    task: Task
    findings: tuple[str, ...]
    skew: float | None
    own: Mapping[str, Task] = field(default_factory=dict[str, Task])
    objectives: Mapping[str, Objective] = field(default_factory=dict[str, Objective])

    def task_of(self, client: str) -> Task:
        """What a client learns."""
        return self.own.get(client, self.task)


Space = tuple[str, ...]  # the kind of a task, then its labels


def space_of(task: Task) -> Space:
    """What two clients must have in common for their heads to mean the same."""
    return (task.name, *(task.labels if isinstance(task, Classification) else ()))


def make_task(
    recipe: TaskRecipe,
    data: DataRecipe,
    tokenizer: PreTrainedTokenizerBase | Pixels,
    labels: tuple[str, ...],
) -> Task:
    """The task of a recipe; DataError for one of texts among images, or of images among texts."""
    if (recipe.kind == "images") != isinstance(tokenizer, Pixels):
        raise DataError("task.kind: one run has texts or images, not both. Give all clients one.")
    if isinstance(tokenizer, Pixels):
        return Classification(labels, tokenizer, data.image, data.label)
    if recipe.kind == "classification":
        return Classification(labels, tokenizer, data.text, data.label, recipe.max_length)
    return CausalLM(tokenizer, data.text, data.prompt, recipe.max_length)


def labels_of(rows: Sequence[Row], task: TaskRecipe, data: DataRecipe) -> tuple[str, ...]:
    """The label names of a classification: the recipe's, else those of the rows."""
    if task.kind == "causal-lm":
        return ()
    return task.labels or label_names(rows, data.label)


def federate(
    rows: Sequence[Row],
    data: DataRecipe,
    task_recipe: TaskRecipe,
    tokenizer: PreTrainedTokenizerBase | Pixels,
    dice: Dice,
    *,
    clients: Mapping[str, ClientRecipe] | None = None,
) -> Federation:
    """Shards of all clients. Raises DataError for rows and partitions that cannot be used."""
    parts, clients = divide(rows, data, task_recipe, dice), clients or {}
    for client in clients:
        if client not in parts:
            raise DataError(f'clients: no client "{client}". {nearest(client, parts)}')
    alike = {c: held for c, held in parts.items() if not has_own(clients.get(c))}
    common = [rows[n] for held in (alike or parts).values() for n in held]
    labels = labels_of(common if clients else rows, task_recipe, data)
    task = make_task(task_recipe, data, tokenizer, labels)
    own = {
        client: own_task(clients[client], task_recipe, data, task, [rows[n] for n in held])
        for client, held in parts.items()
        if client not in alike
    }
    shards: dict[str, Shard] = {}
    for client, held in parts.items():
        shards[client] = shard_of(client, rows, held, data, dice=dice, task=own.get(client, task))
    findings = check(shards, task, own, one_class=data.one_class)
    objectives = {
        client: objective_of(asked.objective, own.get(client, task), shards[client].train, client)
        for client, asked in clients.items()
        if asked.objective is not None
    }
    skew = _skew(rows, data, alike) if labels and alike else None
    return Federation(shards, task, tuple(findings), skew, own, objectives)


def shard_of(
    client: str, rows: Sequence[Row], held: list[int], data: DataRecipe, *, dice: Dice, task: Task
) -> Shard:
    """A client's shard: those of its rows that count, split and encoded.

    It depends on its own rows alone, so a client that has them by itself makes the same shard.
    """
    train, val, test = (
        task.encode([rows[n] for n in chosen]) for chosen in places(client, rows, held, data, dice)
    )
    return Shard(train, val, test)


def places(
    client: str, rows: Sequence[Row], held: list[int], data: DataRecipe, dice: Dice
) -> tuple[list[int], list[int], list[int]]:
    """Which of a client's rows are for training, validation and test."""
    return _places(rows, _capped(held, data, dice, client), data, dice, client)


def own_task(
    asked: ClientRecipe, recipe: TaskRecipe, data: DataRecipe, shared: Task, rows: Sequence[Row]
) -> Task:
    """A client's own task: what it does not say is the recipe's; its labels may be its rows'."""
    told = asked.task or OwnTaskRecipe()
    columns = {k: getattr(asked, k) for k in ("text", "image", "label", "prompt")}
    data = data.model_copy(update={k: v for k, v in columns.items() if v is not None})
    mine = told.model_dump(exclude_none=True)
    if told.labels is None and asked.label is None and told.kind in (None, recipe.kind):
        mine["labels"] = getattr(shared, "labels", ())
    elif told.labels is None:
        mine["labels"] = ()
    recipe = recipe.model_copy(update=mine)
    labels = labels_of(rows, recipe, data)
    return make_task(recipe, data, cast("Any", shared).tokenizer, labels)


def has_own(asked: ClientRecipe | None) -> bool:
    """Whether a client's task or columns differ from the recipe's."""
    return asked is not None and any(
        (asked.task, asked.text, asked.image, asked.label, asked.prompt)
    )


def _skew(rows: Sequence[Row], data: DataRecipe, parts: Mapping[str, list[int]]) -> float:
    """The label skew of the clients with the recipe's task."""
    used = sorted(n for held in parts.values() for n in held)
    place = {n: at for at, n in enumerate(used)}
    names = [label_of(rows[n], data.label) for n in used]
    return partition.skew(names, {c: [place[n] for n in held] for c, held in parts.items()})


def divide(
    rows: Sequence[Row], data: DataRecipe, task: TaskRecipe, dice: Dice
) -> dict[str, list[int]]:
    """Row numbers by client."""
    stream = dice("partition").generator()
    column = data.client or ("client" if rows and "client" in rows[0].fields else None)
    kind = data.partition
    if kind == "auto":
        kind = "column" if column else "iid"
    if kind == "column":
        if column is None:
            raise DataError('data.partition "column" needs data.client, the column of clients.')
        parts = partition.by_column([cell_of(row, column) for row in rows])
        for client, held in parts.items():
            _presentable(client, rows[held[0]], column)
        return _biggest(parts, rows, data, task) if data.biggest else parts
    if data.biggest:
        raise DataError('data.biggest chooses among named clients: it needs partition "column".')
    if kind == "iid":
        return partition.iid(len(rows), data.clients, stream)
    if kind == "quantity":
        return partition.quantity(len(rows), data.clients, data.alpha, stream, minimum=data.minimum)
    if task.kind == "causal-lm":
        raise DataError(f'data.partition "{kind}" needs labels. Use column, iid or quantity.')
    names = [label_of(row, data.label) for row in rows]
    if kind == "dirichlet":
        return partition.dirichlet(names, data.clients, data.alpha, stream, minimum=data.minimum)
    if kind == "shards":
        return partition.shards(names, data.clients, data.per_client, stream)
    each = data.rows or len(rows) // data.clients
    if kind == "dominant":
        known = task.labels or in_order(set(names))
        wanted = partition.dominant(known, data.clients, data.per_client, data.share, each)
        return partition.counted(names, wanted, stream)
    groups = [str(cell_of(row, data.group)) if data.group else "" for row in rows]
    return partition.label_skew(names, groups, data.clients, each, data.alpha, stream)


def label_table(federation: Federation) -> list[tuple[str, int, int, int, dict[str, int]]]:
    """Client, rows of train, validation and test, and how often each label is in train."""
    out: list[tuple[str, int, int, int, dict[str, int]]] = []
    for client, shard in federation.shards.items():
        counts: dict[str, int] = {}
        task = federation.task_of(client)
        if isinstance(task, Classification):
            found = Counter(label for label in shard.train.labels if isinstance(label, int))
            counts = {name: found.get(n, 0) for n, name in enumerate(task.labels)}
        out.append((client, len(shard.train), len(shard.val), len(shard.test), counts))
    return out


def _presentable(client: str, row: Row, column: str) -> None:
    """Refuse a client that no file can be named after; most likely the column is another one."""
    if not client.isprintable() or len(file_name(client)) > LONGEST_NAME:
        raise DataError(
            f'{row.origin}: column "{column}" holds what no client can be called: line ends, or '
            f"more than {LONGEST_NAME} bytes as a file name. Name the column of clients."
        )


def _biggest(
    parts: dict[str, list[int]], rows: Sequence[Row], data: DataRecipe, task: TaskRecipe
) -> dict[str, list[int]]:
    """The clients with most text, in characters, or most images; of equals the first by name."""

    def size(client: str) -> tuple[int, str]:
        if task.kind == "images":
            return -len(parts[client]), client
        return -sum(len(text_of(rows[n], data.text)) for n in parts[client]), client

    kept = sorted(parts, key=size)[: data.biggest]
    return {client: parts[client] for client in sorted(kept)}


def _capped(held: list[int], data: DataRecipe, dice: Dice, client: str) -> list[int]:
    if data.rows is None or len(held) <= data.rows:
        return held
    return [held[n] for n in dice("rows", client=client).choose(len(held), data.rows)]


def _places(
    rows: Sequence[Row], held: list[int], data: DataRecipe, dice: Dice, client: str
) -> tuple[list[int], list[int], list[int]]:
    """Rows of train, validation and test: as the source says, else drawn."""
    if held and all("split" in rows[n].fields for n in held):
        named = [[n for n in held if rows[n].fields["split"] == name] for name in SPLITS]
        return named[0], named[1], named[2]
    try:
        return partition.split(held, data.split, dice("split", client=client).generator())
    except DataError as problem:
        raise DataError(f'Client "{client}": {problem}') from problem
