"""A client speaks through the server what its whole model would say, and nothing gets mixed up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from talkers import DEPTH, KIND, PROMPT, RECURRENT, SPEAKING, drawn, plain, talker
from toys import at_desk, backbone, cuts, same, shard, toy_task, whole, wrap

from flexp import export
from flexp.client.desk import Desk, Training
from flexp.client.speech import GREEDY, VARIED, Conversation, continue_text
from flexp.data.tokens import open_tokenizer, padding_of
from flexp.dice import Dice
from flexp.engine.base import assigned
from flexp.engine.local import LocalEngine
from flexp.errors import CutError, DataError, LinkError, ModelError, StepError
from flexp.link.messages import Answer, Continue, Leave, StepKey
from flexp.link.metered import Ledger
from flexp.model.adapter import Lora, Prompt
from flexp.model.backbone import Backbone
from flexp.model.cached import Cached
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Assign, Optim
from flexp.model.worn import read
from flexp.parcel import Parcel
from flexp.privacy.egress import Egress
from flexp.rounds import waves_of
from flexp.selection import NEAR, select
from flexp.server import talks
from flexp.strategies.base import Scene, Turn
from flexp.strategies.flexp import FlexP
from flexp.tensors import PerRow, Stacked, Tensors, Term, Wear

TOKENS = 12
U = Seat(Cut(1, 1))


@contextmanager
def desk_of(body: Backbone, seat: Seat, **more: Any) -> Generator[tuple[Desk, Ledger]]:
    """A desk whose slot is random everywhere."""
    kind = more.pop("kind", KIND)
    offer = Parcel({"personal": drawn(body, kind=kind)})
    with at_desk(body, seat, kind=kind, offer=offer, **more) as both:
        yield both


def says(desk: Desk, wear: Wear = "personal", **more: Any) -> list[int]:
    more = {"tokens": TOKENS, "manner": GREEDY, **more}
    return list(continue_text(desk, PROMPT, wear=wear, **more))


def alone(body: Backbone, adapter: Tensors, ids: Any = PROMPT) -> list[int]:
    """Greedy tokens of the whole model with that adapter, in one place."""
    blocks, given, out = Cached.open(body, worn=read(adapter, 6.0)), torch.tensor([ids]), []
    for _ in range(TOKENS):
        out.append(int(blocks.run({"input_ids": given})[0, -1].argmax()))
        given = torch.tensor([out[-1:]])
    return out


# ---- the same as the whole


@pytest.mark.parametrize("family", SPEAKING)
def test_every_seat_says_what_the_whole_model_says(family: str) -> None:
    body = talker(family)
    wanted = alone(body, drawn(body))
    seats = [*cuts(DEPTH), *cuts(DEPTH, "logits"), Seat(Cut(0, 1)), whole(DEPTH)]
    for seat in seats:
        with desk_of(body, seat) as (desk, _):
            assert says(desk) == wanted, seat


@pytest.mark.parametrize("seat", [*cuts(DEPTH), *cuts(DEPTH, "logits")], ids=str)
def test_logits_are_the_whole_models_bit_for_bit(seat: Seat) -> None:
    body = talker("llama")
    with desk_of(body, seat) as (desk, _):
        talk = Conversation(desk)
        blocks = Cached.open(body, worn=read(desk.whole(), 6.0))
        for ids in (PROMPT, (4,), (8, 1), (3,)):
            talk.text += ids
            right = blocks.run({"input_ids": torch.tensor([ids])})[0, -1]
            assert torch.equal(talk.logits(), right)


WEARS: tuple[Wear, ...] = (
    (Term("personal", 0.5), Term("other", 0.75)),
    (Term("personal", torch.tensor(0.25)), Term("other", torch.tensor(0.5))),
    Stacked((Term("personal", 0.5), Term("other", torch.tensor(0.5)))),
    PerRow(("other", "personal"), (1,)),
)


@pytest.mark.parametrize("wear", WEARS, ids=["mix", "learned", "stacked", "row"])
def test_whatever_is_worn_is_worn_on_both_sides(wear: Wear) -> None:
    body, found = talker("qwen3"), list[list[int]]()
    for seat in (U, Seat(Cut(2, 0)), whole(DEPTH)):
        with desk_of(body, seat) as (desk, _):
            desk.assign("other", (Term("personal", -1.5),))
            found.append(says(desk, wear))
            assert found[-1] != says(desk)[: len(found[-1])] or isinstance(wear, PerRow)
    assert found[0] == found[1] == found[2]


def test_a_worn_prompt_comes_before_the_text() -> None:
    body = talker("gpt2")
    found = list[list[int]]()
    for seat in (U, Seat(Cut(2, 0)), whole(DEPTH)):
        with desk_of(body, seat, kind=Prompt(4)) as (desk, _):
            talk = Conversation(desk)
            found.append(list(talk.answer(PROMPT, tokens=TOKENS, manner=GREEDY)))
            assert talk.front.length == 4 + len(PROMPT) + TOKENS - 1
            batch = toy_batch([*PROMPT, *found[-1]])
            with torch.no_grad():
                right = desk.model.logits(batch)[0, len(PROMPT) - 1 : -1].argmax(-1)
            assert found[-1] == right.tolist()
    assert found[0] == found[1] == found[2]


def toy_batch(ids: list[int]) -> Any:
    held = torch.tensor([ids])
    return type(
        "Held", (), {"inputs": {"input_ids": held, "attention_mask": torch.ones_like(held)}}
    )


def test_a_conversation_goes_on_from_what_was_said() -> None:
    body = talker("gemma3")
    with desk_of(body, U) as (desk, ledger):
        talk = Conversation(desk)
        first = list(talk.answer(PROMPT, tokens=3, manner=GREEDY))
        sent = ledger.kinds["up", "hidden"]
        second = list(talk.answer((6, 4), tokens=4, manner=GREEDY))
        wanted = continue_text(desk, (*PROMPT, *first, 6, 4), tokens=4, manner=GREEDY)
        assert ledger.kinds["up", "hidden"] - sent == (3 + 3) * body.width * 4
        assert second == list(wanted)


@pytest.mark.parametrize("manner", [GREEDY, VARIED], ids=["greedy", "varied"])
def test_trained_clients_say_what_their_exported_adapters_say(manner: Any, tmp_path: Path) -> None:
    """Two rounds on mixed cuts; then each exported adapter, by PEFT and ``generate``."""
    body = Backbone(plain("llama", 4), task="causal-lm")
    seats = {"c0": Seat(Cut(1, 0)), "c1": Seat(Cut(2, 1)), "c2": Seat(Cut(1, 2))}
    said = dict[str, list[int]]()
    with fleet(body, seats) as (engine, strategy, state, turn):
        for client in seats:
            work = assigned(strategy, engine, state, client, turn)
            with engine.visit(strategy, work, turn, Ledger()) as (desk, offer):
                wear = strategy.personal(desk, offer).adapter
                assert wear is not None
                said[client] = list(
                    continue_text(desk, PROMPT, tokens=TOKENS, wear=wear, manner=manner)
                )
                card = export.Card("toy", "causal-lm")
                export.write(tmp_path / client, desk.whole(wear), body, KIND, card)
            assert client not in engine.trunk.talks.held  # a visit leaves nothing
    for client, mine in said.items():
        worn: Any = export.open_with_peft(plain("llama", 4), tmp_path / client)
        ids = worn.generate(
            input_ids=torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            repetition_penalty=manner.repetition_penalty,
            no_repeat_ngram_size=manner.no_repeat_ngram_size,
            eos_token_id=None,
        )
        assert ids[0, len(PROMPT) :].tolist() == mine
    assert len({tuple(mine) for mine in said.values()}) == 3  # they are personal


@contextmanager
def fleet(body: Backbone, seats: dict[str, Seat]) -> Generator[tuple[Any, Any, Any, Turn]]:
    """A few clients after two rounds."""
    engine = LocalEngine(
        body,
        toy_task(body),
        {client: shard(n) for n, client in enumerate(seats, start=1)},
        kind=KIND,
        training=Training(Optim(lr=0.1), batch=4, steps=3),
        dice=Dice(0),
    )
    strategy: Any = FlexP()
    try:
        state = strategy.start(Scene(tuple(seats), seats, engine.initial, Dice(0)("strategy")))
        turns = [
            Turn(r, 2, 0, True, seats, {}, body.block_of, body.depth, tuple(seats))
            for r in range(3)
        ]
        for turn in turns[:2]:
            for _, found, merged in waves_of(strategy, engine, state, turn, Dice(0)("waves")):
                assert not any(arrival.failure for arrival in found)
                state = merged
        yield engine, strategy, state, turns[2]
    finally:
        engine.close()


# ---- exactly once, and nothing mixed up


def message(desk: Desk, hidden: Any, before: int, **more: Any) -> Continue:
    desk.session.next_step()
    number = desk.session.talks
    key = desk.session._key("continue")  # pyright: ignore[reportPrivateUsage]
    made = Continue(key, talk=number, wear="personal", hidden=hidden, before=before)
    return replace(made, **more)


def waves(body: Backbone, length: int, rows: int = 1) -> Any:
    return torch.sin(torch.arange(rows * length * body.width)).reshape(rows, length, body.width)


class Speaker:
    """A client whose conversation is written by hand."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.body = desk, desk.model.backbone
        self.link: Any = desk.session.link
        trunk = self.link.inner.handle.__self__
        self.held: dict[str, talks.Talk] = trunk.talks.held
        self.begin()

    def begin(self) -> None:
        desk = self.desk
        desk.session.begin_talk()
        self.send(self.next(4, 0))

    def next(self, length: int, before: int, **more: Any) -> Continue:
        return message(self.desk, waves(self.body, length), before, **more)

    def send(self, m: Continue) -> Answer:
        return self.link.send(m)

    @property
    def length(self) -> int:
        return self.held["me"].blocks.length


@pytest.fixture
def speaker() -> Generator[Speaker]:
    with desk_of(talker("llama"), U) as (desk, _):
        yield Speaker(desk)


def test_a_repeated_message_counts_once(speaker: Speaker) -> None:
    m = speaker.next(2, 4)
    first, again = speaker.send(m), speaker.send(m)
    assert torch.equal(first.tensors["hidden"], again.tensors["hidden"])
    assert speaker.length == 6
    speaker.send(speaker.next(1, 6))
    with pytest.raises(StepError, match="is over"):
        speaker.send(m)
    assert speaker.length == 7


REFUSED: dict[str, tuple[Callable[[Speaker], Continue], str]] = {
    "too far": (lambda s: s.next(1, 5), "after 5 positions, but conversation 1 has 4"),
    "once more": (lambda s: s.next(1, 3), "Begin a new one"),
    "from the start": (lambda s: s.next(1, 0), "Begin a new one"),
    "of another": (lambda s: s.next(1, 4, talk=2), "conversation 2 has 0"),
    "other wear": (lambda s: s.next(1, 4, wear=(Term("personal", 0.5),)), "the same all along"),
    "learned": (lambda s: s.next(1, 4, wear=(Term("personal", float("nan")),)), "numbers"),
    "rows": (lambda s: s.next(1, 4, wear=PerRow(("personal",), (0, 0))), "a text is one row"),
    "two rows": (lambda s: message(s.desk, waves(s.body, 1, 2), 4), r"\[1, length, 32\]"),
    "none": (lambda s: message(s.desk, waves(s.body, 0), 4), r"\[1, length, 32\]"),
    "narrow": (lambda s: message(s.desk, waves(s.body, 1)[..., :5], 4), r"\[1, length, 32\]"),
    "flat": (lambda s: message(s.desk, waves(s.body, 1)[0], 4), r"\[1, length, 32\]"),
    "nan": (lambda s: message(s.desk, waves(s.body, 1) * torch.nan, 4), "NaN or infinity"),
    "long": (lambda s: s.next(talks.MAX_POSITIONS - 3, 4), "at most 4096 positions"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(speaker: Speaker, what: str) -> None:
    made, why = REFUSED[what]
    before = speaker.held["me"]
    with pytest.raises(LinkError, match=why):
        speaker.send(made(speaker))
    assert speaker.held["me"] is before
    assert speaker.length == 4
    with desk_of(speaker.body, U) as (desk, _):
        other = Speaker(desk)
        right = other.send(other.next(2, 4)).tensors["hidden"]
    assert torch.equal(speaker.send(speaker.next(2, 4)).tensors["hidden"], right)


def test_a_new_conversation_takes_the_place_of_the_old(speaker: Speaker) -> None:
    old, cache = speaker.next(1, 4), weakref.ref(speaker.held["me"].blocks.past.layers[1])
    speaker.begin()
    gc.collect()
    assert cache() is None
    assert speaker.length == 4
    with pytest.raises(LinkError, match="Begin a new one"):
        speaker.send(replace(speaker.next(1, 5), talk=old.talk))
    assert list(speaker.held) == ["me"]


def test_far_keys_and_values_are_freed_when_the_client_leaves(speaker: Speaker) -> None:
    cache = weakref.ref(speaker.held["me"].blocks.past.layers[1])
    speaker.desk.session.leave()
    gc.collect()
    assert cache() is None
    assert not speaker.held


def test_far_keys_and_values_are_freed_when_the_client_joins_anew(speaker: Speaker) -> None:
    speaker.desk.session.join(U, {})
    assert not speaker.held


def test_two_clients_speak_in_turn() -> None:
    body = talker("gemma3")
    seats = {"c0": Seat(Cut(1, 0)), "c1": Seat(Cut(1, 1))}
    with fleet(body, seats) as (engine, strategy, state, turn), ExitStack() as stack:
        streams, wanted = list[Any](), list[list[int]]()
        for n, client in enumerate(seats):
            work = assigned(strategy, engine, state, client, turn)
            desk, _ = stack.enter_context(engine.visit(strategy, work, turn, Ledger()))
            given = (*PROMPT, n + 3)
            wanted.append(alone(body, desk.whole(), given))
            streams.append(continue_text(desk, given, tokens=TOKENS, manner=GREEDY))
        found = list(zip(*streams, strict=True))
        assert [list(one) for one in zip(*found, strict=True)] == wanted
        assert set(engine.trunk.talks.held) == set(seats)


def test_a_conversation_wears_what_the_slot_was_when_it_began() -> None:
    body = talker("llama")
    with desk_of(body, U) as (desk, _):
        wanted = says(desk)
        stream = continue_text(desk, PROMPT, tokens=TOKENS, manner=GREEDY)
        found = [next(stream) for _ in range(3)]
        desk.assign("personal", (Term("personal", -2.0),))
        desk.session.flush()
        assert found + list(stream) == wanted
        assert says(desk) != wanted


def test_operations_that_wait_come_before_a_conversation() -> None:
    body = talker("llama")
    with desk_of(body, U) as (desk, _):
        desk.assign("personal", (Term("personal", -2.0),))
        assert desk.session.waiting == [Assign("personal", (Term("personal", -2.0),))]
        found = says(desk)
        assert not desk.session.waiting
        assert found == alone(body, desk.whole())


def test_speaking_changes_no_slot() -> None:
    body = talker("llama")
    with desk_of(body, U) as (desk, _):
        before = desk.whole()
        says(desk)
        assert same(desk.whole(), before)


def test_a_conversation_that_an_error_cut_off_does_not_go_on() -> None:
    body = talker("llama")
    with desk_of(body, U) as (desk, _):
        talk = Conversation(desk)
        stream = talk.answer(PROMPT, tokens=TOKENS, manner=GREEDY)
        next(stream)
        Conversation(desk).answer(PROMPT)  # which has sent nothing yet
        next(stream)
        next(continue_text(desk, PROMPT))
        with pytest.raises(LinkError, match="Begin a new one"):
            next(stream)
        with pytest.raises(LinkError, match="was cut off by an error"):
            list(talk.answer((3,)))


# ---- where it ends, and what is refused


def test_a_stop_token_comes_last() -> None:
    body = talker("llama")
    with desk_of(body, U) as (desk, _):
        found = says(desk)
        stop = found[4]
        assert says(desk, stop={stop}) == found[: found.index(stop) + 1]
        assert says(desk, tokens=0) == []


def test_a_text_ends_where_the_models_positions_end() -> None:
    body = talker("gpt2")  # 32 positions
    with desk_of(body, U) as (desk, _):
        talk = Conversation(desk)
        found = list(talk.answer(PROMPT, tokens=100, manner=GREEDY))
        assert len(PROMPT) + len(found) == 33  # the last one is said, not read
        assert talk.room == 0
        with pytest.raises(DataError, match="has 0 positions left"):
            talk.answer((3,))
        assert len(list(continue_text(desk, [5] * 32, tokens=3))) == 1
        with pytest.raises(DataError, match=r"33 tokens more, .* has 32 positions"):
            continue_text(desk, [5] * 33)
        with pytest.raises(DataError, match="nothing to continue"):
            continue_text(desk, [])


def test_a_worn_prompt_takes_positions_too() -> None:
    with desk_of(talker("gpt2"), U, kind=Prompt(4)) as (desk, _):
        assert Conversation(desk).room == 28
        with pytest.raises(DataError, match="28 positions"):
            continue_text(desk, [5] * 29)
        assert len(list(continue_text(desk, [5] * 28, tokens=3))) == 1


def test_seats_that_get_only_the_loss_cannot_speak() -> None:
    body = talker("llama")
    with desk_of(body, Seat(Cut(1), "loss")) as (desk, _):
        with pytest.raises(CutError, match="nothing but the loss"):
            continue_text(desk, PROMPT)
        with pytest.raises(LinkError, match="nothing but the loss"):
            desk.session.link.send(message(desk, waves(body, 2), 0))


def test_models_that_label_texts_are_refused() -> None:
    with (
        at_desk(backbone("bert-cls"), U) as (desk, _),
        pytest.raises(ModelError, match="labels texts"),
    ):
        continue_text(desk, PROMPT)


def test_models_whose_blocks_keep_another_state_are_refused() -> None:
    with (
        at_desk(wrap(*RECURRENT), U, kind=Lora(targets=("in_proj",))) as (desk, _),
        pytest.raises(ModelError, match="cannot continue a text token by token"),
    ):
        continue_text(desk, PROMPT)


# ---- what crosses


def test_a_token_costs_its_hidden_state_each_way() -> None:
    body = talker("llama")
    state = body.width * 4
    down = {Seat(Cut(1, 1)): len(PROMPT), Seat(Cut(1, 0)): 1}
    for seat, rows in down.items():
        with desk_of(body, seat, keep_crossings=True) as (desk, ledger):
            says(desk)
            assert ledger.kinds["up", "hidden"] == (len(PROMPT) + TOKENS - 1) * state
            assert ledger.kinds["down", "hidden"] == (rows + TOKENS - 1) * state
            assert ledger.crossings is not None
            found = {c.name for c in ledger.crossings if c.phase == "continue"}
            assert found == {"hidden"}


def test_logits_come_back_for_the_last_position_only() -> None:
    body = talker("llama")
    with desk_of(body, Seat(Cut(1), "logits")) as (desk, ledger):
        says(desk)
        vocabulary = int(body.config.vocab_size)
        assert ledger.kinds["down", "logits"] == TOKENS * vocabulary * 4


def test_what_a_chat_sends_is_said() -> None:
    place = talker("llama").place
    egress = Egress((), "keep", "u-shape", lambda name: place(name, U))
    chat = [leave for leave in egress.structural() if leave.when == "every token"]
    assert [leave.what for leave in chat] == ["hidden"]
    key = StepKey("run", 0, 0, 0, 0, "continue")
    egress.check(Continue(key, 1, "personal", torch.zeros(1, 1, 4), 0).tensors())
    assert not Leave(key).tensors()


# ---- a real one


@pytest.mark.slow
def test_smollm2_speaks_through_a_cut(
    asset: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    folder = asset("smollm2-135m")
    tokenizer: Any = open_tokenizer(folder)
    body = Backbone.open(folder, task="causal-lm", pad=padding_of(tokenizer))
    kind, ids = Lora(rank=8, alpha=16.0), tokenizer("HAMLET: To be, or not to be,")["input_ids"]
    offer = Parcel({"personal": {k: v * 0.02 for k, v in drawn(body, kind=kind).items()}})
    found = dict[str, list[int]]()
    for seat in (whole(body.depth), Seat(Cut(2, 1)), Seat(Cut(6, 0)), Seat(Cut(4), "logits")):
        with at_desk(body, seat, kind=kind, offer=offer) as (desk, ledger):
            near = select(desk.whole(), NEAR, desk.model.near.place)
            up = ledger.kinds.get(("up", "hidden"), 0)
            found[str(seat)] = list(continue_text(desk, ids, tokens=16))
            cost = (ledger.kinds.get(("up", "hidden"), 0) - up) / (len(ids) + 15)
            down = sum(ledger.kinds.get(("down", k), 0) for k in ("hidden", "logits"))
            record_property(f"{seat.cut} {seat.labels}", f"{cost:.0f} B up, {down / 16:.0f} B down")
            assert near
            assert cost in (0, body.width * 4)
    assert len({tuple(said) for said in found.values()}) == 1
    assert len(found) == 4
