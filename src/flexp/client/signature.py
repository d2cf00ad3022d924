"""What a batch would change in a small frozen model that is the same for all: a gradient.

It is that of the weight of the last block's last linear map that gives hidden states, the
down-projection of its MLP: G = v' x, with x what enters the map and v the gradient of the loss
where it gives its result. What lies behind the map is differentiated as it is, norm and head, so no
Jacobian is approximated; in front of it there is no graph, and the cost is one forward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from flexp.data.examples import Batch
from flexp.data.tasks import Loss
from flexp.errors import AdapterError
from flexp.model.backbone import Backbone
from flexp.model.quantize import QuantizedLinear
from flexp.model.targets import linear_maps
from flexp.model.worn import Worn


def last_map(body: Backbone) -> str:
    """The path of that linear map; AdapterError if the last block has none."""
    stem = f"{body.blocks_path}.{body.depth - 1}."
    maps = {p: m for p, m in linear_maps(body.model).items() if p.startswith(stem)}
    found = [p for p, m in maps.items() if _given(m) == body.sizes[0]]
    if not found:
        raise AdapterError(f"The last block of {body.name} has no linear map to hidden states.")
    return found[-1]


def signature(body: Backbone, task: Loss, batch: Batch) -> Tensor:
    """G [width, what enters the map] of the task's loss of a batch, with nothing worn."""
    path = last_map(body)
    module: Any = body.model.get_submodule(path)
    if isinstance(module, QuantizedLinear):
        raise AdapterError("A probe whose weights are codes gives no gradient. Do not quantize it.")
    with torch.enable_grad():
        weight = cast("Tensor", module.weight).detach().float().requires_grad_()
        worn = Worn(direct={path: {"weight": weight}})
        loss = task.loss(body.run(batch.inputs, worn), batch.labels)
        (found,) = torch.autograd.grad(loss, [weight])
    return found if isinstance(module, nn.Linear) else found.T.contiguous()


def _given(module: nn.Module) -> int:
    """How many numbers a linear map gives."""
    weight = cast("Tensor", cast(Any, module).weight)
    return int(weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1])
