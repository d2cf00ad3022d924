"""The plain PEFT stack's way to a first step, in a process that knows nothing else of ours."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from flexp import libraries


def first_step(asked: dict[str, Any]) -> dict[str, Any]:
    """Opens a model and takes one training step: its loss, and the processor seconds until then."""
    torch.set_num_threads(1)
    hf, peft = libraries.transformers(), libraries.peft()
    model = hf.AutoModelForCausalLM.from_pretrained(asked["folder"])
    config = peft.LoraConfig(
        r=asked["rank"], lora_alpha=asked["alpha"], target_modules=["c_attn"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor(asked["ids"])
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    return {"loss": float(loss.detach()), "cpu": time.process_time()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(first_step(json.loads(sys.argv[1]))) + "\n")
