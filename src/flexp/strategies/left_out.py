"""One mean over clients, and what it would have been without one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from flexp.strategies.base import ClientId
from flexp.tensors import Tensors, norm

# A tensor's shift (its name, the client left out, the shift) as turns of the others carry it on.
Carry = Callable[[str, ClientId, Tensor], Tensor]


@dataclass(frozen=True)
class Mean:
    """What each client trained and how much it counts; the shared tensors before and after it.

    A client's tensors are those that it hosts: a mean of each tensor goes over its hosts.
    """

    trained: Mapping[ClientId, Tensors]
    weights: Mapping[ClientId, float]
    before: Tensors
    after: Tensors

    def hosts(self, name: str, less: ClientId = "") -> dict[ClientId, float]:
        """Who trained a tensor, all but one, with weights."""
        return {c: self.weights[c] for c, v in self.trained.items() if name in v and c != less}

    def without(self, client: ClientId, shift: Tensors, carry: Carry) -> Tensors:
        """The shift of the mean without a client, from the one that everybody began with."""
        out: Tensors = {}
        for k, v in shift.items():
            total = sum(self.hosts(k, client).values())
            if not total:  # it stays where it was
                out[k] = v + (self.before[k] - self.after[k])
                continue
            out[k] = carry(k, client, v)
            if k in self.trained.get(client, {}):
                apart = self.after[k] - self.trained[client][k]
                out[k] = out[k] + self.weights[client] / total * apart
        return out

    def answered(self, answers: Mapping[ClientId, Mapping[ClientId, Tensors]]) -> Carry:
        """Clients told how their turns carry a shift on, by whose it is; who did not, to 0."""

        def carry(name: str, client: ClientId, shift: Tensor) -> Tensor:
            hosts, told = self.hosts(name, client), answers.get(client, {})
            found = [(w, told[c][name]) for c, w in hosts.items() if c in told]
            total = sum(hosts.values())
            return sum((w / total * v for w, v in found), shift * 0.0)

        return carry

    def scaled(self, factors: Mapping[ClientId, Tensors]) -> Carry:
        """Turns multiply each number of a shift; summed up once for all who may be left out."""
        sums: Tensors = {}
        for c, held in factors.items():
            for k, v in held.items():
                sums[k] = sums[k] + self.weights[c] * v if k in sums else self.weights[c] * v

        def carry(name: str, client: ClientId, shift: Tensor) -> Tensor:
            held, total = sums[name], sum(self.hosts(name, client).values())
            if name in factors.get(client, {}):
                held = held - self.weights[client] * factors[client][name]
            return shift * (held / total)

        return carry


def unchanged(name: str, client: ClientId, shift: Tensor) -> Tensor:
    """Turns move everything alike."""
    del name, client
    return shift


def moved(shift: Tensors) -> bool:
    """Whether it is anything but 0."""
    return any(bool(v.any()) for v in shift.values())


def within(
    shift: Tensors, bound: Tensors, times: float | None, block_of: Callable[[str], int]
) -> Tensors:
    """The shift, in each block at most so many times as long as another vector (None: as it is)."""
    if times is None:
        return shift
    out, blocks = dict(shift), {block_of(k) for k in shift}
    for names in ([k for k in shift if block_of(k) == b] for b in blocks):
        long = norm({k: shift[k] for k in names})
        most = times * norm({k: bound[k] for k in names})
        if long > most:
            out |= {k: shift[k] * (most / long) for k in names}
    return out
