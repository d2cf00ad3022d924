"""The memory of a client's process: what a freed tensor gives back, and when."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_BYTES = 128 * 1024  # glibc's own first value, before it learns
_ARENA_MAX = -8  # M_ARENA_MAX


def give_back() -> bool:
    """Has the system take back a large tensor's memory as soon as it is freed; False if it cannot.

    glibc raises its threshold with every large block that is freed, up to 32 MB, and keeps smaller
    ones in a heap that fills with holes: a client grew to 1.6 times what its tensors need. Setting
    the threshold stops that. All threads share one heap: each with its own reserves addresses that
    a limited process needs (1.9 GB against 1.1 for a client of SmolLM2). Both hold for the whole
    process, so a program calls this at its start.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    return bool(mallopt(_ARENA_MAX, 1)) and bool(mallopt(_MMAP_THRESHOLD, _BYTES))
