"""Tables and pictures for people."""

from .plots import write_report
from .tables import KEPT_HEADER, STRUCTURE_HEADER, kept_rows, ranking, share, summary, table, what_is_left

__all__ = [
    "KEPT_HEADER",
    "STRUCTURE_HEADER",
    "kept_rows",
    "ranking",
    "share",
    "summary",
    "table",
    "what_is_left",
    "write_report",
]
