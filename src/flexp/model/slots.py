"""One side's slots, and what operations do to them: the same class at the client and the server.

Near and far evaluate the same operation on their own tensors; numbers that need both sides cross
as one number per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from flexp.errors import AdapterError
from flexp.model.ops import Assign, Dot, Grad, Op, Optim, Pull, SlotSpec, Step
from flexp.products import gram_dot, gram_gradient, lora_pairs
from flexp.selection import Place, Where
from flexp.tensors import BlockScalars, Tensors, block_dots, mixed, plain

SOON = 3  # steps; the first one moves only one factor of a LoRA pair
MOVED = -1  # instead of a number of steps


@dataclass
class Slots:
    """Named adapter-shaped vectors of one side, their gathered gradients and their moments.

    ``fused``: AdamW's step in one pass over its numbers, which has other last bits.
    """

    place: Callable[[str], Place]
    depth: int
    alpha: float = 16.0
    fused: bool = False
    alphas: dict[str, float] = field(default_factory=dict[str, float])  # of slots with their own
    values: dict[str, Tensors] = field(default_factory=dict[str, Tensors])
    grads: dict[str, Tensors] = field(default_factory=dict[str, Tensors])
    optims: dict[str, Optim] = field(default_factory=dict[str, Optim])
    missing: Callable[[str], Tensors | None] = field(default=lambda slot: None)
    still: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    def __getitem__(self, slot: str) -> Tensors:
        if slot not in self.values:
            found = self.missing(slot)
            if found is None:
                known = ", ".join(sorted(self.values)) or "none"
                raise AdapterError(f'There is no slot "{slot}". Slots here: {known}.')
            self.values[slot] = found
        return self.values[slot]

    def put(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors in; they replace the slot."""
        self.values[slot] = {k: v.detach().clone() for k, v in sorted(tensors.items())}

    def alpha_of(self, *slots: str) -> float:
        """LoRA's alpha of what these are together."""
        return next((self.alphas[slot] for slot in slots if slot in self.alphas), self.alpha)

    def read(self, wear: Iterable[str]) -> dict[str, Tensors]:
        """The slots of those names."""
        return {slot: self[slot] for slot in wear}

    def gather(self, slot: str, grads: Mapping[str, Tensor]) -> None:
        """Adds to the gradient gathered for a slot since the last ``Grad``."""
        held = self.grads.setdefault(slot, {})
        for k, g in grads.items():
            held[k] = held[k] + g if k in held else g

    def do(self, ops: Sequence[Op]) -> list[BlockScalars]:
        """Applies operations in order; each ``Dot`` gives one answer."""
        answers: list[BlockScalars] = []
        with torch.no_grad():
            for op in ops:
                if isinstance(op, Grad):
                    self._grad(op)
                elif isinstance(op, Assign):
                    self._assign(op)
                elif isinstance(op, Pull):
                    self._pull(op)
                elif isinstance(op, Step):
                    self._step(op)
                else:
                    answers.append(self._dot(op))
        return answers

    def _chosen(self, slot: str, where: Where) -> list[str]:
        return [k for k in self[slot] if where.holds(k, self.place(k))]

    def _grad(self, op: Grad) -> None:
        gathered, self.grads = self.grads, {}
        for of, into in zip(op.of, op.into, strict=True):
            held = gathered.get(of, {})
            self.values[into] = {
                k: held[k] if k in held else torch.zeros_like(v) for k, v in self[of].items()
            }

    def _assign(self, op: Assign) -> None:
        terms = plain(op.mix)
        sources = self.read(s for t in terms for s in (t.slot, t.times) if s is not None)
        value = mixed(terms, sources, self.place)
        old = self.values.get(op.slot)
        if old is None and not all(op.where.holds(k, self.place(k)) for k in value):
            old = self.missing(op.slot)  # what was offered, or how it begins
        out: Tensors = {}
        for k, v in value.items():
            if op.where.holds(k, self.place(k)):
                out[k] = (v if op.clip is None else v.clamp(*op.clip)).clone()
                if 0 < self.still.get((op.slot, k), 0) < SOON:  # few steps, and now it is another
                    del self.still[op.slot, k]
            else:
                out[k] = old[k] if old is not None and k in old else torch.zeros_like(v)
        self.values[op.slot] = out

    def _pull(self, op: Pull) -> None:
        mine, to, grad = self[op.slot], self[op.to], dict(self[op.grad])
        names = [k for k in self._chosen(op.slot, op.where) if k in to]
        pairs = lora_pairs(names) if op.form == "product" else {}
        done: set[str] = set()
        for a, b in pairs.values():
            weight = op.weight * (self.alpha_of(op.slot) / mine[a].shape[0]) ** 2
            grad_a, grad_b = gram_gradient(mine[a], mine[b], to[a], to[b])
            grad[a], grad[b] = grad[a] + weight * grad_a, grad[b] + weight * grad_b
            done |= {a, b}
        for k in names:
            if k not in done:
                grad[k] = grad[k] + op.weight * (mine[k] - to[k])
        self.values[op.grad] = grad

    def _step(self, op: Step) -> None:
        optim = self.optims.get(op.slot)
        if optim is None:
            raise AdapterError(f'Slot "{op.slot}" has no optimizer. Name one in its SlotSpec.')
        names = self._chosen(op.slot, op.where)
        value, grad = self[op.slot], self[op.grad]
        for lr, group in self._groups(optim, names).items():
            fresh = {k: value[k].clone() for k in group}
            scaled = [grad[k] * op.scale for k in group]
            if self.fused:  # it reads all of them as they lie in memory
                fresh = {k: v.contiguous() for k, v in fresh.items()}
                scaled = [g.contiguous() for g in scaled]
            self._update(op.slot, replace(optim, lr=lr * op.share), fresh, scaled)
            self._watch(op.slot, value, fresh)
            value = {**value, **fresh}
        self.values[op.slot] = value

    def _watch(self, slot: str, value: Tensors, fresh: Tensors) -> None:
        """Counts the steps of this turn that a tensor took without moving; none once it moved."""
        for k, v in fresh.items():
            steps = self.still.get((slot, k), 0)
            if steps != MOVED:
                self.still[slot, k] = steps + 1 if torch.equal(v, value[k]) else MOVED

    def check_moved(self, client: str) -> None:
        """AdapterError if tensors took steps in this turn, and never moved."""
        stuck = sorted(k for k, steps in self.still.items() if steps >= SOON)
        if stuck:
            named = ", ".join(f'"{name}" of slot "{slot}"' for slot, name in stuck[:3])
            raise AdapterError(
                f'{len(stuck)} of {len(self.still)} adapter tensors of client "{client}" have not '
                f"moved in {max(self.still[k] for k in stuck)} steps: {named}. The model may not "
                "use them (look at adapter.targets), or the learning rate is too small for them. "
                "If that is meant: train.still: allow"
            )

    def _groups(self, optim: Optim, names: list[str]) -> dict[float, list[str]]:
        out: dict[float, list[str]] = {}
        for k in names:
            at_head = self.place(k).block >= self.depth
            lr = optim.head_lr if at_head and optim.head_lr is not None else optim.lr
            out.setdefault(lr, []).append(k)
        return out

    def _update(
        self, slot: str, optim: Optim, fresh: Mapping[str, Tensor], grads: list[Tensor]
    ) -> None:
        """Moves ``fresh`` in place. A tensor that has another shape than before begins anew."""
        for k, v in self.values.get(f"{slot}@m", {}).items():
            if k in fresh and v.shape != fresh[k].shape:
                for name in moments(slot):
                    held = self.values.get(name, {})
                    self.values[name] = {n: t for n, t in held.items() if n != k}
        params = list(fresh.values())
        if optim.name == "sgd":
            sgd(
                params,
                grads,
                [*self._moments(f"{slot}@m", fresh)] if optim.momentum else [None] * len(params),
                foreach=False,
                weight_decay=optim.weight_decay,
                momentum=optim.momentum,
                lr=optim.lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            return
        adamw(
            params,
            grads,
            self._moments(f"{slot}@m", fresh),
            self._moments(f"{slot}@v", fresh),
            [],
            self._moments(f"{slot}@t", {k: torch.zeros(()) for k in fresh}),
            foreach=False,
            fused=self.fused,
            amsgrad=False,
            beta1=optim.betas[0],
            beta2=optim.betas[1],
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            eps=optim.eps,
            maximize=False,
        )

    def _moments(self, slot: str, like: Mapping[str, Tensor]) -> list[Tensor]:
        """Copies to be moved in place; no operation ever moves a tensor that somebody holds."""
        held = self.values.get(slot, {})
        fresh = {k: held[k].clone() if k in held else torch.zeros_like(p) for k, p in like.items()}
        self.values[slot] = {**held, **fresh}
        return list(fresh.values())

    def _dot(self, op: Dot) -> BlockScalars:
        a = {k: self[op.a][k] for k in self._chosen(op.a, op.where)}
        b = {k: self[op.b][k] for k in a}
        pairs = lora_pairs(a) if op.form == "product" else {}
        factors = {name for pair in pairs.values() for name in pair}
        plain = {k: v for k, v in a.items() if k not in factors}
        out = list(block_dots(plain, {k: b[k] for k in plain}, self.place, self.depth))
        for down, up in pairs.values():
            # Double: a distance is a small difference of such numbers.
            four = (a[down], a[up], b[down], b[up])
            alphas = self.alpha_of(op.a) * self.alpha_of(op.b)
            scaling = alphas / (len(a[down]) * len(b[down]))
            out[self.place(up).block + 1] += scaling * float(gram_dot(*(v.double() for v in four)))
        return tuple(out)

    def lasting(self, specs: Mapping[str, SlotSpec]) -> set[str]:
        """Names of the slots that live on after a turn: those of the run, and kept moments."""
        kept = {s for s, spec in specs.items() if spec.lasts == "run"}
        owners = [s for s, spec in specs.items() if spec.moments == "keep"]
        return kept | {name for s in owners for name in moments(s)}

    def end_turn(self, specs: Mapping[str, SlotSpec]) -> None:
        """Drops what does not outlive the turn."""
        kept = self.lasting(specs)
        self.values = {s: v for s, v in self.values.items() if s in kept}
        self.grads, self.still = {}, {}


def moments(slot: str) -> tuple[str, str, str]:
    """The slots of an optimizer's state: first and second moment, and steps taken per tensor."""
    return f"{slot}@m", f"{slot}@v", f"{slot}@t"
