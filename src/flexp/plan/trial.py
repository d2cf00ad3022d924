"""What a training step holds, tried out on tensors that have a shape and no memory.

No family has a formula here: the model's own forward and backward run, with adapters worn, on fake
tensors, and the meter counts what lives. One block of each shape is tried, so that a plan for a
large model takes about a second.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from flexp.data.loss import chunked_loss, wide
from flexp.dice import Dice
from flexp.model import prompts
from flexp.model.adapter import Layout
from flexp.model.cut import Pass, Stopped, Tap, run
from flexp.model.dress import dropping
from flexp.model.equip import equip
from flexp.model.kernels import attend_wide, fuse
from flexp.model.meter import Meter
from flexp.model.prompts import longer
from flexp.model.quantize import Quantize, blank_maps, quantizable
from flexp.model.skeleton import (
    Skeleton,
    States,
    TaskKind,
    bare,
    head_leaves,
    image_shape,
    modules,
    reads_ids,
    states_of,
)
from flexp.model.worn import PREFIX, read


@dataclass(frozen=True)
class Held:
    """Bytes of a part of a model at one batch.

    ``kept`` waits for the backward pass, the part's result included; ``work`` is the most that
    there is beside it at one moment, of the forward or the backward pass.
    """

    kept: int
    work: int


@dataclass(frozen=True)
class Trial:
    """A step's bytes at one number of rows, part by part.

    ``first`` is each block as the first that trains, ``blocks`` each behind something that trains,
    ``again`` the same run twice, ``end`` what follows: norm, head and loss.
    ``message`` is one hidden state. ``rough``: by a formula, not tried.
    """

    rows: int
    message: int
    first: tuple[Held, ...]
    blocks: tuple[Held, ...]
    again: tuple[Held, ...]
    end: Held
    rough: bool = False


@dataclass(frozen=True)
class Shape:
    """Of a batch: rows, positions of each; whether in mode fast; LoRA's dropout."""

    rows: int
    length: int
    fast: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class Weights:
    """Of the model: their type, and what becomes of linear maps."""

    dtype: torch.dtype
    quantize: Quantize | None = None


def attempt(
    bones: Skeleton, task: TaskKind, adapter: Layout, shape: Shape, weights: Weights
) -> Trial:
    """The bytes of a step from a skeleton's config, and an adapter's names and shapes.

    Raises what the family raises where it cannot run on fake tensors (some mixtures of experts).
    """
    config = copy.deepcopy(bones.config)
    config.use_cache = False
    states = states_of(config, task, bones.blocks_path)
    fresh = bare(config, task, blocks_at=bones.blocks_path)
    if shape.fast:
        fuse(fresh.model)
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        _fake(fresh.model.eval().requires_grad_(False), weights.dtype)
        attend_wide(fresh.model)
        if (how := weights.quantize) is not None:
            paths = quantizable(fresh.model, fresh.blocks_path, how.kind)
            blank_maps(fresh.model, paths, how.form)
        return _Model(fresh, task, adapter, shape, states).trial()


@contextmanager
def _quiet() -> Generator[None]:
    """Within this torch does not report what it cannot do with fake tensors; it still raises."""
    logger = logging.getLogger(fake_tensor.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _fake(net: nn.Module, dtype: torch.dtype) -> None:
    """Gives a skeleton tensors of the present fake mode, on the processor as a client's are."""
    made: dict[int, nn.Parameter] = {}
    for module in modules(net).values():
        for name, value in list(module.named_parameters(recurse=False)):
            if id(value) not in made:
                made[id(value)] = nn.Parameter(torch.empty(value.shape, dtype=dtype), False)
            setattr(module, name, made[id(value)])
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype))


class _Model:
    """A skeleton with stations, ready to run a part of itself."""

    def __init__(
        self,
        bones: Skeleton,
        task: TaskKind,
        adapter: Layout,
        shape: Shape,
        states: States | None,
    ) -> None:
        self.net, self.task, self.shape, self.adapter = bones.model, task, shape, adapter
        self.path, self.depth = bones.blocks_path, bones.depth
        self.blocks = cast(nn.ModuleList, bones.model.get_submodule(self.path))
        head = () if task == "causal-lm" else head_leaves(self.net, None, self.path)
        leaves = {k: torch.empty(size, requires_grad=True) for k, size in adapter.items()}
        self.learned = prompts.NAMES & leaves.keys()  # at the input
        inside = self.learned & {prompts.FRONT, prompts.BEHIND, prompts.AT_CUT}
        self.more = sum(len(leaves[name]) for name in inside)
        self.worn = dropping(read(leaves, 1.0), shape.dropout, Dice(0))
        self.states, self.inputs = states, self._inputs(bones.config)
        seen = self._first_output()
        in_tuple = isinstance(seen, tuple)
        self.hidden = cast(Tensor, seen[0] if in_tuple else seen)
        equip(self.net, self.path, self.blocks, [in_tuple] * self.depth, head)

    def trial(self) -> Trial:
        """Each kind of block once, and the end."""
        kinds = [self._kind(n, block) for n, block in enumerate(self.blocks)]
        alike = {kind: kinds.index(kind) for kind in kinds}
        start = {kind: self._block(n, grad=bool(self.learned)) for kind, n in alike.items()}
        once = {kind: self._block(n, grad=True) for kind, n in alike.items()}
        twice = {kind: self._block(n, grad=True, again=True) for kind, n in alike.items()}
        return Trial(
            rows=self.shape.rows,
            message=self._feed(0, False).nbytes,
            first=tuple(start[kind] for kind in kinds),
            blocks=tuple(once[kind] for kind in kinds),
            again=tuple(twice[kind] for kind in kinds),
            end=self._end(),
        )

    def _inputs(self, config: Any) -> dict[str, Tensor]:
        rows, length = self.shape.rows, self.shape.length
        if not reads_ids(self.net):
            dtype = next(self.net.parameters()).dtype
            return {"pixel_values": torch.empty(rows, *image_shape(config), dtype=dtype)}
        length += self.more
        ids = torch.ones(rows, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _first_output(self) -> Any:
        """What block 0 gives."""
        seen: list[Any] = []

        def stop(module: nn.Module, given: Any, out: Any) -> None:
            del module, given
            seen.append(out)
            raise Stopped(out)

        hook = self.blocks[0].register_forward_hook(stop)
        try:
            with torch.no_grad():
                self.net(**self.inputs)
        except Stopped:
            pass
        finally:
            hook.remove()
        return seen[0]

    def _kind(self, n: int, block: nn.Module) -> str:
        """What tells blocks apart: modules, the adapter's tensors, and words such as "sliding"."""
        stem = f"{PREFIX}{self.path}.{n}."
        worn = [(k.removeprefix(stem), s) for k, s in self.adapter.items() if k.startswith(stem)]
        words = [v for m in block.modules() for v in vars(m).values() if isinstance(v, str)]
        return f"{block}{worn}{words}{self.states and self.states.shapes[n]}"

    def _feed(self, n: int, grad: bool) -> Tensor:
        """What enters block ``n``."""
        if self.states is None:
            return torch.empty_like(self.hidden, requires_grad=grad)
        shape = self.shape.rows, *longer(self.states.shapes[n], self.more)
        return torch.empty(shape, dtype=self.hidden.dtype, requires_grad=grad)

    def _block(self, n: int, *, grad: bool, again: bool = False) -> Held:
        feed = self._feed(n, grad)
        now = Pass(n, n + 1, feed, self.worn, again=(n,) if again else ())
        return _held(lambda: run(self.net, now, self.inputs))

    def _end(self) -> Held:
        feed = self._feed(self.depth, True)
        output = self._tapped(feed) if self.shape.fast and self.task == "causal-lm" else None
        now = Pass(self.depth, None, feed, self.worn, tap=output is not None)
        return _held(lambda: self._loss(run(self.net, now, self.inputs), output))

    def _loss(self, out: Tensor, output: nn.Linear | None) -> Tensor:
        if out.dim() == 3:
            out = out[:, self.more :]
        flat = out.flatten(0, -2)
        targets = torch.zeros(len(flat), dtype=torch.int64)
        if output is None:
            return functional.cross_entropy(wide(flat), targets)
        return chunked_loss(flat[torch.arange(len(flat))], output, targets)

    def _tapped(self, feed: Tensor) -> nn.Linear | None:
        """The output embedding, if what it gives are the logits."""
        output: Any = cast(Any, self.net).get_output_embeddings()
        if not isinstance(output, nn.Linear):
            return None
        seen: list[Any] = []
        module: Any = output
        hook = output.register_forward_hook(lambda _m, _a, out: seen.append(out))
        with torch.no_grad():
            logits = run(self.net, Pass(self.depth, None, feed, self.worn), self.inputs)
        hook.remove()
        module.forward = Tap(output)
        return output if seen and seen[0] is logits else None


def _held(forward: Callable[[], Tensor]) -> Held:
    """The bytes of a forward and its backward."""
    with Meter() as meter:
        out = forward()
        kept, ahead = meter.live, meter.peak - meter.live
        meter.peak = meter.live
        if out.requires_grad:
            out.backward(torch.empty_like(out))  # pyright: ignore[reportUnknownMemberType]
        back = meter.peak - kept
        del out
    return Held(kept, max(ahead, back))
