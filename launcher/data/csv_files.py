"""CSV and TSV as record batches whose values stay what the file says. Runs on the client and the head.

A CSV has no types. What a task reads as text stays the text of the file: `0123`, `1e5`, `NA` and `2024-01-02` are no
numbers and no dates there. Any other column is numeric only if every value is a number and, for integers, writing it
out again gives the characters of the file. So numeric columns are read as text first and cast afterwards. Read
`convert.py` next.
"""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from launcher.data.files import BLOCK_BYTES, INTEGER, ROW_GROUP, open_data_file
from launcher.errors import DataError
from launcher.rundir.uri import split_options
from launcher.tasks.params import ColumnKind

_WHOLE = r"^(?:0|-?[1-9][0-9]{0,14})(?:\.0)?$"
_DIGITS = r"(?:(?:0|[1-9][0-9]{0,17})(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = rf"^[+-]?{_DIGITS}(?:[eE][+-]?[0-9]+)?$|^[+-]?(?:nan|inf(?:inity)?)$"
CSV_NULLS = pa.array(pa.csv.ConvertOptions().null_values)
"""Texts that pyarrow and pandas take for a missing number."""
_SEPARATORS = {",": "commas", ";": "';'", "\t": "tabs", "|": "'|'"}
_Column: TypeAlias = pa.Array | pa.ChunkedArray
_Rows: TypeAlias = pa.Table | pa.RecordBatch


def read_csv(path: str, from_all_rows: bool, kinds: Mapping[str, ColumnKind]) -> Iterator[pa.RecordBatch]:
    """Read a CSV, or a TSV by its name.

    Args:
        path: Path or URI of the file.
        from_all_rows: True to infer types from all rows, with the file in memory, and not from the first block.
        kinds: Kinds of the columns that the task reads.

    Raises:
        ArrowInvalid: The file is no CSV, or its types change after the first block.
    """
    delimiter = "\t" if is_tsv(path) else ","
    # Quoted texts may hold line breaks.
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # With one thread pyarrow's message has the number of the row that it cannot parse.
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=not from_all_rows)
    open_reader = pa.csv.read_csv if from_all_rows else pa.csv.open_csv
    # `true` stays a text: it may be a class name or a word.
    convert = pa.csv.ConvertOptions(true_values=[], false_values=[])
    with open_data_file(path) as stream:
        # The file is opened twice: types have to be given before reading, and which columns need text shows only after
        # inference.
        inferred = open_reader(stream, read, parse, convert).schema
    _check_separator(path, inferred.names, delimiter)
    as_text = [field.name for field in inferred if _is_read_as_text(field, kinds.get(field.name))]
    convert.column_types = dict.fromkeys(as_text, pa.string())
    with open_data_file(path) as stream:
        reader = open_reader(stream, read, parse, convert)
        for field in reader.schema:
            # pyarrow's type for text that is not UTF-8.
            if pa.types.is_binary(field.type):
                raise pa.ArrowInvalid(f"column {field.name!r} is not UTF-8")
        batches = _cast_tables(iter([reader]) if from_all_rows else reader, {name: kinds.get(name) for name in as_text})
        first = next(batches, None)
        if first is None:  # a header without rows tells no types; nulls fit those of any other file
            first = pa.RecordBatch.from_arrays([pa.nulls(0)] * len(inferred), inferred.names)
        yield first
        yield from batches


def is_tsv(path: str) -> bool:
    """Return whether a file's name says that tabs separate its columns."""
    return ".tsv" in split_options(path)[0].rsplit("/", 1)[-1].lower()[-8:]


def header_hint(path: str) -> str:
    """Return a hint if another character than the name says separates the columns of a file; "" otherwise."""
    with open_data_file(path) as stream:
        line = bytes(stream.read(1 << 16)).split(b"\n", 1)[0].decode("utf-8", "replace")
    expected = "\t" if is_tsv(path) else ","
    other = max(_SEPARATORS, key=line.count)
    return "" if expected in line or not line.count(other) else _separator_hint(other, expected)


def _check_separator(path: str, names: list[str], delimiter: str) -> None:
    other = next((c for c in _SEPARATORS if c != delimiter and c in names[0]), None) if len(names) == 1 else None
    if other is not None:
        raise DataError(f"{path}: {_separator_hint(other, delimiter)}")


def _separator_hint(actual: str, expected: str) -> str:
    remedy = {"\t": "name it .tsv", ",": "name it .csv"}.get(actual, "write them with commas")
    return f"its columns are separated by {_SEPARATORS[actual]}, not by {_SEPARATORS[expected]}; {remedy}"


def _is_read_as_text(field: pa.Field, kind: ColumnKind | None) -> bool:
    """Return whether a column is read as text first: pyarrow's number may have lost characters of the file."""
    if kind == "number":
        return False
    return kind is not None or pa.types.is_integer(field.type) or pa.types.is_floating(field.type)


def read_texts(table: pa.Table, kinds: Mapping[str, ColumnKind]) -> Iterator[pa.RecordBatch]:
    """Yield a table of texts with the types that `read_csv` would give them; other columns stay as they are."""
    texts = {field.name: kinds.get(field.name) for field in table.schema if pa.types.is_string(field.type)}
    types = [_column_type(table, index, texts) for index in range(table.num_columns)]
    for batch in table.to_batches(ROW_GROUP):
        yield from _cast_columns(batch, types, texts)


def _cast_tables(tables: Iterator[_Rows], kinds: Mapping[str, ColumnKind | None]) -> Iterator[pa.RecordBatch]:
    """Cast the columns that were read as text to types that are inferred from the first table."""
    types: list[pa.DataType] | None = None
    for part in tables:
        # Decided once: a type per table could make one column a number in some row groups and a text in others.
        types = types or [_column_type(part, index, kinds) for index in range(part.num_columns)]
        yield from _cast_columns(part, types, kinds)


# Columns are addressed by position: two may share a name, and whether that matters is checked later.
def _column_type(part: _Rows, index: int, kinds: Mapping[str, ColumnKind | None]) -> pa.DataType:
    field = part.schema.field(index)
    return _infer_type(part.column(index), kinds[field.name]) if field.name in kinds else field.type


def _cast_columns(
    part: _Rows, types: list[pa.DataType], kinds: Mapping[str, ColumnKind | None]
) -> Iterator[pa.RecordBatch]:
    columns = [
        _cast(values, kind, kinds[field.name]) if field.name in kinds else values
        for field, values, kind in zip(part.schema, part.columns, types, strict=True)
    ]
    schema = pa.schema([field.with_type(kind) for field, kind in zip(part.schema, types, strict=True)])
    yield from pa.Table.from_arrays(columns, schema=schema).combine_chunks().to_batches(ROW_GROUP)


def _infer_type(texts: _Column, kind: ColumnKind | None) -> pa.DataType:
    """Return the narrowest type that loses nothing of the texts of a column."""
    if kind == "text":
        return pa.string()
    known = texts.filter(pc.invert(pc.is_in(texts, CSV_NULLS)))
    if _all_match(known, INTEGER):
        return pa.int64()
    if not _all_match(known, _NUMBER):
        return pa.string()
    # `3.10` may be a class, which a float would turn into 3.1. Numbers that nearly all differ are no classes: as floats
    # they are refused later, with a message about floats.
    is_class = kind == "class" and not _all_match(known, _WHOLE) and 2 * pc.count_distinct(known).as_py() <= len(known)
    return pa.string() if is_class else pa.float64()


def _all_match(texts: _Column, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(texts, pattern, ignore_case=True), min_count=0).as_py())


def _cast(texts: _Column, kind: pa.DataType, read_as: ColumnKind | None) -> _Column:
    """Cast texts to a type that was inferred from earlier rows.

    Raises:
        ArrowInvalid: A text does not fit the type.
    """
    if pa.types.is_string(kind):
        # An empty field is no name of a class.
        return pc.if_else(pc.equal(texts, ""), None, texts) if read_as == "class" else texts
    known = pc.if_else(pc.is_in(texts, CSV_NULLS), None, texts)
    if not _all_match(known, INTEGER if pa.types.is_integer(kind) else _NUMBER):
        raise pa.ArrowInvalid("types change after the first block")
    return known.cast(kind)
