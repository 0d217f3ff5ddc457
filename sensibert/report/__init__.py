"""Tables and pictures of sensitivities, plans and results."""

from ..core.text import share, table
from .plots import write_report
from .tables import family_table, ranking, summary

__all__ = ["family_table", "ranking", "share", "summary", "table", "write_report"]
