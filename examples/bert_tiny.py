"""The library without the command line: three clients share BERT-tiny, cut after its first block.

.venv/bin/python examples/bert_tiny.py
"""

from __future__ import annotations

import os

from flexp import assets, recipe_file, run, stage
from flexp.events import Event, Stream, TurnEnded

RECIPE = {
    "name": "bert-tiny",
    "rounds": 3,
    "data": {"path": "vader", "client": "domain", "rows": 60},
    "task": {"max_length": 24},
    "model": {"source": "bert-tiny"},
    "train": {"steps": 4, "lr": 3e-3},
    "plan": {"cut": [1, 0]},
    "strategy": {"name": "flexp", "align": 0.1},
}


def tell(event: Event) -> None:
    """Events are all that a run says of itself."""
    if isinstance(event, TurnEnded):
        sent = event.sent_bytes / 1e6
        print(f"round {event.round} {event.client:7} loss {event.loss:.3f}, sent {sent:.2f} MB")


def main() -> None:
    ready = stage.prepare(recipe_file.make(RECIPE), assets.Cache(assets.default_root(os.environ)))
    stream = Stream()
    stream.subscribe(tell)
    result = run.run(ready, stream)
    ready.engine.close()
    for score in result.scores:
        if score.client == "all" and score.metric == "accuracy":
            print(f"{score.cell}: {score.value:.3f}")


if __name__ == "__main__":
    main()
