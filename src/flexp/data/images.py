"""Images: files to the pixels that a model takes, and the sets and folders that hold them.

An image is the bytes of a file, or the path of one. What is odd is refused before it is unpacked:
a small file may claim to be a size that no memory holds.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from flexp.data.formats import Value, extra
from flexp.data.lines import CHUNK, opened
from flexp.errors import AssetError, DataError

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm"})
READ = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
LARGEST = 1 << 26  # bytes of a file
MOST = 1 << 26  # pixels of an image
PLAIN = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})  # 8 bits a number
_NETPBM = re.compile(rb"P([56])\s(\d{1,9})\s(\d{1,9})\s255\s")
_FASHION = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True)
class Pixels:
    """What a model takes: the shape of its images, and how numbers from 0 to 1 are normalised."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides what an image becomes."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()

    def fitted(self, value: Value, where: str, base: str) -> bytes:
        """An image's numbers, channel by channel, at the model's size.

        A relative path begins in ``base``. DataError, which says ``where``, if there is no image.
        """
        pixels = decoded(_file(value, where, base), where, self.channels)
        if pixels.shape[1:] != (self.height, self.width):
            size = self.height, self.width
            resized = functional.interpolate(
                pixels[None].float(), size, mode="bilinear", antialias=True, align_corners=False
            )
            pixels = resized[0].round().clamp(0, 255).to(torch.uint8)
        return pixels.numpy().tobytes()

    def batch(self, images: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``pixel_values`` [rows, channels, height, width] of images that are fitted."""
        shape = len(images), self.channels, self.height, self.width
        held = bytearray(b"".join(map(bytes, images)))
        pixels = torch.frombuffer(held, dtype=torch.uint8) if held else torch.empty(0)
        mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return {"pixel_values": (pixels.reshape(shape) / 255 - mean) / std}


def open_pixels(folder: Path, shape: tuple[int, int, int]) -> Pixels:
    """How a model in a folder takes images of that shape; DataError for settings that are none."""
    told: dict[str, Any] = {}
    path = folder / "preprocessor_config.json"
    try:
        told = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        mean, std = (told.get(key) or [0.5] for key in ("image_mean", "image_std"))
        means, stds = (tuple(float(v) for v in (of * shape[0])[: shape[0]]) for of in (mean, std))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise DataError(f"{path}: not settings for images: {problem}") from problem
    if min(stds) <= 0 or len(means) != len(stds):
        raise DataError(f"{path}: image_std must be above 0, one number for each of image_mean.")
    return Pixels(*shape, means, stds)


def decoded(data: bytes, where: str, channels: int) -> Tensor:
    """The pixels of an image file, uint8 [channels, height, width]; DataError if there are none."""
    plain = _NETPBM.match(data)
    if plain is not None:
        own = 1 if plain[1] == b"5" else 3
        width, height = int(plain[2]), int(plain[3])
        if width * height * own == len(data) - plain.end() and len(data) > plain.end():
            held = torch.frombuffer(bytearray(data[plain.end() :]), dtype=torch.uint8)
            pixels = held.reshape(height, width, own)
            return _channels(pixels, channels).permute(2, 0, 1).contiguous()
    with extra("pillow", "images"):
        from PIL import Image, ImageOps
    pillow, turned = cast("Any", Image), cast("Any", ImageOps)
    try:
        with pillow.open(io.BytesIO(data), formats=READ) as image:
            if prod(image.size) > MOST:
                raise DataError(f"{where}: more than {MOST} pixels. Make it smaller.")
            if image.mode not in PLAIN:
                raise DataError(
                    f'{where}: an image of the kind "{image.mode}", not of 8 bits a number. '
                    "Save it as 8-bit grey or colour."
                )
            form = turned.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            size = form.height, form.width, channels
            held = torch.frombuffer(bytearray(form.tobytes()), dtype=torch.uint8)
            return held.reshape(size).permute(2, 0, 1).contiguous()
    except DataError:
        raise
    except Exception as broken:  # what decoders raise on damage is no closed list
        if type(broken).__name__.startswith("DecompressionBomb"):
            raise DataError(f"{where}: more than {MOST} pixels. Make it smaller.") from broken
        reason = "is damaged or truncated" if _known(data) else f"is none of {', '.join(READ)}"
        raise DataError(
            f"{where}: the image {reason} ({type(broken).__name__}). Save it again, or remove it."
        ) from broken


def holds_images(folder: Path) -> bool:
    """Whether a folder holds folders with images, at most three deep."""
    below = [folder]
    for _ in range(3):
        below = [p for at in below for p in _visible(at) if p.is_dir()]
        if any(_is_image(p) for at in below for p in _visible(at)):
            return True
    return False


def listed(folder: Path, splits: Sequence[str]) -> Iterator[tuple[dict[str, Value], str]]:
    """Fields and origin of the images in a folder per class, which may lie in others.

    Those may be named by split, or else by client, or by client and, in there, split. The order is
    one that mixes classes and does not depend on where the folder is: the first rows are fair.
    """
    deep: dict[int, Path] = {}
    for path in sorted(_files(folder, 4), key=lambda p: _drawn(p.parent.name, p.name)):
        names = path.relative_to(folder).parts[:-1]
        where = path.as_posix()
        if not _is_image(path):
            raise DataError(f"{where}: no image by its name, among images. Remove it.")
        first = deep.setdefault(len(names), path)
        if len(deep) > 1 or not 1 <= len(names) <= 3:
            raise DataError(
                f"{where}: lies deeper or less deep than {first.name}. Put images in a folder per "
                "class, these into folders per split or client, or client and split."
            )
        above, fields = list(names[:-1]), dict[str, Value](image=where, label=names[-1])
        if above and above[-1] in splits:
            fields["split"] = above.pop()
        if len(above) > 1:
            raise DataError(
                f'{where}: "{above[-1]}" is not a split. Name the folders of a client train, '
                "validation and test."
            )
        yield fields | dict.fromkeys(["client"] if above else [], above[0] if above else ""), where


# ---- packaged sets


def fashion(folder: Path) -> Iterator[tuple[dict[str, Value], str]]:
    """Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of 28 x 28 in IDX files."""
    for part in ("train", "t10k"):
        images, labels = (
            _idx(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
        )
        _, height, width = images.shape
        for n, image in enumerate(images):
            head = f"P5 {width} {height} 255\n".encode()
            fields: dict[str, Value] = {"image": head + image.numpy().tobytes()}
            yield fields | {"label": _FASHION[int(labels[n])]}, f"fashion-mnist/{part}:{n + 1}"


def cifar10(folder: Path) -> Iterator[tuple[dict[str, Value], str]]:
    """The test set of CIFAR-10 (Krizhevsky 2009): 10,000 images of 32 x 32, as BIG-bench has it.

    There it is sorted by class; here classes are mixed.
    """
    path = folder / "cifar10.json"
    try:
        found = enumerate(json.loads(path.read_text("utf-8"))["examples"], start=1)
        for n, each in sorted(found, key=lambda one: _drawn(one[0])):
            scores = cast("Mapping[str, int]", each["target_scores"])
            fields: dict[str, Value] = {"image": base64.b64decode(each["input"])}
            yield fields | {"label": max(scores, key=lambda k: scores[k])}, f"cifar10:{n}"
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as broken:
        raise AssetError(f"{path}: missing or damaged. Fetch the asset again.") from broken


def _idx(path: Path) -> Tensor:
    """The bytes of an IDX file: two zeros, their type, the number of dimensions, and these."""
    try:
        data = gzip.decompress(path.read_bytes())
        sizes = [int.from_bytes(data[at : at + 4]) for at in range(4, 4 + 4 * data[3], 4)]
        held = torch.frombuffer(bytearray(data[4 + 4 * len(sizes) :]), dtype=torch.uint8)
        return held.reshape(sizes)
    except (OSError, EOFError, zlib.error, ValueError, IndexError, RuntimeError) as broken:
        raise AssetError(f"{path}: missing or damaged. Fetch the asset again.") from broken


# ---- inside


def _file(value: Value, where: str, base: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        held = "nothing" if value in (None, "") else "no path and no image"
        raise DataError(f"{where}: the column of images holds {held}. Write a path there.")
    path = Path(base, value)
    if not path.is_file():
        raise DataError(f"{where}: no such file of an image. Correct the path.")
    with opened(path, CHUNK) as source:
        data = source.file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise DataError(f"{where}: a file of more than {LARGEST} bytes. Make the image smaller.")
    return data


def _channels(pixels: Tensor, channels: int) -> Tensor:
    """Grey as colour, or colour as grey, as ITU-R 601-2 weighs it; [height, width, channels]."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, -1, 3)
    weights = torch.tensor([299, 587, 114])
    return ((pixels.long() * weights).sum(-1, keepdim=True) / 1000).round().to(torch.uint8)


def _known(data: bytes) -> bool:
    heads = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"P5", b"P6")
    return data.startswith(heads)


def _drawn(*names: object) -> bytes:
    """A place among others that says nothing of these names."""
    return hashlib.sha256(repr(names).encode()).digest()


def _visible(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]


def _files(folder: Path, most: int) -> Iterator[Path]:
    """Files in a folder and those in it, so many deep: links may lead in a circle."""
    for path in _visible(folder):
        if path.is_dir() and most:
            yield from _files(path, most - 1)
        else:
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS
