"""Named, counter-based random streams.

A stream is named by what it is for, and by counters instead of by how often something was drawn
before, so the same name gives the same numbers in any order, in any process and on every engine.

>>> dice = Dice(seed=7)
>>> dice("sample", round=3).choose(10, 4) == dice("sample", round=3).choose(10, 4)
True
>>> dice("sample", round=3).path, dice("batches", round=3, client="phone").path
('sample/round=3', 'batches/client="phone"/round=3')
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from urllib.parse import quote

import torch

from flexp.errors import FlexpError

# The CPU generator of torch is a Mersenne twister whose state is saved in a fixed layout:
# 24 bytes of counters, then 624 words of 32 bits in 8 bytes each.
_WORDS = slice(24, 24 + 624 * 8)


@dataclass(frozen=True)
class Dice:
    """One stream; calling it makes a child stream, drawing from it never changes it."""

    seed: int
    path: str = ""

    def __call__(self, name: str, /, **counters: int | str) -> Dice:
        """The child stream of that name and those counters; their order does not matter.

        >>> Dice(1)("a", x=1, y=2) == Dice(1)("a", y=2, x=1)
        True
        """
        if not name or "/" in name or "=" in name:
            raise FlexpError(
                f'"{name}" cannot name a random stream. Use a name without "/" and "=", '
                "and pass numbers as counters: dice(name, round=3)."
            )
        steps = (f"{key}={_counter(value)}" for key, value in sorted(counters.items()))
        return Dice(self.seed, "/".join([*([self.path] if self.path else []), name, *steps]))

    def seed64(self) -> int:
        """A number of 63 bits that stands for this stream, for libraries that want a seed.

        >>> Dice(7)("sample").seed64()
        8804029467234160152
        """
        return int.from_bytes(self._digest(8)) >> 1

    def generator(self) -> torch.Generator:
        """A fresh CPU generator at the start of this stream.

        >>> a, b = Dice(7).generator(), Dice(7).generator()
        >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
        True
        """
        generator = torch.Generator().manual_seed(self.seed64())
        # manual_seed keeps only 32 of its 64 bits: among 100 000 streams some would coincide.
        # So all words of the twister come from the digest.
        state = generator.get_state()
        words = torch.frombuffer(bytearray(self._digest(624 * 4)), dtype=torch.uint8)
        state[_WORDS].view(624, 8)[:, :4] = words.view(624, 4)
        generator.set_state(state)
        return generator

    def shuffle(self, n: int) -> list[int]:
        """The numbers 0 to n-1 in random order.

        >>> sorted(Dice(7).shuffle(5))
        [0, 1, 2, 3, 4]
        """
        return [int(i) for i in torch.randperm(n, generator=self.generator())]

    def choose(self, n: int, k: int) -> list[int]:
        """``k`` distinct numbers below ``n``, sorted.

        >>> Dice(7).choose(3, 3)
        [0, 1, 2]
        """
        if not 0 <= k <= n:
            raise FlexpError(f"Cannot choose {k} of {n}. Ask for a number from 0 to {n}.")
        return sorted(self.shuffle(n)[:k])

    def uniform(self) -> float:
        """A number from 0 to below 1.

        >>> 0.0 <= Dice(7)("flip").uniform() < 1.0
        True
        """
        return (self.seed64() >> 10) / 2**53

    def _digest(self, size: int) -> bytes:
        start = hashlib.sha256(f"{self.seed}\n{self.path}".encode()).digest()
        # One digest is 32 bytes; longer keys are its expansion.
        return start[:size] if size <= len(start) else hashlib.shake_256(start).digest(size)


def _counter(value: int | str) -> str:
    """A counter in a path: text is quoted, so ``3`` and ``"3"`` differ and "/" is harmless."""
    return f'"{quote(value, safe="")}"' if isinstance(value, str) else str(int(value))
