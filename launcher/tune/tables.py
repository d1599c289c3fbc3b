"""The trials of a sweep as tables, and as hyperparameters for TensorBoard. Runs on the head.

`sweep/trials.parquet` and `sweep/trials.csv` have a row per trial; `tensorboard --logdir RUN/sweep/trials` shows the
HParams tab.
"""

import io
import json

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from launcher.rundir.directory import RunDir
from launcher.rundir.trials import TrialRecord
from launcher.tune.sweep_dir import SweepDir


def write_tables(sweep: SweepDir) -> None:
    """Publish all trials as Parquet and CSV: status, values, best evaluation and cost, the best trial first."""
    record = sweep.record
    rows = []
    repeats = [trial for trial in sweep.trials.values() if trial.repeat_of is not None]
    for rank, trial in enumerate([*sweep.rank_trials(), *repeats], 1):
        best = trial.best_evaluation(record.mode)
        hours = trial.seconds / 3600
        row: dict[str, object] = {"rank": rank if trial.repeat_of is None else None, "number": trial.number}
        row |= {"status": trial.status, "reason": trial.reason, "seed": trial.seed, "repeat_of": trial.repeat_of}
        for key in record.space:
            value = trial.params.get(key)
            row[key] = json.dumps(value) if isinstance(value, list | dict) else value
        row |= {record.metric: best.value if best else None, "best_step": best.step if best else None}
        row |= {"steps": trial.evaluations[-1].step if trial.evaluations else 0, "total_steps": trial.total_steps}
        row |= {"seconds": trial.seconds, "cpu_hours": hours * trial.workers * record.cpus_per_worker}
        row["gpu_hours"] = hours * trial.gpus
        rows.append(row)
    for key in record.space:
        # An Arrow column has one type: choices of numbers and words (`[4, auto]`) are written as text.
        if len({isinstance(row[key], str) for row in rows if row[key] is not None}) > 1:
            for row in rows:
                row[key] = None if row[key] is None else str(row[key])
    table = pa.Table.from_pylist(rows)
    for name, write in (("trials.parquet", pq.write_table), ("trials.csv", pacsv.write_csv)):
        content = io.BytesIO()
        write(table, content)
        sweep.run.write_bytes(f"sweep/{name}", content.getvalue())


def write_hparams(run: RunDir, trial: TrialRecord, metric: str, mode: str) -> None:
    """Add a trial's values and best metric to its TensorBoard curves, if the run directory is local.

    TensorBoard appends to event files, which an object store cannot do.
    """
    best = trial.best_evaluation(mode)
    local = run.local
    if best is None or local is None:
        return
    # TensorBoard's `hparams` raises ValueError for other types.
    values = {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in trial.params.items()}
    name = f"best/{metric}"
    # SummaryWriter.add_hparams would open a second directory per trial, so its three summaries are written here.
    with SummaryWriter(str(local / "tensorboard")) as writer:
        for summary in hparams(values, {name: best.value}):
            writer.file_writer.add_summary(summary)
        writer.add_scalar(name, best.value, best.step)
