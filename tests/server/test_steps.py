"""The step table: every key runs once, whatever the network repeats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexp.errors import StepError
from flexp.link.messages import Answer, Phase, StepKey
from flexp.server import steps
from flexp.server.steps import KEPT, StepTable


def key(step: int, call: int = 1, phase: Phase = "do", round: int = 0, wave: int = 0) -> StepKey:
    return StepKey("run", round, wave, step, call, phase)


class Count:
    """An answer that tells how often it was computed."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self) -> Answer:
        self.ran += 1
        return Answer({"n": torch.tensor(self.ran)})


def once(table: StepTable, key: StepKey, digest: str, work: Callable[[], Answer]) -> Answer:
    """What the trunk does with a message."""
    found = table.find(key, digest)
    if found is None:
        found = work()
        table.keep(key, digest, found)
    return found


def test_a_repeated_message_gets_the_answer_it_got_before() -> None:
    table, work = StepTable(), Count()
    first = once(table, key(0), "digest", work)
    assert once(table, key(0), "digest", work) is first
    assert work.ran == 1


def test_another_message_under_the_same_key_is_refused() -> None:
    table, work = StepTable(), Count()
    once(table, key(0), "digest", work)
    with pytest.raises(StepError, match="different message"):
        once(table, key(0), "other", work)
    assert work.ran == 1


@pytest.mark.parametrize(
    "late",
    [key(2), key(4, wave=0), key(9, round=0, wave=5)],
    ids=["step", "wave", "round"],
)
def test_a_message_from_a_step_that_is_over_is_refused(late: StepKey) -> None:
    table, work = StepTable(), Count()
    once(table, key(3, wave=1, round=1), "digest", work)
    with pytest.raises(StepError, match="is over"):
        once(table, late, "digest", work)
    assert work.ran == 1


def test_phases_and_calls_of_one_step_are_messages_of_their_own() -> None:
    table, work = StepTable(), Count()
    keys = [key(0), key(0, call=2), key(0, phase="forward"), key(0, phase="backward")]
    for one in keys:
        once(table, one, "digest", work)
    assert work.ran == 4


def test_answers_of_earlier_steps_are_dropped() -> None:
    table, work = StepTable(), Count()
    for step in range(5):
        once(table, key(step), "digest", work)
        once(table, key(step, call=2), "digest", work)
    assert [(k.step, k.call) for k in table.rows] == [(4, 1), (4, 2)]


def test_a_forward_may_come_behind_backwards_that_are_not_answered() -> None:
    """Then both are asked again; of two steps ago nothing is needed any more."""
    table, work = StepTable(), Count()
    for step in range(3):
        once(table, key(step, call=2 * step, phase="forward"), "digest", work)
        back = key(step, call=2 * step, phase="backward")
        answer = once(table, back, "digest", work)
        fore = key(step + 1, call=2 * step + 2, phase="forward")
        after = once(table, fore, "digest", work)
        ran = work.ran
        assert once(table, back, "digest", work) is answer
        assert once(table, fore, "digest", work) is after
        assert work.ran == ran
        with pytest.raises(StepError, match="is over"):
            once(table, key(step, call=2 * step, phase="forward"), "digest", work)
        with pytest.raises(StepError, match="is over"):
            once(table, key(step, call=2 * step + 1, phase="backward"), "digest", work)
    assert [k.phase for k in table.rows] == ["backward", "forward"]
    assert list(table.kept) == list(table.rows)


def test_a_message_that_failed_may_come_again() -> None:
    def fails() -> Answer:
        raise StepError("not now")

    table, work = StepTable(), Count()
    with pytest.raises(StepError, match="not now"):
        once(table, key(1), "digest", fails)
    once(table, key(0), "digest", work)  # the failed step did not count as begun
    once(table, key(1), "digest", work)
    assert work.ran == 2


def test_a_commit_drops_the_answers_but_not_what_is_over() -> None:
    table, work = StepTable(), Count()
    once(table, key(3), "digest", work)
    table.commit()
    assert table.rows == {}
    with pytest.raises(StepError, match="is over"):
        once(table, key(2), "digest", work)


def test_what_was_committed_does_not_run_again() -> None:
    table, work = StepTable(), Count()
    once(table, key(3), "digest", work)
    table.commit()
    with pytest.raises(StepError):
        once(table, key(3), "digest", work)  # late, from the network


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from("ab")), max_size=30)
)
def test_no_key_ever_runs_twice(sent: list[tuple[int, int, str]]) -> None:
    table, ran = StepTable(), dict[StepKey, str]()
    for step, call, digest in sent:
        one = key(step, call)
        work = Count()
        try:
            once(table, one, digest, work)
        except StepError:
            assert work.ran == 0
            continue
        assert work.ran == (0 if one in ran else 1)
        assert ran.setdefault(one, digest) == digest


def test_of_a_step_that_scores_a_whole_test_set_only_the_newest_answers_are_kept() -> None:
    """A client asks one thing after another: it has seen the answers before the last one."""
    table, work = StepTable(), Count()
    for call in range(1000):
        once(table, key(0, call=call), "digest", work)
    assert sum(answer is not None for _, answer in table.rows.values()) == len(table.kept) == KEPT
    assert once(table, key(0, call=999), "digest", work).tensors["n"] == 1000
    for digest, why in (("digest", "is gone"), ("other", "different message")):
        with pytest.raises(StepError, match=why):
            once(table, key(0, call=3), digest, work)
    assert work.ran == 1000  # nothing ran twice, whoever asked
    once(table, key(1), "digest", work)
    assert len(table.rows) == len(table.kept) == 1


def test_a_step_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MAX_ROWS", 20)
    table, work = StepTable(), Count()
    for call in range(20):
        once(table, key(0, call=call), "digest", work)
    with pytest.raises(StepError, match="More than 20 messages in step"):
        once(table, key(0, call=20), "digest", work)
    once(table, key(1, call=20), "digest", work)
    assert work.ran == 21
