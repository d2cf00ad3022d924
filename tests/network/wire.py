"""A cable between this machine and a network namespace, which can be pulled: a real partition."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from types import TracebackType
from typing import Self

HERE, THERE = "10.77.5.1", "10.77.5.2"


def missing() -> str:
    """Why there can be no namespace here; empty if there can."""
    if shutil.which("ip") is None:
        return "there is no iproute2"
    if not hasattr(os, "geteuid") or os.geteuid():
        return "only root makes network namespaces"
    try:
        with Cable():
            return ""
    except subprocess.CalledProcessError as problem:
        return f"no network namespace can be made: {problem.stderr.strip()}"


class Cable:
    """``HERE`` is this end's address, ``THERE`` that of the end in namespace ``name``."""

    def __init__(self) -> None:
        self.name = f"flexp-{os.getpid()}"
        self.mine, self.theirs = f"fx{os.getpid()}a"[-15:], f"fx{os.getpid()}b"[-15:]

    def __enter__(self) -> Self:
        ip("netns", "add", self.name)
        try:
            ip("link", "add", self.mine, "type", "veth", "peer", "name", self.theirs)
            ip("link", "set", self.theirs, "netns", self.name)
            ip("address", "add", f"{HERE}/24", "dev", self.mine)
            ip("-n", self.name, "address", "add", f"{THERE}/24", "dev", self.theirs)
            for where in ((), ("-n", self.name)):
                ip(*where, "link", "set", self.theirs if where else self.mine, "up")
            ip("-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, what: BaseException | None, at: TracebackType | None
    ) -> None:
        for words in (("link", "del", self.mine), ("netns", "del", self.name)):
            with suppress(subprocess.CalledProcessError):
                ip(*words)

    def pull(self) -> None:
        """Nothing passes; neither end is told, since it is the far end that loses its carrier."""
        ip("-n", self.name, "link", "set", self.theirs, "down")

    def plug(self) -> None:
        """All passes again."""
        ip("-n", self.name, "link", "set", self.theirs, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
