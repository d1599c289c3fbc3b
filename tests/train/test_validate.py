"""Evaluation: the worst rows are those with the largest losses, in one order for any number of workers."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from launcher.tasks.results import RowResult
from launcher.train.validate import _MAX_WORST, _ScoredBatch, _update_worst, _WorstSample


@pytest.mark.parametrize("micro_batch", [3, 20, 60])
@pytest.mark.parametrize("descending", [False, True])
def test_of_rows_with_equal_losses_the_first_are_the_worst(micro_batch: int, descending: bool) -> None:
    def row_results(outputs: Any, batch: Any, samples: pa.Table, chosen: list[int]) -> list[RowResult]:
        return [RowResult(target="", prediction="") for _ in chosen]

    task: Any = SimpleNamespace(row_results=row_results)
    # One row is worse than all others, one has no loss that can be compared.
    loss_of = {41: 2.0, 42: float("nan")}
    rows = sorted(range(60), reverse=descending)
    worst: list[_WorstSample] = []
    for begin in range(0, len(rows), micro_batch):
        ids = rows[begin : begin + micro_batch]
        losses_B = torch.tensor([loss_of.get(row, 1.0) for row in ids])
        batch: Any = None
        _update_worst(task, worst, _ScoredBatch(pa.table({"__row": ids}), batch, {}, losses_B), losses_B)
    assert [sample.row for sample in sorted(worst, reverse=True)] == [41, *range(_MAX_WORST - 1)]
