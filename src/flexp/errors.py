"""The exception tree; every message says what was wrong and what to do.

::

    FlexpError
    ├── RecipeError        a recipe, or an override on the command line
    ├── AssetError         a packaged model or data set that is missing or damaged
    ├── DataError          rows, columns, labels, partitions
    ├── ModelError         a backbone that cannot be opened or cut
    │   ├── CutError       a cut outside the model, or one that a method or profile forbids
    │   └── AdapterError   slots, kinds, names and shapes of adapters
    ├── ParcelError        bytes that are not a parcel
    ├── IdentityError      certificates, keys and start-up kits
    ├── PlanError          devices that cannot hold what they are asked to
    ├── EgressError        something tried to leave a client undeclared
    ├── LinkError          the way between near and far
    │   ├── StepError      a message out of order, or a second one under the same key
    │   └── GradientError  a gradient with NaN or infinity, which is not sent
    ├── StrategyError      a method, or one of its options, that does not exist or does not fit
    ├── CheckpointError    a state on disk that cannot be resumed
    ├── AuditError         a log that was changed, or that cannot be written
    └── ExportError        an adapter that cannot be written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlexpError(Exception):
    """Anything that the person in front of the program can act on."""


class Stopped(BaseException):
    """Somebody, or the system, asks this process to end. What counts is on disk at any time."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class RecipeError(FlexpError):
    """A recipe, or an override on the command line, that cannot be run."""


class AssetError(FlexpError):
    """A packaged model or data set that is missing, damaged or refused."""


class DataError(FlexpError):
    """Rows, columns, labels or partitions that cannot be used."""


class ModelError(FlexpError):
    """A backbone that cannot be opened or cut."""


class CutError(ModelError):
    """A cut outside the model, or one that a method or a profile forbids."""


class AdapterError(ModelError):
    """Slots, kinds, names or shapes of adapters that do not fit."""


class ParcelError(FlexpError):
    """Bytes that are not a parcel."""


class IdentityError(FlexpError):
    """A certificate, key or start-up kit that does not show who somebody is."""


class PlanError(FlexpError):
    """Devices that cannot hold what they are asked to."""


class EgressError(FlexpError):
    """Something tried to leave a client without being declared."""


class LinkError(FlexpError):
    """The way between near and far is closed or was misused."""


class StepError(LinkError):
    """A message out of order, or a second and different one under the same key."""


class GradientError(LinkError):
    """A gradient with NaN or infinity, which is not sent."""


class StrategyError(FlexpError):
    """A method, or one of its options, that does not exist or does not fit."""


class CheckpointError(FlexpError):
    """A state on disk that cannot be resumed."""


class AuditError(FlexpError):
    """A log that is not as it was written, or that cannot be written."""


class ExportError(FlexpError):
    """An adapter that cannot be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names what was probably meant, or all that is known.

    >>> nearest("rouns", ["rounds", "seed"])
    'Did you mean "rounds"?'
    >>> nearest("zzz", ["rounds", "seed"])
    'Known: rounds, seed.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f'Did you mean "{close[0]}"?' if close else f"Known: {', '.join(names)}."
