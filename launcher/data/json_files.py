"""JSON Lines and JSON arrays as record batches. Runs on the client and the head.

pyarrow reads lines of objects. What it does not take is turned into such lines on the way, a few MiB at a time: an
array of objects, however it is laid out, and a column that nobody reads and that has more than one type, which becomes
its own JSON. Read `convert.py` next.
"""

import codecs
import io
import json
import re
from collections.abc import Collection, Iterator
from itertools import count

import pyarrow as pa
import pyarrow.json

from launcher.data.opened import BLOCK_BYTES, ROW_GROUP, open_data_file

_CHUNK_BYTES = 1 << 20
_LARGEST_ROW_BYTES = 1 << 28
# So near to its end a text that stops in the middle of a token is told from one that is wrong.
_TOKEN = 16
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\n\r]*")


def read_json(path: str, whole: bool, mixed: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """Read lines of objects, or an array of them.

    Args:
        path: Of the file.
        whole: Whether types are those of all rows, which takes the file's size in memory; else of the first block.
        mixed: Keys whose values become texts of JSON.

    Raises:
        ArrowInvalid: The file holds something else, or its types change behind the first block.
    """
    array = is_array(path)
    texts: dict[str, pa.DataType] = {}
    while True:
        read = pa.json.ReadOptions(block_size=BLOCK_BYTES)
        parse = pa.json.ParseOptions(explicit_schema=pa.schema(texts) if texts else None)
        with open_data_file(path) as stream:
            lines = _as_lines(stream, array, mixed)
            found = (pa.json.read_json if whole else pa.json.open_json)(lines, read, parse)
            # JSON knows no times: pyarrow takes texts for them that look so, and writes them in another way.
            times = {field.name: _without_times(field.type) for field in found.schema if _has_times(field.type)}
            if times:
                texts |= times
                continue
            for batch in found.to_batches(ROW_GROUP) if whole else found:
                batch.validate(full=True)  # pyarrow's JSON reader takes any bytes for UTF-8
                yield batch
            return


def changed_column(error: BaseException) -> str:
    """Return the key whose values have more than one type, as pyarrow names it; "" where that is not the matter."""
    found = re.search(r"Column\(/([^/)]+)[^)]*\) (?:changed|was specified)", str(error))
    return found.group(1) if found else ""


def _as_lines(stream: pa.NativeFile, array: bool, mixed: Collection[str]) -> "pa.NativeFile | pa.PythonFile":
    if not array and not mixed:
        return stream  # pyarrow's own reading, in several threads
    chunks = iter(lambda: bytes(stream.read(_CHUNK_BYTES)), b"")
    lines = objects(chunks) if array else _text_lines(chunks)
    if mixed:
        lines = (_with_texts(line, mixed) for line in lines)
    return pa.PythonFile(_Chunks(f"{line}\n".encode("utf-8", "surrogatepass") for line in lines), mode="r")


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
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(_decoded, filter(bytes.strip, lines))
    if rest.strip():
        yield _decoded(rest)


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid("it is not UTF-8") from error


def objects(chunks: Iterator[bytes]) -> Iterator[str]:
    """Yield each object of a JSON array as it stands, on one line.

    Raises:
        ArrowInvalid: The text is no array of objects; names the row.
    """
    scanner = _Scanner(chunks)
    scanner.take()  # the bracket, by which the array was told
    if scanner.peek() == "]":
        return
    for number in count():
        yield scanner.element(number)
        mark = scanner.take()
        if mark == "]":
            break
        if mark != ",":
            raise pa.ArrowInvalid(f"behind row {number}: a comma or ] is expected, not {mark or 'the end of the file'}")
    if scanner.peek():
        raise pa.ArrowInvalid(f"more follows behind the array of {number + 1} rows")


class _Scanner:
    """Elements of an array out of pieces of bytes; holds little more than the longest of them."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._more = chunks, True
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = "", 0

    def _fill(self, wanted: int) -> None:
        while self._more and len(self._text) - self._at < wanted:
            chunk = next(self._chunks, b"")
            self._more = bool(chunk)
            try:
                self._text, self._at = self._text[self._at :] + self._decode(chunk, not chunk), 0
            except UnicodeDecodeError as error:
                raise pa.ArrowInvalid("it is not UTF-8") from error

    def peek(self) -> str:
        """Return the next character that is not blank; "" at the end."""
        while True:
            self._fill(_CHUNK_BYTES)
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches nothing too
            if self._at < len(self._text) or not self._more:
                return self._text[self._at : self._at + 1]

    def take(self) -> str:
        """Return the next character that is not blank, and go behind it."""
        found = self.peek()
        self._at += len(found)
        return found

    def element(self, number: int) -> str:
        """Return the object that begins here, on one line, and go behind it.

        Args:
            number: Its row, for messages.
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
                is_cut = error.pos >= len(self._text) - _TOKEN or error.msg.startswith("Unterminated string")
                if not (self._more and is_cut and wanted < _LARGEST_ROW_BYTES):
                    raise pa.ArrowInvalid(f"row {number}: {error.msg}") from error
                wanted = 2 * (len(self._text) - self._at)  # doubled, a long row is decoded twice in all
            except RecursionError as error:
                raise pa.ArrowInvalid(f"row {number}: it is nested too deeply") from error
        found, self._at = self._text[self._at : end], end
        # Line breaks stand between tokens alone: within a text they are escaped.
        return found.replace("\n", " ").replace("\r", " ")


class _Chunks(io.RawIOBase):
    """Pieces of bytes as a file to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        pieces, held = [bytes(self._rest)], len(self._rest)
        while size < 0 or held < size:
            piece = next(self._chunks, b"")
            if not piece:
                break
            pieces.append(piece)
            held += len(piece)
        whole = b"".join(pieces)
        end = len(whole) if size < 0 else min(size, len(whole))
        self._rest = memoryview(whole)[end:]
        return whole[:end]


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
