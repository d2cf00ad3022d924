"""Surgery on a row's hidden state through a code of few numbers (ZooPFL's auto-encoder).

Of a row's hidden state x, with m the mean over its positions, and two layers each:
    z = Enc(m),  c = [z; e] + n      e is one code for all rows, n a row's nudge, if there is one
    "plain":     x + Dec(c) - m      which is x where the auto-encoder is perfect
    "residual":  x + Dec(c) - Dec([Anchor(m); 0])      which is x until Enc leaves its anchor
The same is added at every position. It happens before the first block, or where the server's first
block begins; all its tensors are near. With q nudges for each row all rows are there q times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from flexp.errors import AdapterError

At = Literal["input", "cut"]
PARTS: tuple[str, ...] = (
    *("encoder_in", "encoder_out", "anchor_in", "anchor_out", "decoder_in", "decoder_out", "own"),
)
NAMES = {at: {part: f"surgery_at_{at}_{part}" for part in PARTS} for at in ("input", "cut")}
NUDGE = "surgery_nudge"  # [q rows, numbers of a code], of one forward and no slot
EVERY = frozenset([NUDGE, *(name for names in NAMES.values() for name in names.values())])


@dataclass(frozen=True)
class Surgery:
    """An encoder to ``code`` numbers, ``own`` more that say whose rows they are, and a decoder.

    ``width`` is that of their inner layers. Without a ``residual`` there is no anchor.
    """

    code: int = 8
    own: int = 4
    width: int = 32
    at: At = "input"
    residual: bool = True
    head: ClassVar[bool] = False

    def layout(self, wide: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes where hidden states are so wide; a last column is what is added."""
        encoder = (self.width, wide + 1), (self.code, self.width + 1)
        decoder = (self.width, self.code + self.own + 1), (wide, self.width + 1)
        shapes = zip(PARTS, (*encoder, *encoder, *decoder, (self.own,)), strict=True)
        kept = [(p, shape) for p, shape in shapes if self.residual or not p.startswith("anchor")]
        return {NAMES[self.at][part]: shape for part, shape in kept}


def begun(shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
    """How a tensor begins: layers normal by how many numbers a sum has, one's own code at 0."""
    if len(shape) == 1:
        return torch.zeros(shape)
    out = torch.empty(shape).normal_(generator=stream) / (shape[1] - 1) ** 0.5
    out[:, -1] = 0
    return out


def middle(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of [rows, positions, width] over positions that are no padding."""
    if hidden.dim() != 3:
        raise AdapterError("Surgery needs a model whose hidden states are rows of positions.")
    if mask is None:
        return hidden.float().mean(1)
    here = (mask != 0).to(torch.float32)[..., None]
    return (hidden.float() * here).sum(1) / here.sum(1)


def layers(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Two of them, with tanh between."""
    inner = torch.tanh(functional.linear(x, first[:, :-1], first[:, -1]))
    return functional.linear(inner, second[:, :-1], second[:, -1])


def coded(mean: Tensor, worn: Mapping[str, Tensor], at: At, own: Tensor | None = None) -> Tensor:
    """c of rows with these means, [rows, numbers], without nudges; ``own`` instead of e."""
    names = NAMES[at]
    z = layers(mean, worn[names["encoder_in"]], worn[names["encoder_out"]])
    own = worn[names["own"]].expand(len(z), -1) if own is None else own
    return torch.cat([z, own], dim=1)


def decoded(code: Tensor, worn: Mapping[str, Tensor], at: At) -> Tensor:
    """Dec(c)."""
    names = NAMES[at]
    return layers(code, worn[names["decoder_in"]], worn[names["decoder_out"]])


def operated(
    hidden: Tensor, inputs: Mapping[str, Tensor], worn: Mapping[str, Tensor], at: At
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and inputs after the surgery that is worn there, if any."""
    names, inputs = NAMES[at], dict(inputs)
    if names["own"] not in worn:
        return hidden, inputs
    mean = middle(hidden, inputs.get("attention_mask"))
    code, before = coded(mean, worn, at), mean
    if names["anchor_in"] in worn:
        z = layers(mean, worn[names["anchor_in"]], worn[names["anchor_out"]])
        blank = torch.zeros_like(code[:, z.shape[1] :])
        before = decoded(torch.cat([z, blank], dim=1), worn, at)
    if NUDGE in worn:
        times = len(worn[NUDGE]) // len(code)
        code, before = code.repeat(times, 1) + worn[NUDGE], before.repeat(times, 1)
        hidden = hidden.repeat(times, 1, 1)
        inputs = {k: v.repeat(times, *(1,) * (v.dim() - 1)) for k, v in inputs.items()}
    change = decoded(code, worn, at) - before
    return hidden + change[:, None].to(hidden.dtype), inputs
