"""`flexp align`: the frozen factors of a run's models are made to agree, once, and kept in a file.

The pivot is the smallest model; it stays as it begins. A run whose recipe names the file in
``adapter.aligned`` begins with what is in there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from flexp import assets, parcel
from flexp.data.columns import text_of
from flexp.dice import Dice
from flexp.errors import RecipeError
from flexp.model.aligned import How, aligned
from flexp.model.colora import CoLora
from flexp.own_models import HERE, made_for, smallest
from flexp.parcel import Parcel
from flexp.recipe import Recipe
from flexp.rows import read_rows
from flexp.stage import Say, bodies, survey
from flexp.tensors import Tensors

BATCH = 4


def align(
    recipe: Recipe, cache: assets.Cache, data: str, *, rows: int, how: How, say: Say
) -> dict[str, Any]:
    """Aligns, unless the file has that for this recipe already; what there is to tell.

    ``data`` are public rows, of which only texts are read, a packaged set or a path.
    """
    if recipe.adapter.kind != "colora" or recipe.adapter.aligned is None:
        raise RecipeError(
            "Only frozen factors of Co-LoRA are aligned, into a file. Set adapter.kind to colora, "
            "and adapter.aligned to a path."
        )
    path = Path(recipe.adapter.aligned)
    told = {"data": data, "rows": rows, "steps": how.steps, "rate": how.rate}
    document: dict[str, Any] = {"file": str(path), **told}
    kept = parcel.load(path) if path.exists() else Parcel()
    if kept.facts.get("how") == told and kept.facts.get("for") == made_for(recipe):
        return {**document, "kept": True, **cast("Mapping[str, Any]", kept.facts["found"])}
    bare = recipe.adapter.model_copy(update={"aligned": None})
    found = survey(recipe.model_copy(update={"adapter": bare}), cache, say=say)
    if not found.others or recipe.task.kind == "images":
        raise RecipeError("Alignment is between models of texts. Set clients.NAME.model.")
    held = bodies(found)
    pivot, kind = smallest(held), cast("CoLora", found.kind)
    batches = texts(recipe, cache, data, reader=found.tokenizer, rows=rows, say=say)
    out, about = dict[str, Tensors](), dict[str, Any]()
    for name, body in held.items():
        if body is not pivot:
            dice = Dice(recipe.seed)
            made = aligned(pivot, body, kind, dice, batches=batches, how=how)
            out[HERE + name] = made.factors
            about[body.name] = {"before": made.before, "after": made.after}
    results = {"pivot": pivot.name, "models": about}
    facts = {"for": made_for(recipe), "how": told, "found": results}
    parcel.save(path, Parcel(out, facts=facts))
    return {**document, "kept": False, **results}


def texts(
    recipe: Recipe, cache: assets.Cache, data: str, *, reader: Any, rows: int, say: Say
) -> list[dict[str, Tensor]]:
    """Batches of the first public rows."""
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})
    said = [text_of(row, recipe.data.text) for row in read_rows(asked, cache, say)[:rows]]
    how: dict[str, Any] = {"truncation": True, "max_length": recipe.task.max_length}
    made = (
        reader(said[n : n + BATCH], padding=True, return_tensors="pt", **how)
        for n in range(0, len(said), BATCH)
    )
    return [{k: v[k] for k in ("input_ids", "attention_mask")} for v in made]
