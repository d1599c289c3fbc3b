"""One worker of `predict`: a model, loaded once, and a thread that reads and encodes ahead. A Ray actor on any node.

Rows of similar length share a batch: each piece (a few thousand rows) is sorted by length, cut into batches, predicted,
and put back in order. Pieces do not depend on the workers, so equal hardware gives the same bits; on other hardware a
row's prediction changes by floating-point noise alone. Read `row_reader.py` and `output.py` next.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from launcher.data.footers import castable
from launcher.data.splits import Split
from launcher.data.stream import handle_bad_rows
from launcher.predict.output import Part, write_part
from launcher.predict.parts import Layout
from launcher.predict.row_reader import RowReader
from launcher.rundir.directory import RunDir
from launcher.spec.job import EVALUATION_BATCH, JobSpec
from launcher.tasks import build_task
from launcher.tasks.samples import Encoded


@dataclass(frozen=True)
class PredictionConfig:
    """Settings that all workers of one command share; put into the object store once."""

    job: JobSpec
    """Job of the run, with the exported model."""
    split: Split
    layout: Layout
    output: RunDir


@dataclass(frozen=True)
class _Piece:
    """Rows of a piece, and the samples they encode to."""

    rows: pa.Table
    encoded: Encoded


class Predictor:
    """Worker that predicts part after part; `load` comes first."""

    def __init__(self, config: PredictionConfig) -> None:
        self._config = config

    def load(self) -> None:
        """Load the model.

        Not in the constructor: Ray reports what a constructor raises as the actor's death, without the error's class.
        """
        import torch

        job, split = self._config.job, self._config.split
        # Logical CPUs bound nothing by themselves: torch would choose its threads without regard to other workers on
        # the node.
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(job.cluster.cpus_per_worker)))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._task = build_task(job)
        self._model = self._task.build_model().eval()
        torch.nn.Module.to(self._model, self._device)  # transformers' own `to` is untyped
        # A second task for the reading thread, as fast tokenizers are not safe to use from two threads at once.
        self._encoder = build_task(job)
        self._reader = RowReader(split, self._config.layout.piece_rows)
        # One thread: `RowReader` holds a position and is not made for two.
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[range, Future[_Piece]] | None = None
        self._schema = pa.schema([*castable(split.schema), *self._task.prediction_schema])

    def predict(self, number: int, following: int | None) -> Iterator[int | Part]:
        """Write one part; yield the number of rows done after each piece, then the part.

        Args:
            number: Number of the part.
            following: Part that this worker will probably do next; its first piece is read ahead. None for none.

        Raises:
            DataError: A row cannot be used and the job says `on_bad_row: error`, or a file cannot be read.
            RunError: The output cannot be written.
        """
        layout = self._config.layout
        pieces = layout.pieces(number)
        next_pieces = [*pieces[1:], None if following is None else layout.pieces(following)[0]]
        with write_part(self._config.output, number, self._schema) as writer:
            for rows, next_rows in zip(pieces, next_pieces, strict=True):
                piece = self._take_piece(rows)
                # Before the model runs, so that the thread reads and encodes while the model computes.
                if next_rows is not None:
                    self._read_ahead(next_rows)
                writer.write(self._predict_piece(piece), len(rows) - len(piece.encoded.valid_rows))
                # Progress alone: rows are safe only when their part is published.
                yield writer.rows
            part = writer.finish()
        # Behind the block: the part has its final name before the driver hears of it.
        yield part

    def _take_piece(self, rows: range) -> _Piece:
        if self._ahead is None or self._ahead[0] != rows:  # the first piece, or another part than expected
            self._read_ahead(rows)
        assert self._ahead is not None
        piece = self._ahead[1].result()
        self._ahead = None
        return piece

    def _read_ahead(self, rows: range) -> None:
        self._ahead = (rows, self._thread.submit(self._read, rows))

    def _read(self, rows: range) -> _Piece:
        table = self._reader.read(rows)
        encoded = self._encoder.encode(table, False)
        if self._config.job.data.on_bad_row == "error":
            handle_bad_rows(self._config.split, np.arange(rows.start, rows.stop), encoded, "error")
        return _Piece(table, encoded)

    def _predict_piece(self, piece: _Piece) -> pa.Table:
        """Return the rows with their prediction columns; a row that cannot be used gets nulls."""
        import torch

        encoded = piece.encoded
        batch_size = self._config.job.evaluation.batch_size or EVALUATION_BATCH
        # Longest first, so that a batch that does not fit fails at once and not near the end of a piece. Stable: equal
        # lengths keep their order, and a piece that is predicted again has the same batches.
        by_length = np.argsort(-encoded.lengths, kind="stable")
        predictions = [self._task.prediction_schema.empty_table()]
        with torch.inference_mode():
            for begin in range(0, len(by_length), batch_size):
                samples = encoded.samples.take(pa.array(by_length[begin : begin + batch_size])).combine_chunks()
                predictions.append(self._task.predict(self._model, samples).cast(self._task.prediction_schema))
        # Index of each row's prediction; -1, for rows that cannot be used, becomes null.
        indices = np.full(len(piece.rows), -1)
        indices[encoded.valid_rows[by_length]] = np.arange(len(by_length))
        ordered = pa.concat_tables(predictions).combine_chunks().take(pa.array(indices, mask=indices < 0))
        return pa.table([*piece.rows.columns, *ordered.columns], self._schema)
