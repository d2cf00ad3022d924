"""Clients with a backbone of their own in one run: another width, another depth, one trunk."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from fixtures_models import FILLER
from test_fleet import adapter
from test_resume import Killed, run
from toys import CLASSES, COMMON, LENGTH, H, backbone, same, shard, toy_task, wrap

from flexp import answers, assets, commands, events, parcel, recipe_file
from flexp.client.desk import Training
from flexp.dice import Dice
from flexp.engine.base import Arrival, Own
from flexp.engine.local import LocalEngine
from flexp.errors import AdapterError, FlexpError, LinkError, RecipeError, StrategyError
from flexp.model.adapter import Kind, Lora
from flexp.model.aligned import Aligned, How, aligned, entering
from flexp.model.backbone import Backbone
from flexp.model.colora import CoLora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.own_models import smallest
from flexp.rounds import waves_of
from flexp.server.bodies import body_at
from flexp.serving.floor import floor_of
from flexp.stage import prepare
from flexp.strategies.base import Scene, Strategy, Turn
from flexp.strategies.fedmosaic import FedMosaic
from flexp.strategies.local import Local
from flexp.tensors import Tensors

Recipe = Callable[..., Path]
WIDE, DEEP = 48, 6
KIND = CoLora(3, 6.0, groups=2)
LARGE = "large"
# Two of the small model and two of the large one, cut and whole.
SEATS = {
    "a": Seat(Cut(1, 1)),
    "b": Seat(Cut(4)),
    "c": Seat(Cut(2, 1), model=LARGE),
    "d": Seat(Cut(DEEP), model=LARGE),
}


@functools.cache
def small() -> Backbone:
    return backbone()


@functools.cache
def large() -> Backbone:
    """The same family, wider and deeper."""
    more: dict[str, Any] = {"hidden_size": WIDE, "num_hidden_layers": DEEP, "num_labels": CLASSES}
    return wrap(hf.BertForSequenceClassification, hf.BertConfig(**{**COMMON, **more}))


class Mixed:
    """A few clients of two models under one method, round by round."""

    def __init__(
        self,
        strategy: Strategy[Any],
        seats: Mapping[str, Seat] = SEATS,
        kind: Kind = KIND,
        training: Training | None = None,
    ) -> None:
        self.strategy, self.seats = strategy, dict(seats)
        task = toy_task(small())
        self.engine = LocalEngine(
            small(),
            task,
            {c: shard(n + 1, 9) for n, c in enumerate(self.seats)},
            kind=kind,
            training=training or Training(Optim(lr=5e-2), batch=4, steps=2),
            dice=Dice(0),
            own={c: Own(task, large()) for c, seat in self.seats.items() if seat.model},
            others={LARGE: large()},
            probe=small(),
        )
        dice = Dice(0)("strategy")
        scene = Scene(tuple(self.seats), self.seats, self.engine.initial, dice, small().sizes)
        self.state = strategy.start(scene)

    def turn(self, r: int) -> Turn:
        others = {LARGE: (large().block_of, DEEP)}
        places = small().block_of, 4
        return Turn(r, 9, 0, True, self.seats, {}, *places, tuple(self.seats), others=others)

    def round(self, r: int) -> list[Arrival]:
        out: list[Arrival] = []
        found = waves_of(self.strategy, self.engine, self.state, self.turn(r), Dice(0)("waves"))
        for _, arrivals, merged in found:
            self.state = merged
            out += arrivals
        assert [a.failure for a in out] == [None] * len(out)
        return out

    def worn(self, client: str, slot: str = "personal") -> Tensors:
        near = self.engine.memories[client].slots[f"slot/{slot}"]
        return {**near, **self.engine.tenants[client].slots.values.get(slot, {})}


@pytest.fixture
def mixed() -> Any:
    made: list[Mixed] = []

    def begin(*given: Any, **more: Any) -> Mixed:
        made.append(Mixed(*given, **more))
        return made[-1]

    yield begin
    for one in made:
        one.engine.close()


def test_p_and_q_go_from_model_to_model_and_frozen_factors_stay(mixed: Any) -> None:
    one = mixed(FedMosaic(gate_noise=0.0))
    for r in range(2):
        one.round(r)
    for client, seat in SEATS.items():
        body = large() if seat.model else small()
        begun, found = body.initial(KIND, Dice(0)("initial")), one.worn(client)
        assert found.keys() == begun.keys()
        for k, v in begun.items():
            assert torch.equal(found[k], v) == k.endswith(("colora_A", "colora_B")), k
    # The large model's third and sixth block are matched with the small one's second and fourth.
    given = one.strategy.offer(one.state, "c", one.turn(2)).adapters["others"]
    plain, matched = ({k for k in given if mark in k} for mark in (".lora_", ".colora_"))
    assert {large().block_of(k) for k in plain} == {0, 1, 3, 4}
    assert {large().block_of(k) for k in matched} == {2, 5}
    # Plain factors are those of the only other client of its model.
    assert same({k: given[k] for k in plain}, {k: one.state.models["d"][k] for k in plain})


def test_what_is_exchanged_between_models_changes_what_both_say(mixed: Any) -> None:
    seats = {"a": SEATS["a"], "c": SEATS["c"]}  # of each model one: only P and Q are exchanged
    together = mixed(FedMosaic(gate_noise=0.0), seats)
    apart = {c: mixed(FedMosaic(gate_noise=0.0), {c: seat}) for c, seat in seats.items()}
    for r in range(2):
        together.round(r)
        for one in apart.values():
            one.round(r)
    for client, one in apart.items():
        offered = together.strategy.offer(together.state, client, together.turn(2))
        assert offered.facts == {"matched": True, "plain": False}
        assert one.strategy.offer(one.state, client, one.turn(2)).adapters == {}
        mine = one.engine.shards[client]
        if client == "a":  # the same rows in both
            assert same_rows(mine, together.engine.shards[client])
            assert not same(together.worn(client), one.worn(client))


def same_rows(one: Any, other: Any) -> bool:
    return one.train.ids == other.train.ids


def test_a_cut_is_invisible_in_either_model(mixed: Any) -> None:
    cut, whole = mixed(FedMosaic()), mixed(FedMosaic(), {**SEATS, **WHOLE})
    for r in range(3):
        cut.round(r)
        whole.round(r)
    for client in SEATS:
        assert same(cut.worn(client), whole.worn(client)), client
    assert same(cut.state.signatures, whole.state.signatures)


WHOLE = {"a": Seat(Cut(4)), "c": Seat(Cut(DEEP), model=LARGE)}


def test_who_is_beside_another_model_does_not_notice_it(mixed: Any) -> None:
    how: dict[str, Any] = {"kind": Lora(3, 6.0)}
    together = mixed(Local(), **how)
    alone = mixed(Local(), {c: SEATS[c] for c in "ab"}, **how)
    for r in range(2):
        together.round(r)
        alone.round(r)
    for client in "ab":
        assert same(together.worn(client), alone.worn(client))


def test_a_step_costs_what_the_clients_own_width_says(mixed: Any) -> None:
    one = mixed(Local(), kind=Lora(3, 6.0))
    sent = {a.client: a.ledger.sent for a in one.round(0)}
    mask, steps = 4 * LENGTH * 8, 2
    assert sent["a"] == steps * (2 * 4 * LENGTH * H * 4 + mask)
    assert sent["c"] == steps * (2 * 4 * LENGTH * WIDE * 4 + mask)
    assert sent["b"] == sent["d"] == 0


def test_a_seat_of_a_model_that_is_not_here_is_refused() -> None:
    assert body_at(SEATS["a"], small(), {}) is small()
    assert body_at(SEATS["c"], small(), {LARGE: large()}) is large()
    with pytest.raises(LinkError, match='no model "large"'):
        body_at(SEATS["c"], small(), {})


def test_the_probe_is_the_smallest_model() -> None:
    assert smallest({"": large(), "b": small(), "c": small()}) is small()


# ---- whole runs


@pytest.fixture
def larger(tmp_path: Path, tiny_model: Path) -> Path:
    """A wider and deeper model with the tokenizer of the tiny one."""
    folder = tmp_path / "larger"
    shutil.copytree(tiny_model, folder)
    config: Any = hf.AutoConfig.from_pretrained(tiny_model)
    config.hidden_size, config.num_hidden_layers = WIDE, DEEP
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        hf.BertModel(config).save_pretrained(folder)
    return folder


def asked(larger: Path, **more: Any) -> dict[str, Any]:
    """Ben has the larger model, and more of it."""
    clients = {"ben": {"model": str(larger)}}
    return {"clients": clients, "plan": {"cut": [1, 1], "cuts": {"ben": [3, 2]}}, **more}


MOSAIC: dict[str, Any] = {
    "strategy": {"name": "fedmosaic", "every": 1},
    "adapter": {"kind": "colora", "rank": 2, "alpha": 4.0, "groups": 2},
}


def test_a_run_with_two_models_by_its_recipe(recipe_of: Recipe, larger: Path) -> None:
    folder = run(recipe_of(**asked(larger, **MOSAIC)))
    told = list(events.read(folder / "events.jsonl"))
    assert not [e for e in told if isinstance(e, events.TurnFailed)]
    seats = {e.client: (e.front, e.back) for e in told if isinstance(e, events.SeatTaken)}
    assert seats["ben"] == (3, 2)
    rows = json.loads((folder / "result.json").read_text("utf-8"))["rows"]
    own = {r["client"]: r["value"] for r in rows if r["cell"] == "personal/own/after"}
    assert {*own} == {"anna", "ben", "carl dee", "all"}


def test_it_is_resumed_to_the_bit(recipe_of: Recipe, larger: Path) -> None:
    whole = run(recipe_of(**asked(larger, **MOSAIC)))
    with pytest.raises(Killed):
        run(recipe_of(**asked(larger, **MOSAIC, name="again")), die_at=4)
    again = run(recipe_of(**asked(larger, **MOSAIC, name="again")), resume=True)
    kept = [sorted((f / "checkpoint").rglob("*.parcel")) for f in (whole, again)]
    names = [[p.relative_to(f) for p in ps] for f, ps in zip((whole, again), kept, strict=True)]
    assert names[0] == names[1]
    assert any("ben" in str(name) for name in names[0])
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*kept, strict=True))


def test_its_adapter_is_of_its_own_model(recipe_of: Recipe, larger: Path) -> None:
    folder = run(recipe_of(**asked(larger)), "strategy.name=local")
    card = json.loads((folder / "adapters" / "ben" / "adapter_config.json").read_text("utf-8"))
    assert card["base_model_name_or_path"] == str(larger)
    widths = {v.shape[-1] for k, v in adapter(folder, "ben").items() if "lora_A" in k}
    assert widths == {WIDE}
    said = answers.predict(folder / "adapters" / "ben", ["great film"], assets.Cache(folder))
    assert said["predictions"]


def test_a_method_that_averages_refuses_other_models(recipe_of: Recipe, larger: Path) -> None:
    recipe = recipe_file.read(recipe_of(**asked(larger)))
    with pytest.raises(StrategyError, match='all its clients need one model, and "ben" have'):
        prepare(recipe, assets.Cache(larger / "none"))


def test_co_lora_is_for_methods_with_gates(recipe_of: Recipe, larger: Path) -> None:
    recipe = recipe_file.read(recipe_of(adapter=MOSAIC["adapter"], strategy={"name": "local"}))
    with pytest.raises(StrategyError, match=r"wears no Co-LoRA. Set adapter.kind=lora"):
        prepare(recipe, assets.Cache(larger / "none"))


def test_a_task_and_a_model_of_ones_own_do_not_go_together(recipe_of: Recipe, larger: Path) -> None:
    own = {"ben": {"model": str(larger), "task": {"labels": ["positive", "negative"]}}}
    recipe = recipe_file.read(recipe_of(**asked(larger) | {"clients": own}))
    with pytest.raises(RecipeError, match="a model of its own and a task of its own"):
        prepare(recipe, assets.Cache(larger / "none"))


def test_another_tokenizer_is_refused(recipe_of: Recipe, larger: Path) -> None:
    file = larger / "tokenizer.json"
    plain = json.loads(file.read_text("utf-8"))
    vocab = plain["model"]["vocab"]
    one, two = sorted(vocab, key=lambda word: vocab[word])[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    file.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(RecipeError, match="reads other tokens or pixels than"):
        prepare(recipe_file.read(recipe_of(**asked(larger))), assets.Cache(larger / "none"))


def test_the_usual_model_by_name_is_no_other_one(recipe_of: Recipe, tiny_model: Path) -> None:
    usual = {"ben": {"model": str(tiny_model)}}
    stage = prepare(recipe_file.read(recipe_of(clients=usual)), assets.Cache(tiny_model / "none"))
    assert not stage.engine.others
    stage.engine.close()


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"strategy": {"name": "local"}}, RecipeError, "over a network all clients have the run's"),
        (MOSAIC, StrategyError, "needs a probe"),
    ],
    ids=["models", "probe"],
)
def test_a_server_refuses_them(
    recipe_of: Recipe, larger: Path, change: dict[str, Any], error: type[FlexpError], what: str
) -> None:
    recipe = recipe_file.read(recipe_of(**asked(larger, **change)))
    with pytest.raises(error, match=what):
        floor_of(recipe, assets.Cache(larger / "none"), lambda text: None)


# ---- factors that agree


PUBLIC = [{"text": f"{a} {b} movie {a}"} for a in ("great", "bad", "fine") for b in FILLER[:8]]


def texts_for() -> list[dict[str, torch.Tensor]]:
    """Rows of ids with padding, the same for both models."""
    stream = torch.Generator().manual_seed(3)
    made = [torch.randint(3, 60, (4, 7), generator=stream) for _ in range(12)]
    mask = torch.tensor([[1] * 7, [1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3])
    return [{"input_ids": ids * mask, "attention_mask": mask} for ids in made]


@functools.cache
def agreed() -> Aligned:
    how = How(steps=150, rate=5e-3)
    return aligned(small(), large(), KIND, Dice(0), batches=texts_for(), how=how)


def factor(part: str) -> list[torch.Tensor]:
    return [v for k, v in agreed().factors.items() if k.endswith(part)]


def test_alignment_leaves_rows_of_a_at_right_angles_and_comes_closer() -> None:
    found = agreed()
    assert {large().block_of(k) for k in found.factors} == {2, 5}
    assert len(factor("colora_A")) == len(factor("colora_B")) == 4  # two blocks, query and value
    for a in factor("colora_A"):
        assert a.shape == (3, WIDE)
        assert torch.allclose(a @ a.T, torch.eye(3), atol=1e-5)
    assert found.after < 0.9 * found.before


def test_p_and_q_see_nearer_codes_than_with_what_was_drawn() -> None:
    a, b = factor("colora_A")[0], factor("colora_B")[0]
    base = small().initial(KIND, Dice(0)("initial"))
    drawn = large().initial(KIND, Dice(0)("initial"))
    stem = "base_model.model.bert.encoder.layer.{}.attention.self.query.colora_{}"
    pivot = [base[stem.format(1, part)] for part in "AB"]
    own = [drawn[stem.format(2, part)] for part in "AB"]
    batches = texts_for()
    paths = [f"bert.encoder.layer.{n}.attention.self.query" for n in (1, 2)]
    x, y = (
        torch.cat(entering(body, [path], batches)[path])
        for body, path in zip((small(), large()), paths, strict=True)
    )
    low = x @ pivot[0].T
    assert float((y @ a.T - low).square().mean()) < float((y @ own[0].T - low).square().mean())
    assert b.shape == (WIDE, 3)
    assert torch.linalg.matrix_rank(b) == 3


def test_a_model_agrees_with_itself_already() -> None:
    how = How(steps=3, rate=1e-9)
    found = aligned(small(), small(), KIND, Dice(0), batches=texts_for(), how=how)
    begun = small().initial(KIND, Dice(0)("initial"))
    assert found.before < 1e-9
    for k, v in found.factors.items():
        if k.endswith("colora_A"):
            assert torch.allclose(v, begun[k], atol=1e-5), k
        else:
            x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
            assert torch.allclose(v @ x, begun[k] @ x, atol=1e-2), k


def test_maps_that_cannot_be_matched_are_refused() -> None:
    with pytest.raises(AdapterError, match="have other linear maps"):
        aligned(small(), backbone("distilbert-cls"), KIND, Dice(0), batches=texts_for(), how=How())


@pytest.fixture
def public(tmp_path: Path) -> Path:
    file = tmp_path / "public.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PUBLIC), encoding="utf-8")
    return file


def test_a_run_begins_with_what_was_aligned_once(
    recipe_of: Recipe, larger: Path, public: Path, tmp_path: Path
) -> None:
    file = tmp_path / "factors.parcel"
    more = {**MOSAIC, "adapter": {**MOSAIC["adapter"], "aligned": str(file)}}
    recipe, cache = recipe_file.read(recipe_of(**asked(larger, **more))), assets.Cache(tmp_path)
    with pytest.raises(RecipeError, match="Run `flexp align` first"):
        prepare(recipe, cache)
    how: dict[str, Any] = {"rows": 24, "how": How(steps=20, rate=1e-2), "say": lambda text: None}
    told = commands.align(recipe, cache, str(public), **how)
    assert told["kept"] is False
    assert {*told["models"]} == {str(larger)}  # the pivot is the smallest
    before = file.read_bytes()
    again = commands.align(recipe, cache, str(public), **how)
    assert again == {**told, "kept": True}
    assert file.read_bytes() == before
    held = parcel.load(file).adapters[f"run:{larger}"]
    stage = prepare(recipe, cache)
    body = stage.engine.others[str(larger)]
    begun = stage.engine.begun_on(body, SlotSpec(), None)
    assert all(torch.equal(begun[k], v) for k, v in held.items())
    drawn = stage.engine.backbone.initial(stage.engine.kind, Dice(recipe.seed)("initial"))
    assert same(stage.engine.initial(SlotSpec()), drawn)
    stage.engine.close()
    other = recipe_file.read(recipe_of(**asked(larger, **more)), ["adapter.rank=1"])
    with pytest.raises(RecipeError, match="is of other models, another rank"):
        prepare(other, cache)


def test_there_must_be_something_to_align(recipe_of: Recipe, larger: Path, public: Path) -> None:
    how: dict[str, Any] = {"rows": 4, "how": How(steps=1), "say": lambda text: None}
    cache = assets.Cache(larger / "none")
    plain = recipe_file.read(recipe_of(**asked(larger, **MOSAIC)))
    with pytest.raises(RecipeError, match=r"Set adapter\.kind to colora"):
        commands.align(plain, cache, str(public), **how)
    kind = {**MOSAIC["adapter"], "aligned": str(larger / "x.parcel")}
    alone = recipe_file.read(recipe_of(strategy=MOSAIC["strategy"], adapter=kind))
    with pytest.raises(RecipeError, match=r"Set clients\.NAME\.model"):
        commands.align(alone, cache, str(public), **how)
