"""64-bit hashes of the contents of rows, independent of the Arrow type. Pure and vectorised; client and head.

Equal values have equal hashes in any layout: text or bytes, small or large offsets, dictionaries, 1 and 1.0, a picture
as bytes or as {bytes, path}. Between 10^8 training rows and 10^6 other rows, two different rows share a hash with a
probability of 5e-6, so equal hashes count as equal rows. The hash is not cryptographic. Read
`data/leakage/duplicates.py` next.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Hashes = npt.NDArray[np.uint64]

# Odd 64-bit multipliers of MurmurHash3 and SplitMix64.
_MUL, _MUL2, _GOLDEN = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(0x9E3779B97F4A7C15)
_LANES = 4
_BLOCK = 8 * _LANES
_SEEDS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64)
# Row k is a mask of the first k bytes of a block.
_MASK_BYTES = (np.arange(_BLOCK) < np.arange(_BLOCK + 1)[:, None]).astype(np.uint8) * np.uint8(255)
_MASKS: Hashes = _MASK_BYTES.view("<u8")
# Rows of this many bytes are hashed one by one: a call from Python costs a microsecond, little against their hashing,
# and so few rows have so many blocks that vectors of them would be short.
_LONG_BYTES = 4096
# Temporary arrays for this many bytes stay in a core's cache (measured: 1 MiB is as fast, 128 KiB and 8 MiB slower).
_BYTES_AT_ONCE = 512 << 10
_NULL, _BOOL, _FLOAT, _UNSIGNED = (np.uint64(0x5851F42D4C957F2D * k & (2**64 - 1)) for k in (1, 2, 3, 4))


def hash_rows(columns: list[pa.Array]) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """Hash the rows of some columns.

    Args:
        columns: Columns of n rows each, at least one.

    Returns:
        Hashes, uint64 (n,), and for each row whether any of its values is not null, bool (n,).
    """
    total: Hashes = np.full(len(columns[0]), _GOLDEN, np.uint64)
    has_value = np.zeros(len(columns[0]), np.bool_)
    for column in map(_plain, columns):
        total = _mix(total * _MUL2 ^ hash_array(column))
        has_value |= _valid(column)
    return total, has_value


def hash_array(array: pa.Array) -> Hashes:
    """Return the hash of each value, uint64 (n,); all nulls have the same."""
    plain = _plain(array)
    return np.where(_valid(plain), _hash_values(plain), _NULL)


def _valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    if not array.null_count:
        return np.ones(len(array), np.bool_)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), np.bool_)


def _plain(array: pa.Array) -> pa.Array:
    """Remove layouts without a meaning of their own: dictionaries, run ends, maps, extension types."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _plain(array.storage)
    if pa.types.is_dictionary(kind):
        return _plain(array.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return _plain(pc.run_end_decode(array))
    if pa.types.is_map(kind):
        pair = pa.struct([pa.field("key", kind.key_type, False), pa.field("value", kind.item_type)])
        return array.cast(pa.list_(pair))
    return array


def _hash_values(array: pa.Array) -> Hashes:
    """Hash the values, uint64 (n,); the result for a null is arbitrary."""
    kind = array.type
    for predicates, hash_function in _HASH_FUNCTIONS:
        if any(fits(kind) for fits in predicates):
            return hash_function(array)
    return _hash_reprs(array)


def _hash_bytes(array: pa.Array) -> Hashes:
    has_small_offsets = pa.types.is_string(array.type) or pa.types.is_binary(array.type)
    array = array if has_small_offsets else array.cast(pa.large_binary())
    _, offsets_buffer, data_buffer = array.buffers()
    ends = np.frombuffer(offsets_buffer, np.int32 if has_small_offsets else np.int64)
    offsets: npt.NDArray[np.int64] = ends[array.offset : array.offset + len(array) + 1].astype(np.int64)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    hashes = np.empty(len(array), np.uint64)
    long_rows = np.flatnonzero(np.diff(offsets) >= _LONG_BYTES)
    begin = 0
    while begin < len(array):
        stop = int(np.searchsorted(offsets, offsets[begin] + _BYTES_AT_ONCE, side="right")) - 1
        stop = min(max(stop, begin + 1), len(array))
        hashes[begin:stop] = _hash_blocks(data, offsets[begin : stop + 1])
        begin = stop
    for i in long_rows:
        hashes[i] = _digest(data[offsets[i] : offsets[i + 1]])
    return hashes


def _hash_blocks(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> Hashes:
    """Hash short byte strings: block j of all rows that have one, then block j + 1; long rows are hashed by `_digest`.

    Args:
        data: Bytes of all rows.
        offsets: Begin and end of each row in them, int64 (n + 1,).
    """
    length = np.diff(offsets)
    length = np.where(length < _LONG_BYTES, length, 0)
    blocks = -(-length // _BLOCK)
    # Longest first: the rows that have another block are then always the first ones. NumPy sorts int16 by radix.
    order = np.argsort(-blocks.astype(np.int16), kind="stable")
    start = offsets[:-1][order] - offsets[0]
    length = length[order]
    blocks = blocks[order]
    padded = np.zeros(offsets[-1] - offsets[0] + _BLOCK, np.uint8)
    padded[:-_BLOCK] = data[offsets[0] : offsets[-1]]
    # A block may begin at any byte. Gathering whole blocks costs a quarter of gathering words.
    window: npt.NDArray[np.void] = np.ndarray((len(padded) - _BLOCK + 1,), f"V{_BLOCK}", padded, 0, (1,))
    lanes = np.empty((len(start), _LANES), np.uint64)
    lanes[:] = _SEEDS
    lanes ^= length.astype(np.uint64)[:, None]
    most = int(blocks[0]) if len(blocks) else 0
    rows_with_more = np.searchsorted(-blocks, -np.arange(most + 1), side="left")  # entry j: more than j blocks
    for j in range(most):
        rows = rows_with_more[j]
        full = rows_with_more[j + 1]  # the rows behind these end inside this block
        words = window[start[:rows] + _BLOCK * j].view("<u8").reshape(rows, _LANES)
        words[full:] &= _MASKS[length[full:rows] - _BLOCK * j]
        state = lanes[:rows]
        state ^= words
        state *= _MUL
        state ^= state >> np.uint64(32)
    joined = lanes[:, 0].copy()
    for lane in range(1, _LANES):
        joined *= _MUL2
        joined ^= joined >> np.uint64(29)
        joined ^= lanes[:, lane]
    hashes = np.empty(len(start), np.uint64)
    hashes[order] = _mix(joined)
    return hashes


def _digest(content: npt.NDArray[np.uint8]) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(content.data, digest_size=8).digest(), "little"))


def _hash_integers(array: pa.Array) -> Hashes:
    if pa.types.is_uint64(array.type):
        values = np.asarray(array.fill_null(0).to_numpy(zero_copy_only=False), np.uint64)
        return np.where(values >> np.uint64(63), _mix(values ^ _UNSIGNED), _mix(values))
    values = np.asarray(array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    return _mix(values.view(np.uint64))


def _hash_floats(array: pa.Array) -> Hashes:
    numbers = np.asarray(array.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False), np.float64)
    # 1.0 hashes as 1, and -0.0 as 0: another file may hold the same column as integers.
    is_whole = (np.abs(numbers) < 2.0**63) & (np.floor(numbers) == numbers)
    as_whole = np.where(is_whole, numbers, 0.0).astype(np.int64).view(np.uint64)
    bits = np.where(np.isnan(numbers), np.nan, numbers).view(np.uint64)
    return np.where(is_whole, _mix(as_whole), _mix(bits ^ _FLOAT))


def _hash_booleans(array: pa.Array) -> Hashes:
    values = np.asarray(array.fill_null(False).to_numpy(zero_copy_only=False), np.bool_)
    return _mix(values.astype(np.uint64) ^ _BOOL)


def _hash_lists(array: pa.Array) -> Hashes:
    lengths = np.asarray(pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    inner = hash_array(array.flatten())  # drops the values under null lists
    # The position of a value in its list is part of its term of the sum; overflow wraps around and does no harm.
    position = np.arange(len(inner), dtype=np.int64) - np.repeat(starts, lengths)
    sums = np.zeros(len(inner) + 1, np.uint64)
    np.cumsum(_mix(inner ^ _mix(position.view(np.uint64) * _GOLDEN)), out=sums[1:])
    return _mix((sums[ends] - sums[starts]) ^ _mix(lengths.view(np.uint64) + _GOLDEN))


def _hash_structs(array: pa.Array) -> Hashes:
    names = [field.name for field in array.type]
    if "bytes" in names and set(names) <= {"bytes", "path"}:
        return _hash_media(array, names)
    if not names:
        return np.full(len(array), _GOLDEN, np.uint64)
    # In the order of names: another file may hold the fields in another order.
    hashes, _ = hash_rows([array.field(name) for name in sorted(names)])
    return hashes


def _hash_media(array: pa.Array, names: list[str]) -> Hashes:
    """Hash pictures or sounds as `datasets` stores them: by content, or by path where there is no content."""
    content = array.field("bytes").cast(pa.large_binary())  # of type null, where all are paths
    hashes = hash_array(content)
    if "path" not in names:
        return hashes
    has_content = _valid(content) & (pc.binary_length(content).fill_null(0).to_numpy(zero_copy_only=False) > 0)
    return np.where(has_content, hashes, hash_array(array.field("path")))


def _hash_reprs(array: pa.Array) -> Hashes:
    """Hash dates, times, decimals and all other types by their `repr` in Python; the only slow function."""
    return _hash_bytes(pa.array([repr(value) for value in array.to_pylist()], pa.large_string()))


def _mix(values: Hashes) -> Hashes:
    """Mix so that every bit of a value changes every bit of the result (the finaliser of MurmurHash3)."""
    mixed = values ^ (values >> np.uint64(33))
    mixed *= _MUL
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MUL2
    mixed ^= mixed >> np.uint64(32)
    return mixed


_is = pa.types
_HASH_FUNCTIONS: tuple[tuple[tuple[Callable[[pa.DataType], bool], ...], Callable[[pa.Array], Hashes]], ...] = (
    ((_is.is_string, _is.is_large_string, _is.is_string_view), _hash_bytes),
    ((_is.is_binary, _is.is_large_binary, _is.is_binary_view, _is.is_fixed_size_binary), _hash_bytes),
    ((_is.is_integer,), _hash_integers),
    ((_is.is_floating,), _hash_floats),
    ((_is.is_boolean,), _hash_booleans),
    ((_is.is_list, _is.is_large_list, _is.is_fixed_size_list), _hash_lists),
    ((_is.is_list_view, _is.is_large_list_view), _hash_lists),
    ((_is.is_struct,), _hash_structs),
)
