"""What can be chosen for a client: a cut, parts of a batch, recomputation, and what each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexp.errors import PlanError
from flexp.plan.clock import Load, step_load
from flexp.plan.costs import BlockCosts, Form, near_bytes
from flexp.plan.work import BlockWork

Cut = tuple[int, int]


@dataclass(frozen=True)
class Limits:
    """What every cut of a plan must keep to.

    ``min_front`` is a floor for privacy: the fewer blocks at the client, the easier rows are read
    from hidden states. ``max_depth`` is the largest front + back (None: all blocks), ``static`` the
    cut of the goal ``static``. Unless ``form`` is "u" the server has the head, so ``back`` is 0.
    """

    min_front: int = 1
    max_depth: int | None = None
    min_back: int = 0
    static: Cut = (1, 0)
    form: Form = "u"

    @property
    def head_near(self) -> bool:
        """Whether the client has the head."""
        return self.form == "u"

    @property
    def floor(self) -> Cut:
        """The smallest cut."""
        return self.min_front, self.min_back

    def deepest(self, blocks: int) -> int:
        """The most blocks at a client."""
        return blocks if self.max_depth is None else self.max_depth


@dataclass(frozen=True)
class Option:
    """One way to train at a client: bytes there and at the server, and the load of a step.

    ``recompute`` are ``quarters`` of its blocks, rounded up.
    """

    cut: Cut
    accumulate: int
    recompute: int
    quarters: int
    bytes: int
    server_bytes: int
    load: Load | None

    @property
    def depth(self) -> int:
        """Blocks at the client."""
        return sum(self.cut)


def legal_cuts(blocks: int, limits: Limits) -> list[Cut]:
    """All cuts within the limits: deepest first, then the back nearest to a third of the depth.

    PlanError if the limits contradict each other or the model.
    """
    deepest = limits.deepest(blocks)
    if deepest > blocks:
        raise PlanError(
            f"plan.max_depth is {deepest}, but the model has {blocks} blocks. "
            f"Set it to {blocks} or less."
        )
    if limits.min_back > 0 and not limits.head_near:
        raise PlanError(
            f"plan.min_back is {limits.min_back}, but with shared labels the server has the head. "
            "Set it to 0, or keep the labels."
        )
    if min(limits.floor) < 0 or sum(limits.floor) > deepest:
        raise PlanError(
            f"No cut has a front of at least {limits.min_front}, a back of at least "
            f"{limits.min_back} and at most {deepest} blocks. "
            "Lower plan.min_front or plan.min_back, or raise plan.max_depth."
        )
    cuts = [
        (depth - back, back)
        for depth in range(deepest + 1)
        for back in range(limits.min_back, depth - limits.min_front + 1)
        if limits.head_near or back == 0
    ]
    return sorted(cuts, key=lambda cut: (-sum(cut), abs(cut[1] - sum(cut) // 3), cut[1]))


def variants(batch: int, depth: int) -> list[tuple[int, int]]:
    """Parts of a batch and quarters of blocks that run twice, from the quickest to the smallest."""
    parts = [n for n in range(1, batch + 1) if batch % n == 0]
    quarters = {-(-depth * n // 4): n for n in (4, 3, 2, 1, 0)}
    return [(n, again) for again in sorted(quarters.values()) for n in parts]


def option(
    costs: BlockCosts, work: BlockWork | None, limits: Limits, cut: Cut, how: tuple[int, int]
) -> Option:
    """One option, with what it takes; without ``work`` its load is not known."""
    accumulate, quarters = how
    again = -(-sum(cut) * quarters // 4)
    held = near_bytes(
        costs, *cut, head_near=limits.head_near, recompute=again, accumulate=accumulate
    )
    load = None
    if work is not None:
        load = step_load(costs, work, cut, limits.form, recompute=again, accumulate=accumulate)
    return Option(
        cut,
        accumulate,
        again,
        quarters,
        held["total"],
        tenant_bytes(costs, limits, cut, accumulate),
        load,
    )


def tenant_bytes(costs: BlockCosts, limits: Limits, cut: Cut, accumulate: int) -> int:
    """Bytes at the server for one client: adapters, moments and activations of what is far.

    So much as a client may keep of hidden states the server may keep, too.
    """
    costs = replace(costs, ahead=False)  # the server has no batch beside another
    whole = near_bytes(costs, costs.blocks, 0, accumulate=accumulate)
    near = near_bytes(costs, *cut, head_near=limits.head_near, accumulate=accumulate)
    far = sum(max(0, whole[part] - near[part]) for part in ("adapters", "activations"))
    return far + (0 if near["link"] == 0 else costs.cache_bytes)


def menu(costs: BlockCosts, work: BlockWork | None, limits: Limits) -> list[Option]:
    """Every option within the limits, in the order of ``legal_cuts`` and ``variants``."""
    return [
        option(costs, work, limits, cut, how)
        for cut in legal_cuts(costs.blocks, limits)
        for how in variants(costs.batch, sum(cut))
    ]


def fitting(options: Sequence[Option], memory: int) -> list[Option]:
    """The options that a device of that memory can hold."""
    return [o for o in options if o.bytes <= memory]


def trunk_bytes(costs: BlockCosts, limits: Limits) -> int:
    """Bytes of the frozen blocks at the server, held once for all clients."""
    return sum(costs.block_bytes) + (0 if limits.head_near else costs.head_bytes)
