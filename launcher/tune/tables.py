"""The trials as tables: `sweep/trials.parquet` and `sweep/trials.csv`, a row per trial. Runs on the head."""

import io
import json

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from launcher.tune.sweep_dir import SweepDir


def write_tables(sweep: SweepDir) -> None:
    """Publish both."""
    table = trials_table(sweep)
    for name, write in (("trials.parquet", pq.write_table), ("trials.csv", pacsv.write_csv)):
        content = io.BytesIO()
        write(table, content)
        sweep.run.write_bytes(f"sweep/{name}", content.getvalue())


def trials_table(sweep: SweepDir) -> pa.Table:
    """Trials by rank: number, status, values of the searched keys, best value, steps, hours."""
    record = sweep.record
    rows = []
    repeats = [t for t in sweep.trials.values() if t.repeat_of is not None]
    for rank, trial in enumerate([*sweep.ranked(), *repeats], 1):
        best = trial.best(record.mode)
        last = trial.evaluations[-1] if trial.evaluations else None
        hours = trial.seconds / 3600
        row: dict[str, object] = {"rank": rank if trial.repeat_of is None else None, "number": trial.number}
        row |= {"status": trial.status, "reason": trial.reason, "seed": trial.seed, "repeat_of": trial.repeat_of}
        row |= {key: _plain(trial.params.get(key)) for key in record.space}
        row |= {record.metric: best.value if best else None, "best_step": best.step if best else None}
        row |= {"steps": last.step if last else 0, "total_steps": trial.total_steps, "seconds": trial.seconds}
        row |= {"cpu_hours": hours * trial.workers * record.cpus_per_worker, "gpu_hours": hours * trial.gpus}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _plain(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value
