"""FlexP-SFT: the second version of FlexP-SFL (Geng, Yuan et al. 2026, arXiv 2508.10349 v2).

Its abstract says: aggregation-free, so no client weight is ever uploaded, and a layer-flexible
alignment. Our reading: form A, a proximal pull of the products of all near blocks and of the head,
lambda 0.1, towards what the server has learned for other clients, else towards the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat

from flexp.selection import NEAR, Where
from flexp.strategies.flexp import FlexP


@dataclass(frozen=True)
class FlexPSft(FlexP):
    """FlexP-SFL read after its second version: nothing goes up, a proximal pull on each layer.

    The options are those of flexp; only where they begin differs.
    """

    form: Literal["prox", "mix", "freeze"] = "prox"
    align: NonNegativeFloat = 0.1
    head: Literal["free", "aligned", "fixed"] = "aligned"

    name: ClassVar[str] = "flexp_sft"
    own: ClassVar[Where] = NEAR
    paper: ClassVar[str] = "Geng, Yuan et al. 2026, arXiv 2508.10349 v2"
