"""The meter counts what a formula counts, of the right thread, and changes nothing."""

from __future__ import annotations

import threading

import torch
from torch.nn import functional as F
from toys import at_desk, backbone, batches_for, everywhere, play, same

from flexp.model.cut import Cut, Seat
from flexp.model.meter import Meter
from flexp.strategies.fedavg import FedAvg

U = Seat(Cut(1, 1))


def test_products_and_attention_by_formula() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7, requires_grad=True)
    with Meter() as meter:
        (a @ b).sum().backward()
    assert meter.flops == 2 * 3 * 5 * 7 * 2  # forward, and the gradient of b
    q = torch.ones(2, 4, 6, 8, requires_grad=True)  # rows, heads, length, width
    with Meter() as meter:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert meter.flops == 2 * (2 + 5) * 2 * 4 * 6 * 6 * 8


def test_peak_is_what_lived_at_one_time() -> None:
    before = torch.zeros(1000)
    with Meter() as meter:
        one = before + 1  # 4000 bytes
        two = one * 2
        view = two.view(10, 100)  # no bytes of its own
        del one
        three = view + two.view(10, 100)
        assert meter.live == 8000
    assert meter.peak == 8000
    assert three.shape == (10, 100)


def test_another_threads_work_is_not_counted() -> None:
    a = torch.ones(8, 8)

    def work() -> None:
        (a @ a).sum()

    with Meter() as meter:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert meter.flops == 0


def test_a_metered_step_is_the_same_step_near_and_far() -> None:
    body = backbone()
    with at_desk(body, U) as (desk, _):
        desk.fit(batches=iter(batches_for(body, 2)))
        plain = everywhere(desk, "personal")
    with at_desk(body, U) as (desk, _), Meter() as meter:
        desk.fit(batches=iter(batches_for(body, 2)))
        assert same(everywhere(desk, "personal"), plain)
    with at_desk(body, Seat(Cut(4, 0))) as (desk, _), Meter() as whole:
        desk.fit(batches=iter(batches_for(body, 2)))
    # Two of four equal blocks are near; the head is little.
    assert 0.45 < meter.flops / whole.flops < 0.55
    assert meter.peak < whole.peak


def test_near_and_far_add_up() -> None:
    cut = play(FedAvg(), U, rounds=1, measures=True).arrivals
    whole = play(FedAvg(), Seat(Cut(4, 0)), rounds=1, measures=True).arrivals
    for one, all_near in zip(cut, whole, strict=True):
        assert one.measured is not None
        assert all_near.measured is not None
        assert all_near.measured.far_flops == 0
        # The same operations on one side or the other.
        both = one.measured.near_flops + one.measured.far_flops
        assert abs(both / all_near.measured.near_flops - 1) < 0.02
        assert one.measured.peak < all_near.measured.peak
