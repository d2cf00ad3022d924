"""Fed-Influence on LoRA adapters: eight clients, one with shuffled training labels.

.venv/bin/python benchmarks/influence.py                        # two minutes for each mode

Every mode's estimates beside what training without each client says. Recipe:
recipes/methods/fed_influence.yaml; test rows have their own labels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flexp import assets, recipe_file
from flexp import run as running
from flexp.data.examples import Examples, Shard
from flexp.dice import Dice
from flexp.events import Stream
from flexp.influence import Seen, pearson
from flexp.stage import Survey, opened, survey, with_method

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "methods" / "fed_influence.yaml"


def noisy(found: Survey, client: str) -> Survey:
    """The same run, in which a client's training labels are in a random order."""
    federation = found.federation
    shard: Shard = federation.shards[client]
    rows = shard.train
    labels: Any = [rows.labels[n] for n in Dice(0)("shuffled").shuffle(len(rows))]
    mixed = replace(shard, train=Examples(rows.ids, tuple(labels), rows.origins))
    return replace(
        found, federation=replace(federation, shards={**federation.shards, client: mixed})
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--modes", default="none,diag,hvp1,hvp")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cache = assets.Cache(assets.default_root(os.environ))
    plain = recipe_file.read(RECIPE, asked.overrides)
    found = survey(plain, cache)
    clients = sorted(found.federation.shards)
    found = noisy(found, clients[0])
    begun, truth, out = opened(found), dict[str, Any](), dict[str, Any]()
    for mode in asked.modes.split(","):
        names = json.dumps(clients)
        pairs = [*asked.overrides, f"strategy.mode={mode}", f"strategy.watch={names}"]
        stage = with_method(begun, recipe_file.read(RECIPE, pairs))
        state = running.run(stage, Stream()).state
        seen = Seen(stage, stage.strategy, state)  # pyright: ignore[reportArgumentType]
        rows = [seen.row(client) for client in clients]
        for row in rows:
            truth[row["client"]] = truth.get(row["client"]) or seen.check(row["client"])
            row.update(truth[row["client"]])
        pairs = (("norm", "real_norm"), ("change", "real_change"), ("slope", "real_change"))
        told = {one: pearson(rows, one, other) for one, other in pairs}
        out[mode] = {"noisy": clients[0], "metrics": dict(seen.here), "pearson": told, "rows": rows}
        sys.stdout.write(json.dumps({mode: out[mode]}, indent=1) + "\n")
        sys.stdout.flush()
    (HERE / "results" / "influence.json").write_text(json.dumps(out, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
