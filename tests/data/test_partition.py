"""Partitions: disjoint, complete, bounded, repeatable, and never below the minimum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.data import partition
from flexp.errors import DataError

Parts = Mapping[str, Sequence[int]]
alphas = st.floats(1e-4, 1e4)
seeds = st.integers(0, 2**40)


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Labels, clients and a minimum that can be kept."""
    clients, minimum = draw(st.integers(1, 12)), draw(st.integers(0, 4))
    n = draw(st.integers(max(1, clients * minimum), clients * minimum + 60))
    return draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), clients, minimum


def deal(
    method: str, case: tuple[list[int], int, int], alpha: float, seed: int
) -> dict[str, list[int]]:
    labels, clients, minimum = case
    if method == "iid":
        return partition.iid(len(labels), clients, dice(seed))
    if method == "dirichlet":
        return partition.dirichlet(labels, clients, alpha, dice(seed), minimum=minimum)
    if method == "shards":
        return partition.shards(labels, clients, max(1, minimum), dice(seed))
    return partition.quantity(len(labels), clients, alpha, dice(seed), minimum=minimum)


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("method", ["iid", "dirichlet", "shards", "quantity"])
@given(case=labelled(), alpha=alphas, seed=seeds)
def test_every_row_goes_to_one_client(
    method: str, case: tuple[list[int], int, int], alpha: float, seed: int
) -> None:
    labels, clients, minimum = case
    if method in ("iid", "shards") and len(labels) < clients * max(1, minimum):
        with pytest.raises(DataError):
            deal(method, case, alpha, seed)
        return
    parts = deal(method, case, alpha, seed)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(labels)))
    assert all(rows == sorted(rows) for rows in parts.values())
    assert list(parts) == sorted(parts)
    assert len(parts) == clients
    assert min(map(len, parts.values())) >= minimum
    assert 0.0 <= partition.skew(labels, parts) <= 1.0
    assert parts == deal(method, case, alpha, seed)


@pytest.mark.parametrize(
    "method",
    [
        lambda seed: partition.iid(60, 4, dice(seed)),
        lambda seed: partition.dirichlet([0, 1, 2] * 20, 4, 0.5, dice(seed)),
        lambda seed: partition.shards([0, 1, 2] * 20, 4, 2, dice(seed)),
        lambda seed: partition.quantity(60, 4, 0.5, dice(seed)),
        lambda seed: partition.label_skew([0, 1, 2] * 20, ["a"] * 60, 4, 10, 0.5, dice(seed)),
    ],
)
def test_another_seed_is_another_partition(method: Callable[[int], Parts]) -> None:
    assert method(1) == method(1)
    assert method(1) != method(2)


def test_the_generator_moves_on() -> None:
    generator = dice()
    assert partition.iid(60, 4, generator) != partition.iid(60, 4, generator)


def test_the_global_seed_plays_no_part() -> None:
    torch.manual_seed(1)
    first = partition.dirichlet([0, 1] * 30, 4, 0.5, dice())
    state = torch.get_rng_state()
    assert partition.dirichlet([0, 1] * 30, 4, 0.5, dice()) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_client_names_sort_as_numbers() -> None:
    names = list(partition.iid(12, 12, dice()))
    assert names[0] == "client-00"
    assert names[-1] == "client-11"
    assert names == sorted(names)
    assert list(partition.iid(1, 1, dice())) == ["client-0"]


def test_iid_sizes_differ_by_one_at_most() -> None:
    assert sorted(map(len, partition.iid(11, 4, dice()).values())) == [2, 3, 3, 3]


def test_dirichlet_skew_follows_alpha() -> None:
    labels = [row % 5 for row in range(2000)]
    skews = [
        partition.skew(labels, partition.dirichlet(labels, 10, alpha, dice(3)))
        for alpha in (0.01, 1.0, 1000.0)
    ]
    assert skews[0] > 0.6 > skews[1] > 0.15 > 0.05 > skews[2]


def test_dirichlet_spread_is_that_of_the_distribution() -> None:
    # The share of one of 4 clients in Dirichlet(2) is Beta(2, 6): mean 1/4, variance 1/48.
    labels = [label for label in range(3000) for _ in range(20)]
    rows = partition.dirichlet(labels, 4, 2.0, dice(), minimum=0)["client-2"]
    shares = torch.bincount(torch.tensor(rows) // 20, minlength=3000) / 20
    assert shares.mean().item() == pytest.approx(1 / 4, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / 48, rel=0.1)


def test_dirichlet_ends_with_many_clients_and_hardly_any_alpha() -> None:
    # The usual rejection loop never ends here: one label, one winner, everybody else below 10.
    parts = partition.dirichlet([0] * 10_000, 1000, 1e-4, dice(), minimum=10)
    assert {len(rows) for rows in parts.values()} == {10}


def test_a_tiny_alpha_has_one_winner_not_a_tie() -> None:
    sizes = sorted(map(len, partition.quantity(1000, 10, 1e-4, dice(), minimum=0).values()))
    assert sizes == [0] * 9 + [1000]


def test_shards_hold_few_labels() -> None:
    labels = [row % 10 for row in range(1000)]
    parts = partition.shards(labels, 5, 2, dice())
    assert all(len({labels[row] for row in rows}) == 2 for rows in parts.values())
    assert {len(rows) for rows in parts.values()} == {200}


@given(values=st.lists(st.sampled_from(["north", "south", "a b", 3, True, 2.5]), min_size=1))
def test_by_column_keeps_every_row_under_its_value(values: list[str | int | float]) -> None:
    parts = partition.by_column(values)
    assert {row: name for name, rows in parts.items() for row in rows} == {
        row: str(value) for row, value in enumerate(values)
    }
    assert list(parts) == sorted(parts)


@pytest.mark.parametrize("nothing", [None, ""])
def test_by_column_needs_a_value(nothing: str | None) -> None:
    with pytest.raises(DataError, match="Row 2 has no value"):
        partition.by_column(["north", nothing])


def test_skew_by_hand() -> None:
    labels = ["a", "a", "b", "b"]
    assert partition.skew(labels, {"x": [0, 2], "y": [1, 3]}) == 0.0
    assert partition.skew(labels, {"x": [0, 1], "y": [2, 3]}) == 0.5
    # x (1/2, 1/2) and y (1, 0) against (2/3, 1/3): 1/6 and 1/3.
    assert partition.skew(labels, {"x": [0, 2], "y": [1]}) == pytest.approx(1 / 4)
    assert partition.skew(labels, {"x": [0, 2], "y": []}) == 0.0
    assert partition.skew(labels, {}) == 0.0


@given(
    n=st.integers(0, 200),
    weights=st.tuples(*[st.integers(0, 9)] * 3).filter(lambda weights: sum(weights) > 0),
    seed=seeds,
)
def test_split_is_disjoint_complete_and_fills_every_part(
    n: int, weights: tuple[int, int, int], seed: int
) -> None:
    train, val, test = (weight / sum(weights) for weight in weights)
    wanted = sum(weight > 0 for weight in weights)
    indices = list(range(100, 100 + 2 * n, 2))
    if n < wanted:
        with pytest.raises(DataError, match=f"{n} rows cannot be split into {wanted} parts"):
            partition.split(indices, (train, val, test), dice(seed))
        return
    parts = partition.split(indices, (train, val, test), dice(seed))
    assert sorted(row for part in parts for row in part) == indices
    assert [bool(part) for part in parts] == [weight > 0 for weight in weights]
    assert all(part == sorted(part) for part in parts)
    assert parts == partition.split(indices, (train, val, test), dice(seed))
    if n >= 60:
        sizes = [n * weight / sum(weights) for weight in weights]
        assert all(abs(len(part) - size) <= 2 for part, size in zip(parts, sizes, strict=True))


def test_split_sizes() -> None:
    train, val, test = partition.split(range(100), (0.8, 0.1, 0.1), dice())
    assert (len(train), len(val), len(test)) == (80, 10, 10)
    assert tuple(map(len, partition.split(range(3), (0.98, 0.01, 0.01), dice()))) == (1, 1, 1)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (0.0, 0.0, 0.0)])
def test_split_fractions_that_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="add up to 1"):
        partition.split(range(100), fractions, dice())


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 6), rows=st.integers(1, 10), extra=st.integers(0, 20), alpha=alphas,
    seed=seeds,
)  # fmt: skip
def test_label_skew_gives_every_client_rows_of_its_group(
    clients: int, rows: int, extra: int, alpha: float, seed: int
) -> None:
    names = ["z", "y", "x"]
    n = rows * clients + extra
    groups = [name for name in names for _ in range(n)]
    labels = [row % 4 for row in range(len(groups))]
    parts = partition.label_skew(labels, groups, clients, rows, alpha, dice(seed))
    taken = [row for part in parts.values() for row in part]
    assert len(set(taken)) == len(taken) == clients * rows
    for at, part in enumerate(parts.values()):
        assert len(part) == rows
        assert {groups[row] for row in part} == {sorted(names)[at % 3]}
    assert parts == partition.label_skew(labels, groups, clients, rows, alpha, dice(seed))


def test_label_skew_takes_everything_when_that_is_asked() -> None:
    # 2 clients x 50 rows of 100: whatever the first leaves, the second must take.
    parts = partition.label_skew(["a", "b"] * 50, ["g"] * 100, 2, 50, 1e-3, dice())
    assert sorted(row for rows in parts.values() for row in rows) == list(range(100))


def test_label_skew_follows_alpha() -> None:
    labels, groups = [row % 3 for row in range(6000)], ["g"] * 6000
    skews = [
        partition.skew(labels, partition.label_skew(labels, groups, 8, 100, alpha, dice()))
        for alpha in (0.05, 1000.0)
    ]
    assert skews[0] > 0.4 > 0.1 > skews[1]


def test_label_skew_draws_its_labels() -> None:
    counts = Counter[int]()
    labels = [row % 2 for row in range(4000)]
    for part in partition.label_skew(labels, ["g"] * 4000, 20, 50, 1e-4, dice()).values():
        (label,) = {labels[row] for row in part}
        counts[label] += 1
    assert set(counts) == {0, 1}


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: partition.iid(3, 4, dice()), "data.clients to 3 or less"),
        (lambda: partition.iid(0, 1, dice()), "0 rows are too few"),
        (lambda: partition.iid(3, 0, dice()), "1 client or more"),
        (
            lambda: partition.dirichlet([0] * 30, 4, 1.0, dice(), minimum=10),
            "data.clients to 3 or less, or data.minimum to 7 or less",
        ),
        (
            lambda: partition.quantity(9, 2, 1.0, dice(), minimum=10),
            "9 rows cannot give 2 clients 10 each. Set data.minimum to 4 or less",
        ),
        (
            lambda: partition.shards([0] * 7, 4, 2, dice()),
            "data.clients to 3 or less, or data.per_client to 1",
        ),
        (lambda: partition.shards([0] * 7, 4, 0, dice()), "at least 1 shard"),
        (lambda: partition.dirichlet([0, 1], 2, 0.0, dice()), "alpha is 0.0"),
        (lambda: partition.quantity(2, 2, float("nan"), dice()), "alpha is nan"),
        (
            lambda: partition.label_skew([0] * 9, ["a"] * 4 + ["b"] * 5, 3, 4, 1.0, dice()),
            "Group 1 of 2 has 4 rows for 2 clients of 4. Set data.rows to 2 or less",
        ),
        (lambda: partition.label_skew([0], ["a", "b"], 1, 1, 1.0, dice()), "one label per row"),
        (lambda: partition.label_skew([], [], 1, 1, 1.0, dice()), "1 or more of each"),
    ],
)
def test_what_cannot_be_dealt_names_what_can(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        refused()


def test_dominant_labels_as_in_pfsl() -> None:
    """Setting 2 of its README: 500 rows, 225 of each of two labels, 6 or 7 of each other one."""
    labels = [n % 10 for n in range(10 * 700)]
    wanted = partition.dominant(range(10), 10, 2, 0.9, 500)
    parts = partition.counted(labels, wanted, dice(1))
    for n, rows in enumerate(parts.values()):
        counts = Counter(labels[row] for row in rows)
        mine = [2 * n % 10, (2 * n + 1) % 10]
        assert len(rows) == 500
        assert [counts.pop(label) for label in mine] == [225, 225]
        assert set(counts.values()) == {6, 7}
    taken = [row for rows in parts.values() for row in rows]
    assert len(taken) == len(set(taken))
    assert parts != partition.counted(labels, wanted, dice(2))


def test_dominant_labels_alone_or_too_few_rows() -> None:
    assert partition.dominant("ab", 2, 2, 0.5, 4) == [{"a": 2, "b": 2}] * 2
    assert partition.dominant("abc", 1, 1, 1.0, 4) == [{"a": 4, "b": 0, "c": 0}]
    with pytest.raises(DataError, match=r"per_client"):
        partition.dominant("ab", 2, 3, 0.9, 4)
    with pytest.raises(DataError, match=r"Label 1 has 3 rows, but 8 are dealt"):
        partition.counted("aaab", partition.dominant("ab", 2, 1, 1.0, 4)[:1] * 2, dice(1))
