"""All that is fuzzed: each a function of bytes that raises if a promise is broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fuzz import mutate, of_numbers, of_states, of_tensors, of_texts
from fuzz.mutate import Mutator


@dataclass(frozen=True)
class Target:
    """One target: what it promises, its samples, how they are changed, and what runs on them.

    ``run`` raises AssertionError for a broken promise, and lets an untyped error through.
    """

    promise: str
    seeds: Callable[[], list[bytes]]
    mutator: Mutator
    run: Callable[[bytes], None]


_JSON = mutate.in_json
_FILES = mutate.by_first(
    (
        *(mutate.in_safetensors, mutate.in_safetensors, mutate.in_safetensors, _JSON, _JSON, _JSON),
        *(_JSON, _JSON, _JSON, mutate.in_safetensors, mutate.in_safetensors, mutate.in_safetensors),
    )
)
_ROWS = mutate.by_first((mutate.in_json_lines, *[mutate.in_bytes] * 4))
_PEMS = mutate.by_first((*[mutate.in_pem] * 4, mutate.in_kit, _JSON, mutate.in_pem, mutate.in_pem))

TARGETS: Mapping[str, Target] = {
    "frame": Target(
        "a frame is refused with a LinkError, or has one spelling",
        of_tensors.frames,
        mutate.in_frame,
        of_tensors.run_frame,
    ),
    "header": Target(
        "a header is taken exactly when a slow reader takes it",
        of_tensors.tensors,
        mutate.in_safetensors,
        of_tensors.run_header,
    ),
    "loaders": Target(
        "files of tensors and what lies beside them raise typed errors only",
        of_tensors.files_of_all_kinds,
        _FILES,
        of_tensors.run_loaders,
    ),
    "steps": Target(
        "a step is carried out once, whatever is repeated, lost or killed",
        of_states.scripts,
        mutate.in_bytes,
        of_states.run_steps,
    ),
    "recipes": Target(
        "a recipe is refused with a RecipeError, or is the same when read again",
        of_texts.recipes,
        mutate.in_bytes,
        of_texts.run_config,
    ),
    "rows": Target(
        "rows are refused with a DataError, or are flat and have places of their own",
        of_texts.rows,
        _ROWS,
        of_texts.run_rows,
    ),
    "planner": Target(
        "a plan covers each block once within its limits, or there is none",
        of_numbers.cases,
        mutate.in_bytes,
        of_numbers.run_planner,
    ),
    "aggregation": Target(
        "means are finite, between their items, and do not depend on the order",
        of_numbers.cases,
        mutate.in_bytes,
        of_numbers.run_aggregation,
    ),
    "audit": Target(
        "any change of an audit log is found",
        of_texts.logs,
        mutate.in_json_lines,
        of_texts.run_audit,
    ),
    "identity": Target(
        "certificates, requests and kits raise an IdentityError only",
        of_texts.identities,
        _PEMS,
        of_texts.run_identity,
    ),
    "resume": Target(
        "both sides go on from a turn that both have, or say which is missing",
        of_states.scripts,
        mutate.in_bytes,
        of_states.run_resume,
    ),
}
