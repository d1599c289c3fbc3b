"""Arrow lists to padded arrays and tensors. Runs in data and train workers; tasks call it."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import torch


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


def text_inputs(samples: pa.Table, pad_token_id: int | None) -> "dict[str, torch.Tensor]":
    """Tokens as an encoder takes them.

    Args:
        samples: B rows with `input_ids`, and `token_type_ids` where the model has them.
        pad_token_id: the filling; None takes 0.

    Returns:
        input_ids, attention_mask (and token_type_ids), int64 (B, T).
    """
    import torch

    ids = torch.from_numpy(pad_lists(samples.column("input_ids"), pad_token_id or 0))
    lengths = torch.from_numpy(pc.list_value_length(samples.column("input_ids")).to_numpy().copy())
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
    if "token_type_ids" in samples.column_names:
        inputs["token_type_ids"] = torch.from_numpy(pad_lists(samples.column("token_type_ids"), 0))
    return inputs


def positions(samples: pa.Table) -> npt.NDArray[np.int64]:
    """Position of each token within its own sample.

    Args:
        samples: B rows with `input_ids`; `segments`, the lengths of the samples a row holds, where they are packed.

    Returns:
        int64 (B, T); the padding behind counts from 0 like one more sample.
    """
    lengths = pc.list_value_length(samples.column("input_ids")).to_pylist()
    segments = samples.column("segments").to_pylist() if "segments" in samples.column_names else [[n] for n in lengths]
    width = max(lengths, default=0)
    rows = [
        np.concatenate([np.arange(n) for n in (*parts, width - length)])
        for parts, length in zip(segments, lengths, strict=True)
    ]
    return np.stack(rows).astype(np.int64)


def whole_numbers(values: pa.Array) -> pa.Array:
    """Return numbers with a point as integers where all of them are whole, as pandas writes integers beside nulls.

    NaN is null, as there.
    """
    if not pa.types.is_floating(values.type):
        return values
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    is_whole = pc.all(pc.equal(values, pc.round(values))).as_py()
    return values.cast(pa.int64()) if is_whole is not False and not pc.any(pc.is_inf(values)).as_py() else values


def list_column(rows: list[list[int]]) -> pa.ListArray:
    """Integer lists as an Arrow column of int32 lists."""
    return pa.array(rows, type=pa.list_(pa.int32()))
