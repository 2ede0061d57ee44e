"""Results as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from asit.errors import missing_extra

if TYPE_CHECKING:
    from pandas import DataFrame


def data_frame(times: Mapping[str, Tensor], values: Tensor, names: Sequence[str]) -> DataFrame:
    """Return a table with the columns `times`, each (n,), and a column for each of `values` (n, C), called `names`.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise missing_extra("to_frame()", "pandas", "pandas") from None
    table = pandas.DataFrame(values.numpy(), columns=list(names))
    for i, (name, column) in enumerate(times.items()):
        table.insert(i, name, column.numpy(), allow_duplicates=True)  # a class may have any name
    return table
