"""Several methods on the same clients, data, seats and beginnings: one fair table.

>>> from flexp import comparison
>>> comparison.gains([0.5, 0.7], [0.4, 0.7], higher=True, draws=100)["mean"]  # doctest: +ELLIPSIS
0.05...
"""

from flexp.comparison.asked import asked, bytes_of, seeds_of
from flexp.comparison.runs import Plan, compare
from flexp.comparison.table import frame, gains, worst_decile

__all__ = ["Plan", "asked", "bytes_of", "compare", "frame", "gains", "seeds_of", "worst_decile"]
