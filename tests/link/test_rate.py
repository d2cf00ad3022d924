"""Token buckets, by a clock of the test's own."""

from __future__ import annotations

from fixtures_clock import Clock

from flexp.link.rate import PEERS, Buckets, Rate


def test_so_many_at_once_and_then_so_many_per_second(clock: Clock) -> None:
    buckets = Buckets(Rate(3, 2), clock)
    assert [buckets.ask("anna") for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    clock.now += 0.5
    assert [buckets.ask("anna"), buckets.ask("anna")] == [0, 0.5]
    clock.now += 1e6  # no more than the first time
    assert [buckets.ask("anna") for _ in range(4)] == [0, 0, 0, 0.5]


def test_one_peer_takes_nothing_from_another(clock: Clock) -> None:
    buckets = Buckets(Rate(1, 1), clock)
    assert [buckets.ask("anna"), buckets.ask("ben"), buckets.ask("anna")] == [0, 0, 1]


def test_what_is_spent_beyond_the_rate_is_waited_for(clock: Clock) -> None:
    buckets = Buckets(Rate(10, 5), clock)
    assert [buckets.spend("anna", n) for n in (10, 5, 5)] == [0, 1, 2]
    clock.now += 2
    assert buckets.spend("anna", 5) == 1


def test_whether_there_is_anything_takes_nothing(clock: Clock) -> None:
    buckets = Buckets(Rate(1, 0.25), clock)
    assert [buckets.empty("anna") for _ in range(3)] == [0, 0, 0]
    buckets.spend("anna")
    assert buckets.empty("anna") == 4


def test_of_many_peers_those_with_full_buckets_are_forgotten(clock: Clock) -> None:
    buckets = Buckets(Rate(2, 1), clock)
    for n in range(PEERS):
        buckets.ask(f"peer {n}")
    clock.now += 1
    buckets.spend("peer 7", 2)
    assert buckets.ask("one more") == 0
    assert set(buckets.held) == {"peer 7", "one more"}


def test_beyond_very_many_peers_all_others_share_one_bucket(clock: Clock) -> None:
    buckets = Buckets(Rate(1, 1), clock)
    for n in range(PEERS):
        assert buckets.ask(f"peer {n}") == 0
    assert [buckets.ask("x"), buckets.ask("y"), buckets.ask("z")] == [0, 1, 1]
    assert len(buckets.held) == PEERS + 1
