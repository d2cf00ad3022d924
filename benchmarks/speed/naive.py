"""Split LoRA as it is usually written: clients in turn, a dense product of B and A per forward.

The same model and the same mathematics as the program's, in plain modules: norm, gelu and attention
are written out, as they are in the models that such code brings along. What costs beside is
loralib's way of applying an adapter (a whole matrix B A, and one more product of full size, forward
and backward) and a copy of the client's blocks for every client.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp.bench.job import LR, Job


class DenseLora(nn.Module):
    """A frozen linear map and B A beside it, as one matrix."""

    def __init__(self, inner: int, outer: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(inner, outer)
        self.a = nn.Parameter(torch.zeros(rank, inner))
        self.b = nn.Parameter(torch.zeros(outer, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """The map, and the adapter's."""
        return self.frozen(x) + functional.linear(x, self.b @ self.a) * self.scaling


class Norm(nn.Module):
    """A layer's norm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Without mean, of variance one, scaled and moved."""
        away = x - x.mean(-1, keepdim=True)
        return (
            self.weight * (away / torch.sqrt(away.pow(2).mean(-1, keepdim=True) + 1e-5)) + self.bias
        )


def gelu(x: Tensor) -> Tensor:
    """By its tangent, written out."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of what came before, by whole matrices of weights."""
    length = q.shape[2]
    seen = torch.tril(torch.ones(length, length))
    weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return torch.softmax(weights * seen - 1e4 * (1 - seen), dim=-1) @ v


class Block(nn.Module):
    """A decoder's block with the norms in front."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        d, self.heads = job.width, job.heads
        self.before, self.between = Norm(d), Norm(d)
        self.attention = DenseLora(d, 3 * d, job.rank, job.adapter.alpha)
        self.out, self.up, self.down = nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        """The next hidden state, [B, T, d]."""
        rows, length, d = x.shape
        parts = self.attention(self.before(x)).split(d, dim=2)
        q, k, v = (p.view(rows, length, self.heads, -1).transpose(1, 2) for p in parts)
        seen = attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, d))
        inside = gelu(self.up(self.between(x)))
        return x + self.down(inside)


class Front(nn.Module):
    """A client's part."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.words = nn.Embedding(job.vocabulary, job.width)
        self.places = nn.Embedding(max(1024, job.length), job.width)
        self.blocks = nn.Sequential(*(Block(job) for _ in range(job.cut)))

    def forward(self, ids: Tensor) -> Tensor:
        """The hidden state at the cut."""
        return self.blocks(self.words(ids) + self.places(torch.arange(ids.shape[1])))


class Back(nn.Module):
    """The server's part, with the head."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(job) for _ in range(job.cut, job.depth)))
        self.norm = Norm(job.width)
        self.head = nn.Linear(job.width, job.vocabulary, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the next tokens."""
        logits = self.head(self.norm(self.blocks(hidden)))[:, :-1]
        wanted = labels[:, 1:].flatten()
        return functional.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=-100)


class Split:
    """Some clients and a server in one process; every client has its own adapters on both sides."""

    def __init__(self, job: Job, clients: int) -> None:
        front, self.back = Front(job), Back(job)
        fill(front, self.back, job)
        # As many copies of the client's model as clients; the server's model is one.
        self.fronts = [copy.deepcopy(front) for _ in range(clients)]
        begun = [p.detach().clone() for p in trained(self.back)]
        self.far = [[nn.Parameter(p.clone()) for p in begun] for _ in range(clients)]
        near = [list(trained(front)) for front in self.fronts]
        self.optimizers = [
            [torch.optim.AdamW(held, lr=LR, weight_decay=0.0) for held in sides]
            for sides in zip(near, self.far, strict=True)
        ]

    def step(self, client: int, ids: Tensor, labels: Tensor) -> float:
        """One training step of one client."""
        self._wear(self.far[client])
        hidden = self.fronts[client](ids)
        arrived = hidden.detach().requires_grad_()
        loss = self.back(arrived, labels)
        loss.backward()
        hidden.backward(arrived.grad)
        for optimizer in self.optimizers[client]:
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
            optimizer.zero_grad()
        return float(loss.detach())

    def _wear(self, held: Sequence[nn.Parameter]) -> None:
        given = iter(held)
        for module in adapted(self.back):
            module.a, module.b = next(given), next(given)


def adapted(model: nn.Module) -> Iterator[DenseLora]:
    """The maps with an adapter, in order."""
    return (m for m in model.modules() if isinstance(m, DenseLora))


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters of a model, in order."""
    for module in adapted(model):
        yield from (module.a, module.b)


def fill(front: Front, back: Back, job: Job) -> None:
    """The weights of the job's model, and random beginnings of adapters that change nothing."""
    held: dict[str, Tensor] = job.model().state_dict()
    stream = torch.Generator().manual_seed(0)

    def put(module: Any, name: str, *, turned: bool = False) -> None:
        weight = held[f"{name}.weight"]
        module.weight.copy_(weight.T if turned else weight)
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(held[f"{name}.bias"])

    with torch.no_grad():
        put(front.words, "transformer.wte")
        put(front.places, "transformer.wpe")
        put(back.norm, "transformer.ln_f")
        put(back.head, "lm_head")
        blocks: list[Any] = [*front.blocks, *back.blocks]
        for n, block in enumerate(blocks):
            stem = f"transformer.h.{n}"
            put(block.before, f"{stem}.ln_1")
            put(block.between, f"{stem}.ln_2")
            for part, name in (
                (block.attention.frozen, "attn.c_attn"),
                (block.out, "attn.c_proj"),
                (block.up, "mlp.c_fc"),
                (block.down, "mlp.c_proj"),
            ):
                put(part, f"{stem}.{name}", turned=True)
            block.attention.a.normal_(0.0, 0.02, generator=stream)
    for model in (front, back):
        model.requires_grad_(False)
        for parameter in trained(model):
            parameter.requires_grad_()
