"""Files of text as streams of bytes, unpacked where their names say so. Runs on the client and the head."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from launcher.errors import DataError
from launcher.rundir.uri import describe_os_error, open_uri

# A row must fit in a block, and a stream's types are those of its first block.
BLOCK_BYTES = 8 << 20
ROW_GROUP = 16384


@contextmanager
def open_data_file(path: str) -> Iterator[pa.NativeFile]:
    """Open a file as a stream of bytes; what its storage says against it names the file."""
    try:
        fs, inner = open_uri(path)
        with fs.open_input_stream(inner) as stream:  # `.gz`, `.bz2` and `.zst` are unpacked by their ending
            yield stream
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({describe_os_error(error)}); check the file and your rights"
        ) from error
