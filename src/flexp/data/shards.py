"""The last look at everybody's data before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from flexp.data.examples import Shard, Split
from flexp.data.tasks import Classification, Task
from flexp.errors import DataError


def check(
    shards: Mapping[str, Shard],
    task: Task,
    own: Mapping[str, Task] | None = None,
    *,
    one_class: Literal["refuse", "allow"] = "refuse",
) -> list[str]:
    """Findings in plain sentences; raises DataError for what would make the results wrong.

    ``own`` are the tasks of clients that have another than ``task``.

    Wrong are: no clients, a client without training rows, a row in two places, and, unless allowed,
    a client whose training rows are all of one class.
    """
    if not shards:
        raise DataError("There are no clients. Give data.path rows, or data.clients 1 or more.")
    for client, shard in shards.items():
        if not shard.rows:
            raise DataError(
                f'Client "{client}" has no training rows. Give it rows, raise data.minimum, '
                "or leave the client out."
            )
    _apart(shards)
    findings = [
        found
        for client, shard in shards.items()
        for found in _alike(client, shard, (own or {}).get(client, task))
    ]
    if findings and one_class == "refuse":
        raise DataError(
            f"{findings[0]} {_others(len(findings) - 1)}Raise data.alpha, give each client more "
            "rows, or say that it is meant: data.one_class: allow"
        )
    return findings


def _apart(shards: Mapping[str, Shard]) -> None:
    """Refuse a row, known by its origin, that is in two places."""
    seen: dict[str, str] = {}
    for client, shard in shards.items():
        for name in get_args(Split):
            place = f'{name} of client "{client}"'
            for origin in shard.split(name).origins:
                first = seen.setdefault(origin, place)
                if first != place:
                    raise DataError(
                        f"{origin} is in two places: {first} and {place}. "
                        "Every row belongs to one split of one client."
                    )


def _alike(client: str, shard: Shard, task: Task) -> list[str]:
    """A finding when a classifier would see one class only."""
    if not isinstance(task, Classification) or len(set(shard.train.labels)) != 1:
        return []
    label = next(label for label in shard.train.labels if isinstance(label, int))
    only = f"label {label + 1} of {len(task.labels)}"  # its name is from rows, and this is logged
    return [f'Client "{client}" has one class only in its {shard.rows} training rows: {only}.']


def _others(count: int) -> str:
    return f"So do {count} other clients. " if count > 1 else "So does another. " if count else ""
