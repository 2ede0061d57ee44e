"""Indexes of recordings, searched by sound: `build` makes one, `Index.read` opens it."""

from asit.search.builder import Ask, Built, build, check_free, told
from asit.search.index import Index, Neighbour

__all__ = ["Ask", "Built", "Index", "Neighbour", "build", "check_free", "told"]
