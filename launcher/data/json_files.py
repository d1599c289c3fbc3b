"""JSON Lines and JSON arrays as record batches. Runs on the client and the head.

pyarrow reads lines of objects only. Anything else is rewritten to such lines on the way, a few MiB at a time: an array
of objects in any layout, and a column with more than one type that the task does not read, or whose cells are lists of
objects (messages), and which becomes texts of JSON. Read `convert.py` next.
"""

import codecs
import io
import json
import re
from collections.abc import Collection, Iterator
from itertools import count

import pyarrow as pa
import pyarrow.json

from launcher.data.files import BLOCK_BYTES, ROW_GROUP, open_data_file

_CHUNK_BYTES = 1 << 20
_MAX_ROW_BYTES = 1 << 28
# A syntax error this close to the end of the text may only be a token that the chunk ends in.
_MAX_TOKEN_CHARACTERS = 16
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\n\r]*")


def read_json(path: str, from_all_rows: bool, mixed: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """Read lines of objects, or an array of them.

    Args:
        path: Path or URI of the file.
        from_all_rows: True to infer types from all rows, with the file in memory, and not from the first block.
        mixed: Keys whose values become texts of JSON.

    Raises:
        ArrowInvalid: The file holds something else, or its types change after the first block.
    """
    has_array = is_array(path)
    texts: dict[str, pa.DataType] = {}
    while True:
        read = pa.json.ReadOptions(block_size=BLOCK_BYTES)
        parse = pa.json.ParseOptions(explicit_schema=pa.schema(texts) if texts else None)
        with open_data_file(path) as stream:
            lines = _open_as_lines(stream, has_array, mixed)
            reader = (pa.json.read_json if from_all_rows else pa.json.open_json)(lines, read, parse)
            # JSON has no times, but pyarrow infers them from texts that look so, and would print them differently.
            times = {field.name: _without_times(field.type) for field in reader.schema if _has_times(field.type)}
            if times:
                texts |= times
                # Read again, with these columns as text. pyarrow has already parsed them, so the characters of the file
                # are lost here.
                continue
            for batch in reader.to_batches(ROW_GROUP) if from_all_rows else reader:
                # pyarrow's JSON reader accepts any bytes as UTF-8.
                batch.validate(full=True)
                yield batch
            return


def changed_keys(error: BaseException) -> tuple[str, ...]:
    """Return the keys down to the values with more than one type, out of pyarrow's message; none for another error."""
    match = re.search(r"Column\(/([^)]+)\) (?:changed|was specified)", str(error))
    return tuple(key for key in match.group(1).split("/") if key != "[]") if match else ()


def _open_as_lines(stream: pa.NativeFile, has_array: bool, mixed: Collection[str]) -> "pa.NativeFile | pa.PythonFile":
    if not has_array and not mixed:
        return stream  # pyarrow reads the file itself, in several threads
    chunks = iter(lambda: bytes(stream.read(_CHUNK_BYTES)), b"")
    lines = objects(chunks) if has_array else _text_lines(chunks)
    if mixed:
        lines = (_with_texts(line, mixed) for line in lines)
    return pa.PythonFile(_ChunkFile(f"{line}\n".encode("utf-8", "surrogatepass") for line in lines), mode="r")


def is_array(path: str) -> bool:
    """Return whether a file holds one JSON array rather than lines of objects."""
    with open_data_file(path) as stream:
        return bytes(stream.read(_CHUNK_BYTES)).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _with_texts(line: str, mixed: Collection[str]) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise pa.ArrowInvalid(str(error)) from error
    if not isinstance(row, dict):
        return line
    return json.dumps(row | {key: json.dumps(row[key]) for key in mixed if row.get(key) is not None})


def _text_lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        # Bytes are split before they are decoded: a chunk may end inside a character, a line cannot.
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(_decode, filter(bytes.strip, lines))
    if rest.strip():
        yield _decode(rest)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid("it is not UTF-8") from error


def objects(chunks: Iterator[bytes]) -> Iterator[str]:
    """Yield each object of a JSON array as it is written, on one line.

    Raises:
        ArrowInvalid: The text is no array of objects; names the row.
    """
    scanner = _Scanner(chunks)
    scanner.take()  # the opening bracket
    if scanner.peek() == "]":
        return
    for number in count():
        yield scanner.take_object(number)
        mark = scanner.take()
        if mark == "]":
            break
        if mark != ",":
            raise pa.ArrowInvalid(f"after row {number}: a comma or ] is expected, not {mark or 'the end of the file'}")
    if scanner.peek():
        raise pa.ArrowInvalid(f"there is more text after the array of {number + 1} rows")


class _Scanner:
    """Scanner over the elements of an array in chunks of bytes; it holds little more than the longest element."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._has_more = True
        # Incremental: a chunk may end inside a character.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._at = 0

    def _fill(self, characters: int) -> None:
        """Read on until so many characters are ahead, or to the end."""
        while self._has_more and len(self._text) - self._at < characters:
            chunk = next(self._chunks, b"")
            self._has_more = bool(chunk)
            try:
                self._text = self._text[self._at :] + self._decode(chunk, not chunk)
            except UnicodeDecodeError as error:
                raise pa.ArrowInvalid("it is not UTF-8") from error
            self._at = 0

    def peek(self) -> str:
        """Return the next character that is not blank; "" at the end."""
        while True:
            self._fill(_CHUNK_BYTES)
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches nothing too
            if self._at < len(self._text) or not self._has_more:
                return self._text[self._at : self._at + 1]

    def take(self) -> str:
        """Return the next character that is not blank, and move past it."""
        character = self.peek()
        self._at += len(character)
        return character

    def take_object(self, number: int) -> str:
        """Return the object that begins here, on one line, and move past it.

        Args:
            number: Number of the row, for messages.
        """
        if self.peek() != "{":
            raise pa.ArrowInvalid(f"row {number}: it holds no object")
        wanted = _CHUNK_BYTES
        while True:
            self._fill(wanted)
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                is_at_end = error.pos >= len(self._text) - _MAX_TOKEN_CHARACTERS
                is_cut = is_at_end or error.msg.startswith("Unterminated string")
                if not (self._has_more and is_cut and wanted < _MAX_ROW_BYTES):
                    raise pa.ArrowInvalid(f"row {number}: {error.msg}") from error
                wanted = 2 * (len(self._text) - self._at)  # doubling decodes a long row about twice in all
            except RecursionError as error:
                raise pa.ArrowInvalid(f"row {number}: it is nested too deeply") from error
        text = self._text[self._at : end]
        self._at = end
        # Line breaks are only between tokens: inside a string they are escaped.
        return text.replace("\n", " ").replace("\r", " ")


class _ChunkFile(io.RawIOBase):
    """Chunks of bytes as a file to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        chunks = [bytes(self._rest)]
        length = len(self._rest)
        while size < 0 or length < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            chunks.append(chunk)
            length += len(chunk)
        content = b"".join(chunks)
        end = len(content) if size < 0 else min(size, len(content))
        self._rest = memoryview(content)[end:]
        return content[:end]


def _has_times(kind: pa.DataType) -> bool:
    return not kind.equals(_without_times(kind))


def _without_times(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    return kind
