"""A model for the devices it will run on: graphs for other runtimes, in 8 bits if wanted."""

from .bench import measure
from .export import RUNTIMES, export_graph

__all__ = ["RUNTIMES", "export_graph", "measure"]
