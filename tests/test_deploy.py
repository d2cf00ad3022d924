"""What is for servers and devices: hardened, and with commands that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

from flexp import cli

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "flexp-server.service"
COMPOSE = DEPLOY / "compose.yaml"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))


def composed() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """What a Dockerfile says, as (INSTRUCTION, rest)."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text("utf-8"))
    lines = [n for n in text.splitlines() if n.strip() and not n.startswith("#")]
    return [(n.split()[0], n.partition(" ")[2].strip()) for n in lines]


# ---- commands


def command_lines(path: Path) -> Iterator[list[str]]:
    """The words after ``flexp`` of every command that a file calls."""
    text = path.read_text("utf-8")
    if path == UNIT:
        found = [shlex.split(n) for n in re.findall(r"^Exec\w+=(.*)$", text, re.M)]
    elif path == COMPOSE:
        found = [shlex.split(s["command"]) for s in composed().values()]
    else:
        found = [json.loads(rest) for name, rest in instructions(path) if name == "CMD"]
    for program, *words in found:
        assert Path(program).name == "flexp"
        yield words


@pytest.mark.parametrize("path", [UNIT, COMPOSE, *DOCKERFILES], ids=lambda p: p.name)
def test_commands_exist_with_these_options(path: Path) -> None:
    group: Any = get_command(cli.app)
    called = list(command_lines(path))
    assert called
    for name, *words in called:
        assert name in group.commands, name
        known = {o for p in group.commands[name].params for o in p.opts} | {"--help"}
        assert {w for w in words if w.startswith("-")} <= known, words


# ---- systemd


def settings() -> list[tuple[str, str]]:
    lines = [n for n in UNIT.read_text("utf-8").splitlines() if n and n[0] not in "#["]
    return [(n.partition("=")[0], n.partition("=")[2]) for n in lines]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("User", "flexp"),
        ("Restart", "on-failure"),
        ("RestartSec", "2"),
        ("StartLimitBurst", "5"),
        ("LimitNOFILE", "65536"),
        ("LimitCORE", "0"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("StateDirectory", "flexp"),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("SystemCallFilter", "@system-service"),
    ],
)
def test_the_unit_is_hardened(name: str, value: str) -> None:
    assert (name, value) in settings()


def test_the_unit_is_bounded_and_says_nothing_twice() -> None:
    names = [name for name, _ in settings()]
    assert {"MemoryMax", "TasksMax"} <= set(names)
    assert len(names) == len(set(names))


def test_torch_may_write_code_at_run_time() -> None:
    """Without that its kernels for processors fail: "could not create a primitive"."""
    assert "MemoryDenyWriteExecute" not in dict(settings())


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_knows_every_directive(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    program = shutil.which("true")
    text = re.sub(r"(?<=^ExecStart=)\S+", str(program), UNIT.read_text("utf-8"), flags=re.M)
    unit.write_text(text, encoding="utf-8")
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    ).stderr
    assert not [line for line in said.splitlines() if UNIT.name in line]


# ---- containers


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_is_small_in_rights(path: Path) -> None:
    said = instructions(path)
    assert {rest.split()[0] for name, rest in said if name == "FROM"} == {"python:3.11-slim"}
    last = [rest for name, rest in said if name == "USER"][-1]
    assert int(last.split(":")[0]) > 0
    assert [name for name, _ in said].index("USER") > [n for n, _ in said].index("COPY")
    runs = [rest for name, rest in said if name == "RUN"]
    assert any("--require-hashes -r requirements.lock" in run for run in runs)
    assert not any(name == "ADD" for name, _ in said)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_what_an_image_copies_is_there_and_not_ignored(path: Path) -> None:
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.M))
    for name, rest in instructions(path):
        if name == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert source in allowed


def test_images_take_the_torch_of_the_makefile() -> None:
    torch = re.findall(r"^TORCH *\?= *(\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for path in DOCKERFILES:
        assert re.findall(r'^ARG TORCH="(\S+)"$', path.read_text("utf-8"), re.M) == torch


def test_containers_hold_nothing_but_their_volumes() -> None:
    services = composed()
    assert set(services) == {"server", "anna", "ben"}
    volumes = yaml.safe_load(COMPOSE.read_text("utf-8"))["volumes"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["tmpfs"] == ["/tmp"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network_mode", "user"} & set(service)
        mounts = dict(v.split(":")[:2] for v in service["volumes"])
        assert "/identity" in mounts.values()
        assert all(m.startswith("./field/") or m in volumes for m in mounts)
        dockerfile = service["build"]["dockerfile"]
        assert (COMPOSE.parent / service["build"]["context"] / dockerfile).exists()


def test_a_client_takes_the_recipe_that_it_was_told() -> None:
    services = composed()
    for name in ("anna", "ben"):
        assert "--accept ${FLEXP_ACCEPT:?" in services[name]["command"]


def test_links_of_the_page_lead_somewhere() -> None:
    page = DEPLOY / "README.md"
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


# ---- wheels for small devices


@pytest.fixture(scope="module")
def arm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arm_wheels", DEPLOY / "arm_wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-py2-none-any.whl", False),
        ("a-1-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_28_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_34_aarch64.whl", False),
        ("a-1-cp311-cp311-musllinux_1_2_aarch64.whl", False),
        ("a-1-cp311-cp311-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp311-cp311-macosx_11_0_arm64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_17_aarch64.whl", False),
        ("a-1-cp39-abi3-manylinux_2_17_aarch64.whl", True),
        ("a-1-cp312-abi3-manylinux_2_17_aarch64.whl", False),
        ("a-1-1build-py3-none-manylinux_2_27_aarch64.whl", True),
    ],
)
def test_a_wheel_is_told_by_its_name(arm: ModuleType, wheel: str, fits: bool) -> None:
    assert arm.fits(wheel) is fits


def test_the_lock_is_read_without_its_hashes(arm: ModuleType) -> None:
    lock = "a-b==1.2 \\\n  --hash=sha256:00\n  # via c\nd==3 ; sys_platform == 'x' \\\n  --hash=y\n"
    assert arm.pinned(lock) == ["a-b==1.2", "d==3 ; sys_platform == 'x'"]
    text = (ROOT / "requirements.lock").read_text("utf-8")
    assert len(arm.pinned(text)) == len(re.findall(r"^[a-z0-9-]+==", text, re.M))


def test_the_committed_answer_is_that_of_the_lock(arm: ModuleType) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "arm-wheels.json").read_text("utf-8"))
    assert not result["missing"]
    lock = arm.pinned((ROOT / "requirements.lock").read_text("utf-8"))
    versions = {line.split(" ")[0] for line in lock}
    for row in result["core"]:
        assert f"{row['package']}=={row['version']}" in versions, "run `make wheels-arm`"
        assert arm.fits(row["wheel"])
