"""Columns of lists in Parquet: of each image as many values as it has."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def lists(rows: NDArray[np.integer], images: int, values: NDArray[Any]) -> Any:
    """A column of ``images`` lists: ``values`` (``m``) of the images ``rows`` (``m``, in ascending order)."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=images))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


def flat(table: Any, column: str, like: type[np.generic]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Rows and values (each ``m``, the values as ``like``) of a column that ``lists`` made.

    Raises ``ValueError`` if the table has no such column or it holds something else.
    """
    import pyarrow as pa

    if column not in table.column_names:
        raise ValueError(f"lacks the column {column}")
    found = table[column].combine_chunks()
    if not pa.types.is_list(found.type) or found.null_count or found.flatten().null_count:
        raise ValueError(f"the column {column} does not hold a list for each image")
    values = found.flatten().to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"the column {column} does not hold numbers")
    sizes = found.value_lengths().to_numpy()
    return np.repeat(np.arange(len(found)), sizes), values.astype(like)


def same_rows(name: str, rows: NDArray[np.int64], others: NDArray[np.int64]) -> None:
    """Raise ``ValueError`` unless the column ``name`` has as many values of each image as the one beside it."""
    if not np.array_equal(rows, others):
        raise ValueError(f"the column {name} has not as many values for each image as those beside it")
