"""Starts processes of the program quickly: everything is imported once, then each is a fork.

Run as ``python nursery.py``; reads one JSON request per line and answers with one. A child is the
program itself, in a session of its own, with its own log; no gRPC object exists before the fork.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def program() -> None:
    """A command, as the shell runs it."""
    from flexp.cli import main

    main()


def end_with_parent() -> None:
    """Has the kernel kill this process when the nursery is gone, however that came about."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def child(request: dict[str, Any], main: Callable[[], None]) -> int:
    """``main`` with these arguments; its exit code."""
    os.setsid()
    end_with_parent()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    os.environ.update(request["env"])
    if request.get("address_space"):
        import resource

        limit = request["address_space"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if request.get("crash"):
        from network.crash import Point, arm

        arm(Point(**request["crash"]))
    if request.get("netns"):
        enter(request["netns"])
    faulthandler.register(signal.SIGUSR1)  # says in the log where each thread is
    sys.argv = ["flexp", *request["argv"]]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def enter(namespace: str) -> None:
    """From now on this process has the network of that namespace and no other."""
    libc, new_network = ctypes.CDLL(None, use_errno=True), 0x40000000  # CLONE_NEWNET
    with Path("/run/netns", namespace).open("rb") as file:
        if libc.setns(file.fileno(), new_network):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def serve(main: Callable[[], None] = program) -> None:
    """Answers requests until its standard input ends; then nothing that it started is left."""
    for name in ("cli", "live", "terminal", "joining.talk", "serving.serve"):
        importlib.import_module(f"flexp.{name}")
    importlib.import_module("torch._dynamo")  # by the first model without memory; it takes seconds

    ended: dict[int, int] = {}
    alive: set[int] = set()

    def reap(options: int, pid: int = -1) -> None:
        while alive:
            found, status = os.waitpid(pid, options)
            if not found:
                return
            alive.discard(found)
            ended[found] = os.waitstatus_to_exitcode(status)
            if pid != -1:
                return

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"number": request["number"]}
        if "argv" in request:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = child(request, main)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            alive.add(pid)
            ended.pop(pid, None)  # of a process that had this number before
            answer["pid"] = pid
        else:
            reap(os.WNOHANG)
            answer["code"] = ended.get(request["pid"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in list(alive):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    reap(0)


def warm() -> None:
    """Imports what the program would only import later, so that no child has to."""
    from flexp import libraries

    libraries.peft()
    for name in ("AutoConfig", "AutoTokenizer", "DynamicCache", "LogitsProcessorList", "Conv1D"):
        getattr(libraries.transformers(), name)
    from flexp.model.skeleton import auto

    for task in ("classification", "causal-lm", "images"):
        auto(task)


if __name__ == "__main__":
    here = Path(__file__).resolve()
    sys.path[:0] = [str(here.parents[1]), str(here.parents[2] / "src")]
    warm()
    serve()
