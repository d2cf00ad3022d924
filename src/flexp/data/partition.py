"""Partitions: which rows go to which client; pure functions that end, or say what would.

Every function returns sorted row numbers per client id; no row goes to two clients. All
randomness comes from the generator that the caller passes.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch

from flexp.errors import DataError

Parts = dict[str, list[int]]


def iid(n: int, clients: int, generator: torch.Generator) -> Parts:
    """All n rows in random order, dealt so that sizes differ by one at most."""
    _room(n, clients, 1)
    order = _shuffled(range(n), _stream(generator))
    return _named([order[client::clients] for client in range(clients)])


def dirichlet(
    labels: Sequence[str | int],
    clients: int,
    alpha: float,
    generator: torch.Generator,
    *,
    minimum: int = 1,
) -> Parts:
    """Every label spread over the clients by its own draw from Dirichlet(alpha) (Hsu et al., 2019).

    Clients below ``minimum`` rows are filled from the largest: one draw and at most
    clients x minimum moves, whatever alpha is.
    """
    _room(len(labels), clients, minimum)
    stream = _stream(generator)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for rows in _grouped(labels).values():
        cuts = _cuts(_draw(clients, alpha, stream), len(rows))
        order = _shuffled(rows, stream)
        for part, (start, end) in zip(parts, pairwise(cuts), strict=True):
            part.extend(order[start:end])
    return _named(_repaired(parts, minimum, stream))


def shards(
    labels: Sequence[str | int], clients: int, per_client: int, generator: torch.Generator
) -> Parts:
    """Rows sorted by label, cut into clients x per_client runs, dealt (McMahan et al., 2017)."""
    if per_client < 1:
        raise DataError(f"per_client is {per_client}. Give every client at least 1 shard.")
    _room(len(labels), clients, per_client, "data.per_client")
    stream = _stream(generator)
    order = [row for rows in _grouped(labels).values() for row in _shuffled(rows, stream)]
    count = clients * per_client
    runs = [order[len(order) * i // count : len(order) * (i + 1) // count] for i in range(count)]
    dealt = _shuffled(range(count), stream)
    return _named([[row for run in dealt[i::clients] for row in runs[run]] for i in range(clients)])


def by_column(values: Sequence[str | int | float | bool | None]) -> Parts:
    """Rows of one value to one client, which is named after it."""
    for row, value in enumerate(values):
        if value is None or value == "":
            raise DataError(
                f"Row {row + 1} has no value in the column that names its client. "
                "Fill it in, or remove the row."
            )
    return _grouped(values)


def quantity(
    n: int, clients: int, alpha: float, generator: torch.Generator, *, minimum: int = 1
) -> Parts:
    """Random rows in sizes drawn from Dirichlet(alpha), none below ``minimum``."""
    _room(n, clients, minimum)
    stream = _stream(generator)
    cuts = _cuts(_draw(clients, alpha, stream), n)
    order = _shuffled(range(n), stream)
    parts = [order[start:end] for start, end in pairwise(cuts)]
    return _named(_repaired(parts, minimum, stream))


def label_skew(  # noqa: PLR0917 - the experiment's own six quantities
    labels: Sequence[str | int],
    groups: Sequence[str],
    clients: int,
    rows: int,
    alpha: float,
    generator: torch.Generator,
) -> Parts:
    """``rows`` rows per client, of one group each, with labels drawn from Dirichlet(alpha).

    Client i takes group i modulo the number of groups, in name order. When a label of a group runs
    out, the rest of the draw goes to the labels that are left.
    """
    if clients < 1 or rows < 1 or not groups or len(labels) != len(groups):
        raise DataError(
            f"{clients} clients x {rows} rows, of {len(groups)} groups and {len(labels)} labels: "
            "ask for 1 or more of each, and give one group and one label per row."
        )
    stream = _stream(generator)
    names = sorted(set(groups))
    pools: dict[str, dict[str | int, list[int]]] = {name: {} for name in names}
    for row in _shuffled(range(len(labels)), stream):
        pools[groups[row]].setdefault(labels[row], []).append(row)
    for at, name in enumerate(names):
        sharing, held = len(range(at, clients, len(names))), groups.count(name)
        if sharing * rows > held:
            raise DataError(
                f"Group {at + 1} of {len(names)} has {held} rows for {sharing} clients of {rows}. "
                f"Set data.rows to {held // sharing} or less, or take fewer clients."
            )
    known = sorted(set(labels), key=str)
    parts: list[list[int]] = []
    for client in range(clients):
        share = dict(zip(known, _draw(len(known), alpha, stream), strict=True))
        parts.append(_taken(pools[names[client % len(names)]], share, rows, stream))
    return _named(parts)


def dominant(
    labels: Sequence[str | int], clients: int, per_client: int, share: float, rows: int
) -> list[dict[str | int, int]]:
    """How many of ``rows`` rows each client has of each label.

    ``per_client`` labels, the next ones in turn, have ``share`` of them between them in equal
    parts, the other labels the rest.
    """
    count = len(labels)
    if clients < 1 or not 0 < per_client <= count or rows < 1:
        raise DataError(
            f"{clients} clients x {rows} rows, {per_client} dominant of {count} labels: ask for 1 "
            "or more of each, and no more labels than there are (data.per_client)."
        )
    out: list[dict[str | int, int]] = []
    for client in range(clients):
        mine = [labels[(client * per_client + n) % count] for n in range(per_client)]
        others = [label for label in labels if label not in mine]
        whole = share if others else 1.0
        shares = [whole / per_client] * per_client + [(1 - whole) / max(1, len(others))] * len(
            others
        )
        sizes = [end - start for start, end in pairwise(_cuts(shares, rows))]
        out.append(dict(zip([*mine, *others], sizes, strict=True)))
    return out


def counted(
    labels: Sequence[str | int],
    wanted: Sequence[Mapping[str | int, int]],
    generator: torch.Generator,
) -> Parts:
    """Random rows of each label, as many as each client is to have."""
    stream = _stream(generator)
    pools: dict[str | int, list[int]] = {}
    for row in _shuffled(range(len(labels)), stream):
        pools.setdefault(labels[row], []).append(row)
    for at, label in enumerate(dict.fromkeys(label for each in wanted for label in each), start=1):
        asked, held = sum(each.get(label, 0) for each in wanted), len(pools.get(label, ()))
        if asked > held:
            raise DataError(
                f"Label {at} has {held} rows, but {asked} are dealt. Lower data.rows or "
                "data.clients."
            )
    return _named(
        [[pools[label].pop() for label, n in each.items() for _ in range(n)] for each in wanted]
    )


def split(
    indices: Sequence[int], fractions: tuple[float, float, float], generator: torch.Generator
) -> tuple[list[int], list[int], list[int]]:
    """Train, validation and test rows of one client; only a fraction of 0 leaves one empty."""
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise DataError(f"Split fractions {fractions} must not be negative, and must add up to 1.")
    wanted = [part for part, fraction in enumerate(fractions) if fraction > 0]
    n = len(indices)
    if n < len(wanted):
        raise DataError(
            f"{n} rows cannot be split into {len(wanted)} parts that each hold one. "
            "Give the client more rows, or set a split fraction to 0."
        )
    sizes = [max(1, math.floor(n * fraction)) if fraction > 0 else 0 for fraction in fractions]
    while sum(sizes) != n:
        step = 1 if sum(sizes) < n else -1
        movable = [part for part in wanted if sizes[part] + step > 0]
        sizes[max(movable, key=lambda part: step * (n * fractions[part] - sizes[part]))] += step
    order = _shuffled(indices, _stream(generator))
    train, val = sizes[0], sizes[0] + sizes[1]
    return sorted(order[:train]), sorted(order[train:val]), sorted(order[val:])


def skew(labels: Sequence[str | int], parts: Mapping[str, Sequence[int]]) -> float:
    """Mean total variation between a client's labels and everybody's: 0 alike, near 1 apart."""
    filled = [Counter(labels[row] for row in rows) for rows in parts.values() if rows]
    pooled = Counter(labels[row] for rows in parts.values() for row in rows)
    distances = [
        sum(abs(own[label] / own.total() - pooled[label] / pooled.total()) for label in pooled) / 2
        for own in filled
    ]
    return math.fsum(distances) / len(distances) if distances else 0.0


def _stream(generator: torch.Generator) -> random.Random:
    """A private stream; the standard library's gamma draws are public, torch's are not."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator).item()))


def _grouped(values: Iterable[object]) -> Parts:
    """Rows by the text of their value, in its order."""
    rows: Parts = {}
    for row, value in enumerate(values):
        rows.setdefault(str(value), []).append(row)
    return dict(sorted(rows.items()))


def _shuffled(rows: Iterable[int], stream: random.Random) -> list[int]:
    order = list(rows)
    stream.shuffle(order)
    return order


def _draw(size: int, alpha: float, stream: random.Random) -> list[float]:
    """One draw from the symmetric Dirichlet; in logarithms, as a small alpha ends in 0 / 0."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise DataError(f"alpha is {alpha}. Set it above 0: 0.1 is strong skew, 100 is hardly any.")
    # Gamma(a) = Gamma(a + 1) * U^(1/a); 1 - random() is never 0.
    logs = [
        math.log(stream.gammavariate(alpha + 1, 1.0)) + math.log(1.0 - stream.random()) / alpha
        for _ in range(size)
    ]
    largest = max(logs)
    shares = [math.exp(value - largest) for value in logs]
    total = math.fsum(shares)
    return [share / total for share in shares]


def _cuts(shares: Sequence[float], n: int) -> list[int]:
    """Where to cut n rows so that the pieces follow the shares: from 0 to n, never falling."""
    return [0, *(min(n, round(n * upto)) for upto in accumulate(shares[:-1])), n]


def _repaired(parts: list[list[int]], minimum: int, stream: random.Random) -> list[list[int]]:
    """Move random rows from the largest client until nobody is below the minimum."""
    for poor in parts:
        while len(poor) < minimum:
            rich = max(parts, key=len)
            poor.append(rich.pop(stream.randrange(len(rich))))
    return parts


def _taken(
    pool: dict[str | int, list[int]],
    share: Mapping[str | int, float],
    rows: int,
    stream: random.Random,
) -> list[int]:
    """Rows out of a group's pool, label by label as the share says while there are any."""
    taken: list[int] = []
    for _ in range(rows):
        left = sorted((label for label in pool if pool[label]), key=str)
        weights = [share[label] for label in left]
        # Nothing but labels with no share is left: take them as they are.
        usable = weights if sum(weights) > 0 else [float(len(pool[label])) for label in left]
        taken.append(pool[stream.choices(left, usable)[0]].pop())
    return taken


def _room(n: int, clients: int, minimum: int, name: str = "data.minimum") -> None:
    """Refuse what cannot be dealt, and name what can."""
    if clients < 1 or minimum < 0:
        raise DataError(
            f"{clients} clients with {minimum} rows at least: ask for 1 client or more."
        )
    if n < clients * minimum:
        ways = [f"data.clients to {n // minimum} or less"] if n >= minimum else []
        ways += [f"{name} to {n // clients} or less"] if n >= clients and minimum > 1 else []
        raise DataError(
            f"{n} rows cannot give {clients} clients {minimum} each. Set {', or '.join(ways)}."
            if ways
            else f"{n} rows are too few. Add rows."
        )


def _named(parts: Sequence[Iterable[int]]) -> Parts:
    width = len(str(len(parts) - 1))
    return {f"client-{at:0{width}d}": sorted(rows) for at, rows in enumerate(parts)}
