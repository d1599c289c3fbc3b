"""Arrow lists to padded arrays and tensors. Runs in data, train and predict workers; the tasks call it."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import torch


def pad_lists(column: pa.ChunkedArray | pa.ListArray, value: int) -> npt.NDArray[np.int64]:
    """Return a column of integer lists as one array, padded at the end (right).

    Args:
        column: B lists.
        value: Padding value.

    Returns:
        int64 (B, T), where T is the longest list.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    offsets = array.offsets.to_numpy()
    # Differences of offsets: those of a sliced array do not begin at 0.
    lengths = np.diff(offsets)
    padded = np.full((len(lengths), int(lengths.max(initial=1))), value, np.int64)
    # `flatten` respects the offset of a sliced array; `values` would return the values of its neighbours too.
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = array.flatten().to_numpy(zero_copy_only=False)
    return padded


def text_inputs(samples: pa.Table, pad_token_id: int | None) -> "dict[str, torch.Tensor]":
    """Return tokens as the forward of an encoder takes them.

    Args:
        samples: B rows with `input_ids`, and `token_type_ids` where the model has them; `segments` where samples are
            packed.
        pad_token_id: Padding token; None pads with 0, which the attention mask hides.

    Returns:
        `input_ids`, `attention_mask` (and `token_type_ids`), int64 (B, T). Of packed samples `position_ids` in place of
        the mask, from which `mask_packed_samples` makes one.
    """
    import torch

    ids = torch.from_numpy(pad_lists(samples.column("input_ids"), pad_token_id or 0))
    if "segments" in samples.column_names:
        return {"input_ids": ids, "position_ids": torch.from_numpy(positions(samples))}
    # A copy, because Arrow memory is read-only and torch warns of tensors on it.
    lengths = torch.from_numpy(pc.list_value_length(samples.column("input_ids")).to_numpy().copy())
    # The mask comes from the lengths, never from the ids: where a tokenizer has no padding token, `load_tokenizer` pads
    # with its end token, which may be a real one in the text.
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
    if "token_type_ids" in samples.column_names:
        inputs["token_type_ids"] = torch.from_numpy(pad_lists(samples.column("token_type_ids"), 0))
    return inputs


def positions(samples: pa.Table) -> npt.NDArray[np.int64]:
    """Return the position of each token within its own sample.

    Args:
        samples: B rows with `input_ids`; where samples are packed, `segments` has the lengths of those in each row.

    Returns:
        int64 (B, T). Padding restarts at 0, as if it were one more sample.
    """
    lengths = pc.list_value_length(samples.column("input_ids")).to_pylist()
    segments = samples.column("segments").to_pylist() if "segments" in samples.column_names else [[n] for n in lengths]
    width = max(lengths, default=0)
    # The restart at 0 is all that separates packed samples: `mask_packed_samples` and transformers derive masks from
    # it.
    rows = [
        np.concatenate([np.arange(n) for n in (*parts, width - length)])
        for parts, length in zip(segments, lengths, strict=True)
    ]
    return np.stack(rows).astype(np.int64)


def floats_to_integers(values: pa.Array) -> pa.Array:
    """Return floats as integers if all of them are whole; NaN is null.

    pandas stores an integer column with nulls as floats, with NaN for null.
    """
    if not pa.types.is_floating(values.type):
        return values
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    # None where there is no value at all (pyarrow: `all` of nothing is null): such a piece holds no fraction either.
    # Infinity equals its rounded self, so it is looked for separately; the cast would raise.
    is_whole = pc.all(pc.equal(values, pc.round(values))).as_py()
    return values.cast(pa.int64()) if is_whole is not False and not pc.any(pc.is_inf(values)).as_py() else values


def list_column(rows: list[list[int]]) -> pa.ListArray:
    """Return integer lists as an Arrow column of int32 lists."""
    # Token ids fit in 32 bits: half of the memory, and of the cache on disk, of the 64 that Arrow would infer.
    return pa.array(rows, type=pa.list_(pa.int32()))
