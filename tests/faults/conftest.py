"""A nursery per test process, and a cluster per test, as the tests of the network have them."""

from network.conftest import cluster, nursery

__all__ = ["cluster", "nursery"]
