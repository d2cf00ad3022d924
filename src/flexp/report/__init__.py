"""A run, or a comparison of several, as one HTML page; reads run folders, loads no torch."""

from flexp.report.page import write
from flexp.report.runs import summary
from flexp.report.tables import Formats

__all__ = ["Formats", "summary", "write"]
