"""An index of one's own recordings, searched by sound: `build` makes one, `Index.read` opens it."""

from asit.search.builder import Ask, Built, build, check_free, told
from asit.search.index import Index, Neighbour, Place

__all__ = ["Ask", "Built", "Index", "Neighbour", "Place", "build", "check_free", "told"]
