"""CSV and TSV as record batches whose cells keep what the file says. Runs on the client and the head.

A CSV has no types. What a task reads as text stays the text of the file: `0123`, `1e5`, `NA` and `2024-01-02` are no
numbers and no dates there. Any other column is a number only where every cell is one and, for integers, writing it out
again gives the file's own characters. Read `convert.py` next.
"""

from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from launcher.data.files import INTEGER
from launcher.data.opened import BLOCK_BYTES, ROW_GROUP, open_data_file
from launcher.errors import DataError
from launcher.rundir.uri import split_options
from launcher.tasks.base import ColumnKind

_WHOLE = r"^(?:0|-?[1-9][0-9]{0,14})(?:\.0)?$"
_NUMBER = r"^[+-]?(?:0|[1-9][0-9]{0,17})?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?$|^[+-]?(?:nan|inf(?:inity)?)$"
CSV_NULLS = pa.array(pa.csv.ConvertOptions().null_values)
"""What pyarrow, and pandas alike, takes for a missing number."""
_SEPARATORS = {",": "commas", ";": "';'", "\t": "tabs", "|": "'|'"}


def read_csv(path: str, whole: bool, kinds: Mapping[str, ColumnKind]) -> Iterator[pa.RecordBatch]:
    """Read a CSV, or a TSV by its name.

    Args:
        path: Of the file.
        whole: Whether types are those of all cells, which takes the file's size in memory; else of the first block.
        kinds: What the columns that a task reads hold.

    Raises:
        ArrowInvalid: The file is no CSV, or its types change behind the first block.
    """
    delimiter = "\t" if is_tsv(path) else ","
    # Quoted texts may hold line breaks.
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # One thread knows the number of the row that it cannot read.
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=not whole)
    open_it = pa.csv.read_csv if whole else pa.csv.open_csv
    # `true` stays the text it is, as a class name or a word.
    convert = pa.csv.ConvertOptions(true_values=[], false_values=[])
    with open_data_file(path) as stream:
        inferred = open_it(stream, read, parse, convert).schema
    _check_separator(path, inferred.names, delimiter)
    as_text = [field.name for field in inferred if _is_text_first(field, kinds.get(field.name))]
    convert.column_types = dict.fromkeys(as_text, pa.string())
    with open_data_file(path) as stream:
        found = open_it(stream, read, parse, convert)
        for field in found.schema:
            if pa.types.is_binary(field.type):  # what pyarrow makes of text that is not UTF-8
                raise pa.ArrowInvalid(f"column {field.name!r} is not UTF-8")
        batches = _typed(iter([found]) if whole else found, {name: kinds.get(name) for name in as_text})
        first = next(batches, None)
        if first is None:  # names without rows say nothing of types, and fit those of any other file
            first = pa.RecordBatch.from_arrays([pa.nulls(0)] * len(inferred), inferred.names)
        yield first
        yield from batches


def is_tsv(path: str) -> bool:
    """Return whether a file's name says that tabs separate its columns."""
    return ".tsv" in split_options(path)[0].rsplit("/", 1)[-1].lower()[-8:]


def header_hint(path: str) -> str:
    """Return what separates the columns of a file where its name says otherwise; "" where nothing does."""
    with open_data_file(path) as stream:
        line = bytes(stream.read(1 << 16)).split(b"\n", 1)[0].decode("utf-8", "replace")
    right = "\t" if is_tsv(path) else ","
    other = max(_SEPARATORS, key=line.count)
    return "" if right in line or not line.count(other) else _other_separator(other, right)


def _check_separator(path: str, names: list[str], delimiter: str) -> None:
    if len(names) == 1 and (other := next((c for c in _SEPARATORS if c != delimiter and c in names[0]), None)):
        raise DataError(f"{path}: {_other_separator(other, delimiter)}")


def _other_separator(found: str, wanted: str) -> str:
    remedy = {"\t": "name it .tsv", ",": "name it .csv"}.get(found, "write them with commas")
    return f"its columns are separated by {_SEPARATORS[found]}, not by {_SEPARATORS[wanted]}; {remedy}"


def _is_text_first(field: pa.Field, kind: ColumnKind | None) -> bool:
    """Return whether a column is read as text at first: what looks like a number may have been more than that."""
    if kind == "number":
        return False
    return kind is not None or pa.types.is_integer(field.type) or pa.types.is_floating(field.type)


def read_texts(table: pa.Table, kinds: Mapping[str, ColumnKind]) -> Iterator[pa.RecordBatch]:
    """Yield a table whose cells are the texts of a CSV with the types that `read_csv` gives them.

    Args:
        table: Columns of other types than text stay as they are.
        kinds: What the columns that a task reads hold.
    """
    texts = {field.name: kinds.get(field.name) for field in table.schema if pa.types.is_string(field.type)}
    types = [_first_type(table, index, texts) for index in range(table.num_columns)]
    for batch in table.to_batches(ROW_GROUP):
        yield from _retyped(batch, types, texts)


def _typed(
    tables: "Iterator[pa.Table | pa.RecordBatch]", kinds: Mapping[str, ColumnKind | None]
) -> Iterator[pa.RecordBatch]:
    """Give the columns that were read as text their types, those of the first table."""
    types: list[pa.DataType] | None = None
    for part in tables:
        types = types or [_first_type(part, index, kinds) for index in range(part.num_columns)]
        yield from _retyped(part, types, kinds)


# Columns go by their places, as two may have one name; which of them is wanted is asked later.
def _first_type(part: "pa.Table | pa.RecordBatch", index: int, kinds: Mapping[str, ColumnKind | None]) -> pa.DataType:
    field = part.schema.field(index)
    return _type_of(part.column(index), kinds[field.name]) if field.name in kinds else field.type


def _retyped(
    part: "pa.Table | pa.RecordBatch", types: list[pa.DataType], kinds: Mapping[str, ColumnKind | None]
) -> Iterator[pa.RecordBatch]:
    columns = [
        _cast(cells, kind, kinds[field.name]) if field.name in kinds else cells
        for field, cells, kind in zip(part.schema, part.columns, types, strict=True)
    ]
    schema = pa.schema([field.with_type(kind) for field, kind in zip(part.schema, types, strict=True)])
    yield from pa.Table.from_arrays(columns, schema=schema).combine_chunks().to_batches(ROW_GROUP)


def _type_of(cells: "pa.Array | pa.ChunkedArray", kind: ColumnKind | None) -> pa.DataType:
    """Return the type that loses nothing of some cells."""
    if kind == "text":
        return pa.string()
    known = cells.filter(pc.invert(pc.is_in(cells, CSV_NULLS)))
    if _all_match(known, INTEGER):
        return pa.int64()
    if not _all_match(known, _NUMBER):
        return pa.string()
    # `3.10` may be a class; of numbers that are nearly all different none is, and float classes are refused later.
    is_class = kind == "class" and not _all_match(known, _WHOLE) and 2 * pc.count_distinct(known).as_py() <= len(known)
    return pa.string() if is_class else pa.float64()


def _all_match(cells: "pa.Array | pa.ChunkedArray", pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(cells, pattern, ignore_case=True), min_count=0).as_py())


def _cast(
    cells: "pa.Array | pa.ChunkedArray", kind: pa.DataType, read_as: ColumnKind | None
) -> "pa.Array | pa.ChunkedArray":
    """Return cells in a type that was settled on.

    Raises:
        ArrowInvalid: One of them does not fit it.
    """
    if pa.types.is_string(kind):
        # An empty cell is no name of a class.
        return pc.if_else(pc.equal(cells, ""), None, cells) if read_as == "class" else cells
    known = pc.if_else(pc.is_in(cells, CSV_NULLS), None, cells)
    if not _all_match(known, INTEGER if pa.types.is_integer(kind) else _NUMBER):
        raise pa.ArrowInvalid("types change behind the first block")
    return known.cast(kind)
