"""Arrow lists to padded arrays. Runs in train workers; tasks call it from `collate`."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def pad_lists(column: pa.ChunkedArray | pa.ListArray, value: int) -> npt.NDArray[np.int64]:
    """A column of integer lists as one array, short rows filled up at the end.

    Args:
        column: B lists.
        value: the filling.

    Returns:
        int64 (B, T), T the longest list.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    offsets = array.offsets.to_numpy()
    lengths = np.diff(offsets)
    padded = np.full((len(lengths), int(lengths.max(initial=1))), value, np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = array.flatten().to_numpy(zero_copy_only=False)
    return padded


def list_column(rows: list[list[int]]) -> pa.ListArray:
    """Integer lists as an Arrow column of int32 lists."""
    return pa.array(rows, type=pa.list_(pa.int32()))
