"""Processes of their own, for what only a fresh process can be asked; each answers in JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexp.errors import FlexpError

if TYPE_CHECKING:
    from flexp.bench.job import Scale


def launched(what: str, scale: Scale, **more: Any) -> dict[str, Any]:
    """Starts ``python -m flexp.bench.child`` and gives its answer, with its seconds on the wall."""
    asked = {"what": what, "job": asdict(scale.job), "tenants": scale.tenants, **more}
    return started("flexp.bench.child", asked)


def started(module: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Runs a module with what is asked as its one argument; FlexpError if it fails."""
    began = time.monotonic()
    command = [sys.executable, "-m", module, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FlexpError(f"{module} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**answer, "wall": time.monotonic() - began}


def answered(asked: dict[str, Any]) -> dict[str, Any]:
    """What a process of this module is asked for."""
    from flexp.bench.job import Job

    job = Job(**asked["job"])
    if asked["what"] == "memory":
        from flexp.bench.memory import filled

        return filled(job, asked["tenants"])
    return first_step(job, Path(asked["folder"]))


def first_step(job: Any, folder: Path) -> dict[str, Any]:
    """Opens a model and takes one training step: its loss, and the processor seconds until then."""
    import torch

    from flexp.bench.job import at_work, step
    from flexp.model.backbone import Backbone

    torch.set_num_threads(1)
    body = Backbone.open(folder, task="causal-lm", fast=True)
    with at_work(job, body) as place:
        loss = step(place.desk, job.batch())
        return {"loss": loss, "cpu": time.process_time()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answered(json.loads(sys.argv[1]))) + "\n")
