"""What FedAvgM must do, and what it must equal."""

from __future__ import annotations

from fedavgm import FedAvgM

from flexp.laws import alike, check
from flexp.strategies.fedavg import FedAvg


def test_it_keeps_the_laws_of_methods() -> None:
    check(FedAvgM())


def test_without_momentum_it_is_fedavg() -> None:
    assert alike(FedAvgM(beta=0.0), FedAvg())
    assert not alike(FedAvgM(), FedAvg())
