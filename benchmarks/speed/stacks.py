"""The same job on PEFT, and on this program, with a few clients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import torch
from torch import Tensor

from flexp.bench.job import LR, Job
from flexp.data.examples import Batch
from flexp.tensors import Tensors


class Peft:
    """One model and an adapter per client, switched; ``bf16`` computes under autocast."""

    def __init__(self, job: Job, clients: int, *, bf16: bool = False) -> None:
        names = [f"c{n}" for n in range(clients)]
        config = peft.LoraConfig(
            r=job.rank,
            lora_alpha=int(job.adapter.alpha),
            target_modules=["c_attn"],
            fan_in_fan_out=True,
        )
        base: Any = job.model()
        self.model: Any = peft.get_peft_model(base, config, adapter_name=names[0])
        for name in names[1:]:
            self.model.add_adapter(name, config)
        self.model.train()
        self.names, self.bf16 = names, bf16
        self.optimizers = {
            name: torch.optim.AdamW(self.held(name).values(), lr=LR, weight_decay=0.0)
            for name in names
        }

    def held(self, name: str) -> dict[str, Any]:
        """A client's parameters, by the names that they have in files."""
        inside = f".{name}."
        named: Mapping[str, Any] = dict(self.model.named_parameters())
        return {k.replace(inside, "."): p for k, p in named.items() if inside in k}

    def put(self, name: str, adapter: Tensors) -> None:
        """Replaces a client's adapter."""
        with torch.no_grad():
            for key, parameter in self.held(name).items():
                parameter.copy_(adapter[key])

    def step(self, client: int, batch: Batch) -> float:
        """One training step of one client."""
        name = self.names[client]
        self.model.set_adapter(name)
        fast: AbstractContextManager[Any] = nullcontext()
        if self.bf16:
            fast = torch.autocast("cpu", dtype=torch.bfloat16)
        with fast:
            loss: Tensor = self.model(**batch.inputs, labels=batch.labels).loss
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        self.optimizers[name].step()  # pyright: ignore[reportUnknownMemberType]
        self.optimizers[name].zero_grad()
        return float(loss.detach())
