"""Does all that the core needs exist as a wheel for 64-bit Arm Linux? Nothing is downloaded.

    make wheels-arm

Resolves the core dependencies of pyproject.toml (no extras) with the versions of requirements.lock
and one of torch, as `pip install` would on such a device, and looks for a wheel of each. Writes
benchmarks/results/arm-wheels.json; fails if a package would have to be built there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "arm-wheels.json"
PYTHON = (3, 11)
GLIBC = (2, 28)
MACHINE = "aarch64"


def pinned(lock: str) -> list[str]:
    """The versions of a lock, without its hashes."""
    return re.findall(r"^[a-z0-9-]+==[^ \n\\]+(?: ; [^\n\\]+?)?(?= *\\?$)", lock, re.M)


def fits(wheel: str) -> bool:
    """Whether a wheel installs there, by its name."""
    pythons, abis, platforms = (
        part.split(".") for part in wheel.removesuffix(".whl").split("-")[-3:]
    )
    return any(map(runs_on, platforms)) and any(runs_in(p, a) for p in pythons for a in abis)


def runs_on(platform: str) -> bool:
    if platform in ("any", f"manylinux2014_{MACHINE}"):
        return True
    asked = re.fullmatch(rf"manylinux_(\d+)_(\d+)_{MACHINE}", platform)
    return asked is not None and (int(asked[1]), int(asked[2])) <= GLIBC


def runs_in(python: str, abi: str) -> bool:
    own = f"cp{PYTHON[0]}{PYTHON[1]}"
    if abi == "none":
        return python in ("py3", own, f"py{PYTHON[0]}{PYTHON[1]}")
    version = re.fullmatch(r"cp3(\d+)", python)
    stable = abi == "abi3" and version is not None and int(version[1]) <= PYTHON[1]
    return stable or (python == abi == own)


def resolved(uv: str, torch: str) -> list[dict[str, Any]]:
    """What would be installed: name, version and every wheel that there is of it."""
    with tempfile.TemporaryDirectory() as folder:
        limits, out = Path(folder, "limits.txt"), Path(folder, "pylock.toml")
        lines = [*pinned((ROOT / "requirements.lock").read_text("utf-8")), torch]
        limits.write_text("\n".join(lines), encoding="utf-8")
        command = [uv, "pip", "compile", str(ROOT / "pyproject.toml"), "--quiet", "--no-header"]
        # --no-config: the lock leaves out what belongs to one build of torch; a device would not.
        command += ["--no-config", "--format", "pylock.toml", "--output-file", str(out)]
        command += ["--python-version", ".".join(map(str, PYTHON)), "--constraint", str(limits)]
        command += ["--python-platform", f"{MACHINE}-manylinux_{GLIBC[0]}_{GLIBC[1]}"]
        subprocess.run(command, check=True)
        return tomllib.loads(out.read_text("utf-8"))["packages"]


def row(package: dict[str, Any], lock: str) -> dict[str, Any]:
    """The smallest wheel that fits and that the lock allows; its name is None if there is none."""
    locked = re.search(rf"^{package['name']}==", lock, re.M)
    found: list[tuple[int, str]] = []
    for wheel in package.get("wheels", []):
        name = wheel["url"].rpartition("/")[2]
        if fits(name) and (not locked or wheel["hashes"]["sha256"] in lock):
            found.append((wheel.get("size") or 0, name))
    found.sort()
    size, name = found[0] if found else (None, None)
    return {
        "package": package["name"],
        "version": package["version"],
        "wheel": name,
        "bytes": size or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv")
    parser.add_argument("--torch", default="torch==2.13.0")
    asked = parser.parse_args()
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    rows = [row(package, lock) for package in resolved(asked.uv, asked.torch)]
    locked = {line.partition("==")[0] for line in pinned(lock)}
    core = [r for r in rows if r["package"] in locked]
    torch = [r for r in rows if r["package"] == "torch"]
    brought = [r for r in rows if r["package"] not in locked and r not in torch]
    missing = [r["package"] for r in rows if r["wheel"] is None]
    groups = {"core": core, "torch": torch, "this_build_of_torch_also_asks_for": brought}
    result = {
        "python": ".".join(map(str, PYTHON)),
        "platform": f"Linux, {MACHINE}, glibc {GLIBC[0]}.{GLIBC[1]} or newer",
        "missing": missing,
        "bytes": {name: sum(r["bytes"] or 0 for r in group) for name, group in groups.items()},
        **groups,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, group in groups.items():
        megabytes = sum(r["bytes"] or 0 for r in group) / 1e6
        print(f"{name}: {len(group)} packages, {megabytes:,.0f} MB")
    if missing:
        sys.exit(f"No wheel for {MACHINE}: {', '.join(missing)}")


if __name__ == "__main__":
    main()
