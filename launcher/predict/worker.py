"""One worker of `predict`: a model, loaded once, and a thread that reads and encodes ahead. A Ray actor.

Rows of like length share a batch: each piece (a few thousand rows) is sorted by length, cut into batches, predicted,
and put back in order. Pieces are the same whoever predicts them, so on like hardware the same bits come out; a row's
prediction depends on the rows of its batch by floating-point noise alone.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from launcher.data.splits import Split
from launcher.data.stream import handle_bad_rows
from launcher.predict.output import Part, writing
from launcher.predict.parts import Layout
from launcher.predict.row_reader import RowReader
from launcher.rundir.directory import RunDir
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Encoded


@dataclass(frozen=True)
class PredictionConfig:
    """What all workers of one command share; put into the object store once."""

    job: JobSpec
    """The run's, its model the exported one."""
    split: Split
    layout: Layout
    output: RunDir


@dataclass(frozen=True)
class _Piece:
    rows: pa.Table
    encoded: Encoded


class Predictor:
    """Predicts part after part; `load` comes first."""

    def __init__(self, order: PredictionConfig) -> None:
        self._order = order

    def load(self) -> None:
        """Load the model, not in the constructor: what is wrong with it then reaches the driver as itself."""
        import torch

        job, split = self._order.job, self._order.split
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(job.cluster.cpus_per_worker)))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._task = build_task(job)
        self._model = self._task.build_model().eval()
        torch.nn.Module.to(self._model, self._device)  # transformers' own `to` is untyped
        # Tokenizers are not to be used by two threads at once: the one ahead has its own.
        self._encoder = build_task(job)
        self._reader = RowReader(split, self._order.layout.piece_rows)
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._ahead: tuple[range, Future[_Piece]] | None = None
        self._schema = pa.schema([*split.schema, *self._task.prediction_schema])

    def predict(self, number: int, following: int | None) -> Iterator[int | Part]:
        """Write one part; yields the rows done after each piece, then the part.

        Args:
            number: of the part.
            following: the part that is likely to be asked for next; its first piece is read ahead.

        Raises:
            DataError: a row cannot be used and the job says `error`, or a file cannot be read.
            RunError: the output cannot be written.
        """
        layout = self._order.layout
        pieces = layout.pieces(number)
        coming = [*pieces[1:], None if following is None else layout.pieces(following)[0]]
        with writing(self._order.output, number, self._schema) as out:
            for rows, after in zip(pieces, coming, strict=True):
                piece = self._take(rows)
                if after is not None:
                    self._begin(after)
                out.write(self._predicted(piece), len(rows) - len(piece.encoded.valid_rows))
                yield out.rows
            part = out.seal()
        yield part

    def _take(self, rows: range) -> _Piece:
        if self._ahead is None or self._ahead[0] != rows:
            self._begin(rows)
        assert self._ahead is not None
        piece, self._ahead = self._ahead[1].result(), None
        return piece

    def _begin(self, rows: range) -> None:
        self._ahead = rows, self._thread.submit(self._read, rows)

    def _read(self, rows: range) -> _Piece:
        table = self._reader.read(rows)
        encoded = self._encoder.encode(table, False)
        if self._order.job.data.on_bad_row == "error":
            handle_bad_rows(self._order.split, np.arange(rows.start, rows.stop), encoded, "error")
        return _Piece(table, encoded)

    def _predicted(self, piece: _Piece) -> pa.Table:
        """The rows with their prediction columns; an unusable row gets nulls."""
        import torch

        encoded, size = piece.encoded, self._order.job.evaluation.batch_size
        by_length = np.argsort(-encoded.lengths, kind="stable")
        predicted = [self._task.prediction_schema.empty_table()]
        with torch.inference_mode():
            for begin in range(0, len(by_length), size):
                samples = encoded.samples.take(pa.array(by_length[begin : begin + size])).combine_chunks()
                predicted.append(self._task.predict(self._model, samples).cast(self._task.prediction_schema))
        places = np.full(len(piece.rows), -1)
        places[encoded.valid_rows[by_length]] = np.arange(len(by_length))
        taken = pa.concat_tables(predicted).combine_chunks().take(pa.array(places, mask=places < 0))
        return pa.table([*piece.rows.columns, *taken.columns], self._schema)
