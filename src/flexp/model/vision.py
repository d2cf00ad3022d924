"""Convolutional classifiers of images as a list of equal blocks, for models without a checkpoint.

``residual``: a stem and basic blocks (He et al. 2016, arXiv 1512.03385) with group norms, which
know nothing of the other rows of a batch; else the CNN of federated averaging (McMahan et al. 2017,
arXiv 1602.05629): convolution, ReLU and pooling per number of channels, then one hidden layer.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from flexp import libraries

KIND = "flexp-blocks"


class Block(nn.Module):
    """Steps one after another; with a ``skip`` it is added to what they give, before a ReLU."""

    def __init__(self, steps: nn.Sequential) -> None:
        super().__init__()
        self.steps = steps
        self.skip: nn.Module | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """From images [rows, channels, height, width] or [rows, width] to the same."""
        out: Tensor = self.steps(hidden_states)
        return out if self.skip is None else functional.relu(out + self.skip(hidden_states))


@cache
def register() -> None:
    """Makes the classes, once, and lets the library's own ones open such models by their config."""
    hf = libraries.transformers()
    config_class, model_class = (
        cast("type[Any]", c) for c in (hf.PretrainedConfig, hf.PreTrainedModel)
    )

    class BlocksConfig(config_class):
        """``channels`` of stages, each ``repeat`` residual blocks; ``hidden_size`` of the CNN."""

        model_type = KIND

        def __init__(self, **given: Any) -> None:
            self.channels, self.residual, self.repeat = [32, 64], False, 1
            self.kernel, self.hidden_size = 5, 512
            self.image_size, self.num_channels = 32, 3
            super().__init__(**given)  # pyright: ignore[reportUnknownMemberType]

    class Blocks(model_class):
        """Blocks, the mean over the places that are left of each channel, and a head."""

        config_class = BlocksConfig
        base_model_prefix = "body"
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:
            super().__init__(config)  # pyright: ignore[reportUnknownMemberType]
            self.body = nn.Module()
            self.body.blocks = nn.ModuleList(_residual(config) if config.residual else _cnn(config))
            width = config.channels[-1] if config.residual else config.hidden_size
            self.head = nn.Linear(width, config.num_labels)
            self.post_init()

        def forward(self, pixel_values: Tensor, **_: Any) -> Any:
            hidden = pixel_values
            for block in cast("nn.ModuleList", self.body.blocks):
                hidden = block(hidden)
            hidden = hidden.mean((2, 3)) if hidden.dim() == 4 else hidden
            return SimpleNamespace(logits=self.head(hidden))

        def _init_weights(self, module: nn.Module) -> None:
            """Nothing: who opens a model that has no checkpoint draws its weights."""

    hf.AutoConfig.register(KIND, BlocksConfig)
    hf.AutoModelForImageClassification.register(BlocksConfig, Blocks)


def _cnn(config: Any) -> list[Block]:
    made: list[Block] = []
    sizes: list[int] = [config.num_channels, *config.channels]
    side: int = config.image_size
    for before, after in pairwise(sizes):
        convolution = nn.Conv2d(before, after, config.kernel)
        made.append(_block(conv=convolution, relu=nn.ReLU(), pool=nn.MaxPool2d(2)))
        side = (side - config.kernel + 1) // 2
    wide = nn.Linear(sizes[-1] * side * side, config.hidden_size)
    return [*made, _block(flat=nn.Flatten(), dense=wide, relu=nn.ReLU())]


def _residual(config: Any) -> list[Block]:
    before: int = config.channels[0]
    made = [_block(**_normed("1", config.num_channels, before), relu=nn.ReLU())]
    for stage, after in enumerate(cast("list[int]", config.channels)):
        for at in range(config.repeat):
            stride = 2 if stage and not at else 1
            first = _normed("1", before, after, stride=stride)
            alike = before == after and stride == 1
            skip = _normed("", before, after, kernel=1, stride=stride)
            block = _block(**first, relu=nn.ReLU(), **_normed("2", after, after))
            block.skip = nn.Identity() if alike else nn.Sequential(OrderedDict(skip))
            made.append(block)
            before = after
    return made


def _block(**steps: nn.Module) -> Block:
    return Block(nn.Sequential(OrderedDict(steps)))


def _normed(
    name: str, before: int, after: int, *, kernel: int = 3, stride: int = 1
) -> dict[str, nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return {f"conv{name}": convolution, f"norm{name}": nn.GroupNorm(min(8, after), after)}
