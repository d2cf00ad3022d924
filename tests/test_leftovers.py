"""What a kill -9 in the middle of a write leaves behind is gone after the next start."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexp.client.store import StoredMemory
from flexp.errors import CheckpointError
from flexp.holding import hold
from flexp.joining.folder import take

DIE = """
import os, signal, sys
from pathlib import Path
from flexp.parcel import write_atomic
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
for path in sys.argv[1:]:
    if os.fork() == 0:
        write_atomic(path, b"new")
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
"""


def killed_while_writing(paths: list[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    subprocess.run([sys.executable, "-c", DIE, *map(str, paths)], check=True)
    assert all(path.read_bytes() == b"old" for path in paths)
    assert all(any(path.parent.glob(f".{path.name}.*.tmp")) for path in paths)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_every_folder_is_swept_by_its_owner(tmp_path: Path) -> None:
    device, out = tmp_path / "device", tmp_path / "out"
    files = [device / "accepted", device / "model" / "config.json", out / "roster.json"]
    files += [device / "adapter" / "flexp.json", device / "memory" / "000001.parcel"]
    killed_while_writing(files)
    take(device, "anna")
    StoredMemory(device / "memory")
    with hold(out, resume=True):
        assert list(out.glob("*.tmp")) == []
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []
    assert all(path.read_bytes() == b"old" for path in files)


def test_a_disk_that_gives_way_is_an_error_of_one_line(tmp_path: Path) -> None:
    """Of a run in one process as of a served one, and even if its folder is gone by then."""
    out = tmp_path / "out"

    def run() -> None:
        with hold(out, resume=True):
            shutil.rmtree(out)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.jsonl")

    with pytest.raises(CheckpointError, match=r"events\.jsonl cannot be used: No space left"):
        run()
