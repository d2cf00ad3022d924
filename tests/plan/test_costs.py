"""Bytes by part, worked out by hand, and measured on models without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
)

from flexp.errors import CutError, ModelError, PlanError
from flexp.plan import (
    BlockCosts,
    frame_bytes,
    measure_costs,
    message_bytes,
    near_bytes,
    step_bytes,
)
from flexp.plan.trial import Held, Trial

# Two rows of 5 positions, width 3, 4 bytes per number: one message is 120 bytes.
FULL = Trial(
    rows=2,
    message=120,
    first=(Held(900, 170), Held(800, 160), Held(700, 150)),
    blocks=(Held(1000, 180), Held(1100, 190), Held(1200, 150)),
    again=(Held(120, 1500), Held(120, 1600), Held(120, 1700)),
    end=Held(200, 100),
)
SINGLE = Trial(
    rows=1,
    message=60,
    first=(Held(500, 90), Held(450, 90), Held(400, 90)),
    blocks=(Held(600, 100), Held(650, 110), Held(700, 90)),
    again=(Held(60, 800), Held(60, 850), Held(60, 900)),
    end=Held(150, 90),
)
COSTS = BlockCosts(
    blocks=3,
    width=3,
    embed_bytes=1000,
    block_bytes=(10, 20, 40),
    head_bytes=300,
    adapter_block_bytes=(1, 2, 4),
    adapter_head_bytes=7,
    batch=2,
    length=5,
    itemsize=4,
    full=FULL,
    single=SINGLE,
    process_bytes=33,
)


def test_what_may_be_kept_in_front_of_what_trains_counts() -> None:
    more, plain = near_bytes(replace(COSTS, cache_bytes=50), 1, 1), near_bytes(COSTS, 1, 1)
    assert more == {**plain, "cache": 50, "total": plain["total"] + 50}


def test_bytes_by_part_are_those_worked_out_by_hand() -> None:
    # What blocks 0 and 2 keep, then the end, which needs most. Block 0's input, the embeddings'
    # output, is there as well, but one of the link's two messages is not.
    assert near_bytes(COSTS, 1, 1) == {
        "weights": 1000 + 10 + 40 + 300,
        "adapters": 5 * (1 + 4 + 7),
        "activations": 900 + 1200 + 300,
        "link": 240,
        "process": 33,
        "total": 1350 + 60 + 2400 + 240 + 33,
    }
    # With the head far, the backward of block 1 needs most.
    assert near_bytes(COSTS, 2, 0, head_near=False) == {
        "weights": 1000 + 10 + 20,
        "adapters": 5 * (1 + 2),
        "activations": 900 + 1100 + 190,
        "link": 240,
        "process": 33,
        "total": 1030 + 15 + 2190 + 240 + 33,
    }


def activations(costs: BlockCosts, *cut: int, **how: Any) -> int:
    return near_bytes(costs, *cut, **how)["activations"]


def test_recomputed_blocks_keep_their_input_and_one_works_at_a_time() -> None:
    assert activations(COSTS, 2, 0, recompute=2) == 2 * 120 + 1600
    assert activations(COSTS, 1, 1, recompute=2) == 2 * 120 + 1700
    assert activations(COSTS, 1, 0, recompute=1, head_near=False) == 120 + 1500


def test_a_block_that_runs_again_has_only_those_in_front_beside_it() -> None:
    # Block 1 keeps all it made, 1100 bytes, and is over when block 0 runs again.
    assert activations(COSTS, 2, 0, recompute=1) == max(120 + 1500, 120 + 1100 + 300)


def test_a_batch_in_parts_holds_the_rows_of_one() -> None:
    assert activations(COSTS, 1, 1, accumulate=2) == 500 + 700 + 240
    assert near_bytes(COSTS, 1, 1, accumulate=2)["link"] == 120
    # Between the trials and beyond them on a line: 3 of 6 rows.
    six = replace(COSTS, batch=6)
    assert activations(six, 1, 0, accumulate=2, head_near=False) == 1300 + 250


def test_a_front_that_is_computed_ahead_has_another_one_beside_it() -> None:
    ahead = replace(COSTS, ahead=True)
    plain, more = near_bytes(COSTS, 2, 0, head_near=False), near_bytes(ahead, 2, 0, head_near=False)
    # Two fronts and their inputs, the work of block 1 on one of them, and a message less.
    assert more["activations"] == 2 * (120 + 900 + 1100) + 190 - 120
    assert more["adapters"] == plain["adapters"] + 1 + 2
    assert more["link"] == 2 * plain["link"]
    # With a large tail the other front is gone before that begins.
    large = replace(ahead, full=replace(FULL, end=Held(9000, 300)), single=None)
    assert activations(large, 1, 1) == 900 + 1200 + 9300
    assert near_bytes(ahead, 2, 1) == near_bytes(COSTS, 2, 1)  # nothing to wait for


def test_only_a_whole_model_near_needs_no_link() -> None:
    assert near_bytes(COSTS, 2, 1)["link"] == 0
    assert near_bytes(COSTS, 3, 0, head_near=False)["link"] == 240
    assert near_bytes(COSTS, 0, 0)["link"] == 240


def test_logits_that_come_back_are_held_with_their_gradient() -> None:
    costs = replace(COSTS, logits_bytes=50)
    assert near_bytes(costs, 1, 0, head_near=False)["link"] == 240 + 3 * 50
    assert near_bytes(costs, 1, 0)["link"] == 240


def test_what_waits_at_the_crossing_counts_with_both_messages() -> None:
    idle = replace(FULL, first=(Held(900, 10),) * 3)
    costs = replace(COSTS, full=idle, single=None)
    assert activations(costs, 1, 0, head_near=False) == 120 + 900


def test_blocks_before_the_first_that_trains_keep_nothing() -> None:
    costs = replace(COSTS, adapter_block_bytes=(0, 2, 0))
    assert activations(costs, 2, 0, head_near=False) == 800 + 160
    assert activations(costs, 1, 0, head_near=False) == 170
    assert activations(costs, 1, 1) == 1200 + 300  # its input has a gradient


def test_a_step_copies_what_it_moves() -> None:
    costs = replace(COSTS, adapter_block_bytes=(10_000, 0, 0))
    assert activations(costs, 1, 0) == 4 * (10_000 + 7)
    plain = replace(costs, moments=0)
    assert near_bytes(plain, 1, 0)["adapters"] == 3 * (10_000 + 7)
    assert activations(plain, 1, 0) == 2 * (10_000 + 7)


def test_a_checkpoint_of_another_type_is_there_while_it_is_read() -> None:
    costs = replace(COSTS, embed_bytes=100_000, file_itemsize=2)
    assert activations(costs, 1, 0) == (100_000 + 10 + 300) // 2


@pytest.mark.parametrize("cut", [(2, 2), (4, 0), (-1, 1), (1, -1)])
def test_cuts_outside_the_model_are_refused(cut: tuple[int, int]) -> None:
    with pytest.raises(CutError, match="3 blocks"):
        near_bytes(COSTS, *cut)


def test_a_back_without_the_head_is_refused() -> None:
    with pytest.raises(CutError, match="Set the back to 0"):
        near_bytes(COSTS, 1, 1, head_near=False)


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 3))
def test_one_more_block_never_needs_less(front: int, back: int) -> None:
    if front + back < 2:  # the third takes the link away
        here = near_bytes(COSTS, front, back)["total"]
        assert near_bytes(COSTS, front + 1, back)["total"] > here
        assert near_bytes(COSTS, front, back + 1)["total"] > here


def test_a_message_of_gpt2_is_3_mib() -> None:
    gpt2 = replace(COSTS, batch=8, length=128, width=768)
    assert message_bytes(gpt2) == 3 * 2**20
    assert step_bytes(gpt2) == 12 * 2**20
    assert step_bytes(gpt2, "loss") == 6 * 2**20


def test_bytes_of_a_step_by_form() -> None:
    costs = replace(COSTS, logits_bytes=50, label_bytes=16)
    assert step_bytes(costs, "u") == 4 * 120
    assert step_bytes(costs, "u", front_trains=False) == 3 * 120
    assert step_bytes(costs, "logits") == 2 * 120 + 2 * 50
    assert step_bytes(costs, "loss") == 2 * 120 + 16
    assert step_bytes(costs, "loss", front_trains=False) == 120 + 16


def test_what_is_packed_crosses_smaller_and_is_held_as_it_was() -> None:
    costs = replace(COSTS, packed_bytes=34)
    assert step_bytes(costs, "u") == 4 * 34
    assert near_bytes(costs, 1, 0) == near_bytes(COSTS, 1, 0)


def test_sizes_come_one_per_block() -> None:
    with pytest.raises(PlanError, match="block_bytes has 2 entries for 3 blocks"):
        replace(COSTS, block_bytes=(1, 2))


def llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=20,
        id2label={i: str(i) for i in range(4)},
    )
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def test_a_llama_is_measured_without_weights() -> None:
    costs = measure_costs(llama(tied=False), "model.layers", {}, batch=2, length=5, itemsize=2)
    # Four projections 32x32, three 32x48, two norms of 32.
    block = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert (costs.blocks, costs.width) == (3, 32)
    assert costs.block_bytes == (block,) * 3
    assert costs.embed_bytes == 2 * 50 * 32
    assert costs.head_bytes == 2 * (32 + 50 * 32)
    assert costs.tied_bytes == 0
    assert message_bytes(costs) == 2 * 5 * 32 * 2


def test_a_tied_head_is_counted_once_and_marked() -> None:
    costs = measure_costs(llama(tied=True), "model.layers", {}, batch=1, length=1, itemsize=4)
    assert costs.embed_bytes == 4 * 50 * 32
    assert costs.head_bytes == 4 * 32
    assert costs.tied_bytes == 4 * 50 * 32


def test_an_encoder_is_measured_with_pooler_and_classifier_as_head() -> None:
    model = bert()
    costs = measure_costs(model, "bert.encoder.layer", {}, batch=1, length=1, itemsize=4)
    assert costs.embed_bytes == 4 * 32 * (50 + 20 + 2 + 2)
    assert costs.head_bytes == 4 * (32 * 32 + 32 + 4 * 32 + 4)
    everything = sum(p.numel() for p in model.parameters()) * 4
    assert costs.embed_bytes + sum(costs.block_bytes) + costs.head_bytes == everything


def test_embeddings_registered_behind_the_blocks_are_still_embeddings() -> None:
    model = llama(tied=False)
    model.model._modules["embed_tokens"] = model.model._modules.pop("embed_tokens")
    assert next(iter(model.state_dict())).startswith("model.layers")
    costs = measure_costs(model, "model.layers", {}, batch=1, length=1, itemsize=4)
    assert costs.embed_bytes == 4 * 50 * 32


def test_adapters_are_counted_by_block() -> None:
    prefix = "base_model.model."
    adapters = {
        f"{prefix}model.layers.0.self_attn.q_proj.lora_A.weight": (4, 32),
        f"{prefix}model.layers.0.self_attn.q_proj.lora_B.weight": (32, 4),
        f"{prefix}model.layers.2.mlp.up_proj.lora_A.weight": (4, 32),
        f"{prefix}lm_head.lora_A.weight": (4, 32),
    }
    costs = measure_costs(
        llama(tied=False), "model.layers", adapters, batch=1, length=1, itemsize=4
    )
    assert costs.adapter_block_bytes == (1024, 0, 512)
    assert costs.adapter_head_bytes == 512
    with pytest.raises(ModelError, match="in block 3, but the model has 3"):
        measure_costs(
            llama(tied=False),
            "model.layers",
            {f"{prefix}model.layers.3.x.lora_A.weight": (1,)},
            batch=1,
            length=1,
            itemsize=4,
        )


@pytest.mark.parametrize(
    ("path", "message"),
    [("model.blocks", 'no module "model.blocks"'), ("model.norm", "is no list of blocks")],
)
def test_a_path_that_is_no_block_list_is_named(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        measure_costs(llama(tied=False), path, {}, batch=1, length=1, itemsize=4)


def test_a_model_without_width_is_refused() -> None:
    model = llama(tied=False)
    model.__dict__["config"] = ResNetConfig()  # one with several widths
    with pytest.raises(ModelError, match="no hidden_size"):
        measure_costs(model, "model.layers", {}, batch=1, length=1, itemsize=4)


def test_the_longest_message_has_room_for_all_that_a_run_sends() -> None:
    """Rows that are scored, logits of as many, and adapters of all slots with their moments."""
    room = 16 << 20
    assert frame_bytes(COSTS, 1, 1) >= room
    wide = replace(COSTS, batch=4, length=128, width=4096, logits_bytes=0)
    assert frame_bytes(wide, 64, 1) == room + 2 * 64 * 128 * 4096 * 4
    assert frame_bytes(wide, 2, 1) == room + 2 * 4 * 128 * 4096 * 4
    spoken = replace(wide, logits_bytes=4 * 128 * 50_000 * 4)
    assert frame_bytes(spoken, 8, 1) == room + 2 * 8 * 128 * 50_000 * 4
    large = replace(COSTS, adapter_head_bytes=1 << 30, adapter_block_bytes=(0,) * COSTS.blocks)
    assert frame_bytes(large, 8, 2) == room + 2 * 2 * 3 * (1 << 30)
