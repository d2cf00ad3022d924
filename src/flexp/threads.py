"""Threads that compute as their process was told to."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


def adopt() -> None:
    """Lets the calling thread multiply on as many cores as its process was told to.

    A new thread has the number of all cores until it asks torch for it, and the libraries below
    cut a product by that number: its last bits are others, and threads crowd each other.
    """
    torch.get_num_threads()


@contextmanager
def one() -> Generator[None]:
    """On one core, as are threads that begin meanwhile: sums have one order only there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
