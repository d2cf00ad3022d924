"""Images from folders, tables and packages: what they become, and what is refused."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_images import drawing

from flexp.data import images, sources
from flexp.data.images import Pixels, decoded, open_pixels
from flexp.data.tasks import Classification
from flexp.errors import AssetError, DataError

GREY = Pixels(1, 8, 8, (0.5,), (0.5,))
COLOUR = Pixels(3, 4, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def saved(numbers: torch.Tensor, form: str, **more: Any) -> bytes:
    """An image [height, width, channels] as a file of that form."""
    pillow: Any = pytest.importorskip("PIL.Image")
    held = numbers.numpy()
    out = io.BytesIO()
    pillow.fromarray(held[:, :, 0] if held.shape[2] == 1 else held).save(out, form, **more)
    return out.getvalue()


def noise(*shape: int) -> torch.Tensor:
    stream = torch.Generator().manual_seed(3)
    return torch.randint(256, shape, generator=stream, dtype=torch.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claims(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG of few bytes that says it is so large."""
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- what an image becomes


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_without_loss_keeps_every_number(form: str, channels: int) -> None:
    wanted = noise(7, 5, channels)
    more = {"lossless": True} if form == "WEBP" else {}
    found = decoded(saved(wanted, form, **more), "x", channels)
    assert torch.equal(found, wanted.permute(2, 0, 1))


def test_our_own_reading_of_netpbm_is_pillows() -> None:
    """With and without a change of channels; without one pillow is not asked."""
    pillow: Any = pytest.importorskip("PIL.Image")
    for channels in (1, 3):
        file = saved(noise(6, 9, channels), "PPM")
        assert file[:2] in (b"P5", b"P6")
        for wanted in (1, 3):
            held = pillow.open(io.BytesIO(file)).convert("L" if wanted == 1 else "RGB")
            theirs = torch.tensor(list(held.tobytes())).reshape(6, 9, wanted).permute(2, 0, 1)
            assert (decoded(file, "x", wanted).long() - theirs).abs().max() <= 1


def test_a_jpeg_that_lies_on_its_side_is_turned() -> None:
    pillow: Any = pytest.importorskip("PIL.Image")
    exif = pillow.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    assert decoded(saved(noise(6, 9, 3), "JPEG", exif=exif), "x", 3).shape == (3, 9, 6)


def test_sizes_are_brought_to_the_models_and_numbers_are_normalised() -> None:
    file = b"P5 8 8 255\n" + bytes([200] * 64)
    (held,) = COLOUR.batch([COLOUR.fitted(file, "x", "")]).values()
    assert held.shape == (1, 3, 4, 4)
    assert held.dtype == torch.float32
    assert torch.allclose(held, torch.full_like(held, (200 / 255 - 0.5) / 0.5))


def test_a_checkpoint_says_how_it_takes_images(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}))
    told = open_pixels(tmp_path, (3, 4, 4))
    assert (told.mean, told.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    path.unlink()
    assert open_pixels(tmp_path, (3, 4, 4)) == COLOUR
    assert told.digest != COLOUR.digest
    for odd in ({"image_std": [0, 1, 1]}, {"image_mean": "x"}, [1]):
        path.write_text(json.dumps(odd))
        with pytest.raises(DataError, match=r"preprocessor_config\.json"):
            open_pixels(tmp_path, (3, 4, 4))


# ---- where they are


def test_a_folder_per_class(tmp_path: Path) -> None:
    for where in ("cat/1.pgm", "dog/2.PNG", "dog/.hidden"):
        path = tmp_path / where
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    found = sorted(((dict(r.fields), r.origin) for r in sources.read(tmp_path)), key=str)
    places = [(tmp_path / at).as_posix() for at in ("cat/1.pgm", "dog/2.PNG")]
    assert found == [
        ({"image": places[0], "label": "cat"}, places[0]),
        ({"image": places[1], "label": "dog"}, places[1]),
    ]


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("test/cat/1.png", {"split": "test"}),
        ("anna/cat/1.png", {"client": "anna"}),
        ("anna/train/cat/1.png", {"client": "anna", "split": "train"}),
    ],
)
def test_folders_above_say_split_and_client(
    tmp_path: Path, where: str, more: dict[str, str]
) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    (row,) = sources.read(tmp_path)
    assert row.fields == {"image": path.as_posix(), "label": "cat", **more}


def test_the_first_rows_of_a_folder_are_of_all_classes(tmp_path: Path) -> None:
    """Also in the same order wherever the folder lies: a device has the shard of the simulation."""
    orders: list[list[str]] = []
    for place in ("here", "there/anna"):
        for n in range(30):
            path = tmp_path / place / "abc"[n // 10] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        rows = sources.read(tmp_path / place)
        orders.append([Path(row.origin).name for row in rows])
        assert {row.fields["label"] for row in rows[:8]} == {"a", "b", "c"}
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("cat/notes.txt", "no image by its name"),
        ("train/dog/2.png", "deeper or less deep"),
        ("3.png", "deeper or less deep"),
    ],
)
def test_what_lies_among_images_is_refused_by_name(tmp_path: Path, also: str, message: str) -> None:
    for where in ("cat/1.png", also):
        (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / where).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        sources.read(tmp_path)


def test_a_table_says_paths_from_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    file = drawing("down", random.Random(0))
    (tmp_path / "seen" / "a.pgm").write_bytes(file)
    table = tmp_path / "rows.csv"
    table.write_text("image,label\nseen/a.pgm,cat\nseen/b.pgm,dog\n")
    task = Classification(("cat", "dog"), GREY, "image")
    rows = sources.read(table)
    held = task.encode(rows[:1])
    assert held.ids == (file[-64:],)
    assert held.labels == (0,)
    with pytest.raises(DataError, match=r"rows\.csv:3: no such file"):
        task.encode(rows)


def test_a_parquet_file_holds_images_as_the_datasets_library_writes_them(tmp_path: Path) -> None:
    arrow: Any = pytest.importorskip("pyarrow")
    written: Any = pytest.importorskip("pyarrow.parquet")
    file = drawing("down", random.Random(0))
    cells = [{"bytes": file, "path": None}, {"bytes": None, "path": "x.png"}]
    table = arrow.table({"image": cells, "raw": [file, file], "label": ["cat", "dog"]})
    written.write_table(table, tmp_path / "a.parquet")
    rows = sources.read(tmp_path / "a.parquet")
    assert [row.fields["image"] for row in rows] == [file, "x.png"]
    for column in ("image", "raw"):
        held = Classification(("cat", "dog"), GREY, column).encode(rows[:1])
        assert held.ids == (file[-64:],)
    with pytest.raises(DataError, match=r'a\.parquet:1: column "image" holds a file'):
        Classification(("cat", "dog"), GREY, "raw", "image").encode(rows)


# ---- packaged sets


def test_fashion_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    for part in ("train", "t10k"):
        numbers = struct.pack(">IIII", 0x803, 2, 8, 8) + bytes(noise(128))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(numbers))
        labels = struct.pack(">II", 0x801, 2) + bytes([9, 0])
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    rows = sources.shipped("fashion-mnist", tmp_path)
    assert [row.fields["label"] for row in rows] == ["Ankle boot", "T-shirt"] * 2
    assert len({row.origin for row in rows}) == 4
    held = Classification(("T-shirt", "Ankle boot"), GREY, "image").encode(rows)
    assert b"".join(map(bytes, held.ids[:2])) == bytes(noise(128))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"odd")
    with pytest.raises(AssetError, match="Fetch the asset again"):
        sources.shipped("fashion-mnist", tmp_path)


def test_cifar10_is_read_from_its_file(tmp_path: Path) -> None:
    file = drawing("down", random.Random(0))
    example = {
        "input": base64.b64encode(file).decode(),
        "target_scores": {"airplane": 0, "cat": 1},
    }
    (tmp_path / "cifar10.json").write_text(json.dumps({"examples": [example]}))
    (row,) = sources.shipped("cifar10", tmp_path)
    assert row.fields == {"image": file, "label": "cat"}
    (tmp_path / "cifar10.json").write_text("{}")
    with pytest.raises(AssetError, match="Fetch the asset again"):
        sources.shipped("cifar10", tmp_path)


# ---- hostile files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (claims(60_000, 60_000), "more than 67108864 pixels"),
        (claims(10_000, 8_000), "more than 67108864 pixels"),
        (claims(40, 40), "damaged or truncated"),
        (claims(4, 4, 16), "8 bits a number"),
        (b"P5 9 9 255\n" + bytes(80), "damaged or truncated"),
        (b"P5 999999999 999999999 255\n" + bytes(80), "more than|damaged or truncated"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated"),
        (b"\xff\xd8\xff\xe0", "damaged or truncated"),
        (b"<svg/>", "is none of PNG, JPEG"),
        (b"GIF89a" + bytes(20), "is none of PNG, JPEG"),
        (b"", "is none of PNG, JPEG"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_files_that_are_refused(data: bytes, message: str) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(DataError, match=rf"^here: .*({message})"):
        decoded(data, "here", 3)


def test_every_truncation_of_a_file_is_refused() -> None:
    for form in ("PNG", "JPEG"):
        file = saved(noise(12, 12, 3), form)
        for at in range(0, len(file) - 20, 7):  # the end of a PNG holds no numbers
            with pytest.raises(DataError):
                decoded(file[:at], "here", 3)


@pytest.mark.parametrize("cell", [None, "", 7, True, "no such file.png", ".", "a\0b"])
def test_cells_without_an_image_are_refused(cell: Any) -> None:
    with pytest.raises(DataError, match=r"^x:1: "):
        GREY.fitted(cell, "x:1", "")


def test_files_that_are_too_long_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGEST", 10)
    (tmp_path / "a.pgm").write_bytes(drawing("down", random.Random(0)))
    with pytest.raises(DataError, match="more than 10 bytes"):
        GREY.fitted("a.pgm", "x:1", str(tmp_path))


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'needs pillow.*pip install "flexp-sfl\[images\]"'):
        decoded(claims(4, 4), "x", 3)
    assert decoded(drawing("down", random.Random(0)), "x", 3).shape == (3, 8, 8)
