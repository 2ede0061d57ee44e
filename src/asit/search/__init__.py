"""Indexes of recordings, searched by sound: `build` makes one, `Index.read` opens it."""

from asit.search.builder import Built, IndexSettings, build, check_free
from asit.search.index import Index, Neighbour

Ask = IndexSettings  # its name in releases up to 0.1

__all__ = ["Ask", "Built", "Index", "IndexSettings", "Neighbour", "build", "check_free"]
