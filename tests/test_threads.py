"""A thread's products have the bits of the one that began it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexp import commands, recipe_file
from flexp.assets import Cache
from flexp.server.thread import ComputeThread
from flexp.threads import adopt, one

SHAPES = [(rows, wide, out) for rows in (2, 6, 16) for wide in (54, 64, 200) for out in (3, 16, 48)]


def products() -> list[Tensor]:
    stream = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for rows, wide, out in SHAPES:
        left = torch.randn(rows, wide, generator=stream)
        made.append(left @ torch.randn(out, wide, generator=stream).t())
    return made


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_new_thread_that_has_adopted_the_number_of_cores_gives_the_same_bits() -> None:
    with ThreadPoolExecutor(1, initializer=adopt) as pool:
        assert same(pool.submit(products).result(), products())


def test_the_compute_thread_gives_the_same_bits_before_it_has_computed_anything() -> None:
    nothing: Any = None
    thread = ComputeThread(nothing)
    try:
        assert same(thread.in_turn(products), products())
    finally:
        thread.close()


def test_one_core_is_for_new_threads_too_and_ends() -> None:
    torch.set_num_threads(2)
    with one(), ThreadPoolExecutor(1, initializer=adopt) as pool:
        assert torch.get_num_threads() == 1
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2


def test_a_run_in_exact_mode_has_one_core_whatever_its_process_was_told(
    recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    recipe = recipe_file.read(recipe_of(mode="exact"), [f"out={tmp_path}", "rounds=1"])
    seen: set[int] = set()
    commands.run(recipe, Cache(tmp_path / "cache"), [lambda _: seen.add(torch.get_num_threads())])
    assert seen == {1}
    assert torch.get_num_threads() == 2
