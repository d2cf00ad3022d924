"""What is learned at a model's input or between two blocks: prompts, and frames around pictures.

In front of the embeddings (as PEFT's) and added to them a prompt is at the input. Behind the first
position, a class token where there is one, it joins what enters the first block, or the server's
first block; there it has no position of its own in models that add positions to embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from flexp.errors import AdapterError
from flexp.model.skeleton import image_shape, inputs_of, reads_ids, states_of
from flexp.model.surgery import EVERY, Surgery, operated
from flexp.model.surgery import NAMES as SURGERY

if TYPE_CHECKING:
    from flexp.model.backbone import Backbone

FRONT, ADDED, BEHIND, AT_CUT = "prompt_embeddings", "prompt_added", "prompt_behind", "prompt_at_cut"
PLACES = {"front": FRONT, "added": ADDED, "behind": BEHIND, "cut": AT_CUT}
TOP, BOTTOM, LEFT, RIGHT = (f"frame_{side}" for side in ("top", "bottom", "left", "right"))
NAMES = EVERY | {*PLACES.values(), TOP, BOTTOM, LEFT, RIGHT}  # of no module of the model


@dataclass(frozen=True)
class Prompt:
    """``tokens`` learned positions: in front of the input (Lester et al. 2021), or elsewhere.

    ``at``: "front"; "added" to the first tokens' embeddings; "behind" the first position of what
    enters the first block; "cut", the same at the server's first block, where it is far. All others
    are near. They begin as normal numbers of that ``spread``.
    """

    tokens: int = 8
    head: bool = True
    at: Literal["front", "added", "behind", "cut"] = "front"
    spread: float = 0.02


@dataclass(frozen=True)
class Frame:
    """A border of learned pixels, ``width`` wide, added to pictures (pFedPT); always near.

    ``gray``: one channel for all of them.
    """

    width: int = 2
    spread: float = 1.0
    gray: bool = False
    head: ClassVar[bool] = False


def input_layout(net: Any, kind: Prompt | Frame | Surgery) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is learned at a model's input; AdapterError if there is no place."""
    if isinstance(kind, Surgery):
        return kind.layout(_width(net, kind.at))
    if isinstance(kind, Prompt):
        return {PLACES[kind.at]: (kind.tokens, _width(net, kind.at))}
    if reads_ids(net):
        raise AdapterError("A frame is for pictures, and this model reads token ids.")
    channels, height, width = image_shape(net.config)
    if not 0 < 2 * kind.width < min(height, width):
        raise AdapterError(f"A frame of width {kind.width} does not fit {height} x {width} pixels.")
    channels = 1 if kind.gray else channels
    row = (channels, kind.width, width)
    column = (channels, height - 2 * kind.width, kind.width)
    return {TOP: row, BOTTOM: row, LEFT: column, RIGHT: column}


def _width(net: Any, at: str) -> int:
    """How many numbers a position has there."""
    if at in ("front", "added"):
        weight = getattr(inputs_of(net), "weight", None)
        if weight is None or weight.dim() != 2:
            raise AdapterError(
                f'A prompt "{at}" needs a model that reads token ids. Use a LoRA adapter.'
            )
        return int(weight.shape[1])
    if reads_ids(net):
        return int(net.config.get_text_config().hidden_size)
    shapes = cast(Any, states_of(net.config, "images")).shapes
    if {len(shape) for shape in shapes} != {2}:
        raise AdapterError("This adapter needs a model whose hidden states are rows of positions.")
    return int(shapes[0][1])


def framed(pixels: Tensor, frame: Mapping[str, Tensor]) -> Tensor:
    """Pictures [rows, channels, height, width] with a frame added at their border."""
    inner = pixels.shape[-1] - 2 * frame[TOP].shape[1]
    blank = frame[LEFT].new_zeros(*frame[LEFT].shape[:2], inner)
    middle = torch.cat([frame[LEFT], blank, frame[RIGHT]], dim=2)
    return pixels + torch.cat([frame[TOP], middle, frame[BOTTOM]], dim=1).to(pixels.dtype)


def entered(
    body: Backbone, inputs: Mapping[str, Tensor], worn: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs of a forward with what is worn there, and what enters the first block.

    None if that is the model's own business.
    """
    inputs = dict(inputs)
    if TOP in worn:
        inputs["pixel_values"] = framed(inputs["pixel_values"], worn)
    if FRONT in worn or ADDED in worn:
        embedded: Tensor = cast(Any, body.model).get_input_embeddings()(inputs.pop("input_ids"))
        if ADDED in worn:
            embedded = embedded + spread_out(worn[ADDED], inputs["attention_mask"], embedded.dtype)
        if FRONT in worn:
            rows, tokens = len(embedded), len(worn[FRONT])
            prompt = worn[FRONT].to(embedded.dtype).expand(rows, -1, -1)
            embedded = torch.cat([prompt, embedded], dim=1)
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask.new_ones(rows, tokens), mask], dim=1)
        inputs["inputs_embeds"] = embedded
    if not {BEHIND, ADDED, SURGERY["input"]["own"]} & worn.keys():
        return inputs, None
    hidden, more = body.run(inputs, last=0), 0
    hidden, inputs = operated(hidden, inputs, worn, "input")
    if BEHIND not in worn and ADDED not in worn:
        return inputs, hidden
    # From here on ids count, as blanks: classifiers see in them where a text ends.
    if BEHIND in worn:
        hidden, more = put_in(hidden, worn[BEHIND]), len(worn[BEHIND])
    shapes = {k: tuple(v.shape) for k, v in inputs.items()}
    return body.blanks(*widened(shapes, inputs.get("attention_mask"), more)), hidden


def spread_out(prompt: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A row per position: the prompt's for the first ones that are no padding, else 0."""
    at = mask.cumsum(1) - 1
    here = (mask != 0) & (at < len(prompt))
    rows = prompt.to(dtype)[at.clamp(0, len(prompt) - 1)]
    return rows * here[..., None].to(dtype)


def widened(
    shapes: Mapping[str, tuple[int, ...]], mask: Tensor | None, more: int
) -> tuple[dict[str, tuple[int, ...]], Tensor | None]:
    """Shapes and mask of inputs with so many positions more behind the first one."""
    wide = {k: s if k == "pixel_values" else (s[0], s[1] + more, *s[2:]) for k, s in shapes.items()}
    if mask is None or not more:
        return wide, mask
    return wide, torch.cat([mask[:, :1], mask.new_ones(len(mask), more), mask[:, 1:]], dim=1)


def longer(shape: tuple[int, ...], more: int) -> tuple[int, ...]:
    """A row's hidden state with so many positions more, if it is one of positions."""
    return (shape[0] + more, shape[1]) if len(shape) == 2 else shape


def put_in(hidden: Tensor, prompt: Tensor) -> Tensor:
    """Hidden states [rows, positions, width] with a prompt behind the first position."""
    rows = prompt.to(hidden.dtype).expand(len(hidden), -1, -1)
    return torch.cat([hidden[:, :1], rows, hidden[:, 1:]], dim=1)


def taken_out(out: Tensor, more: int) -> Tensor:
    """What is left of [rows, positions, ...] without the positions that were put in."""
    return torch.cat([out[:, :1], out[:, 1 + more :]], dim=1) if more else out
