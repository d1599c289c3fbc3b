"""Trials for TensorBoard's HParams tab: `tensorboard --logdir RUN/sweep/trials`. Runs on the head."""

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from launcher.rundir.directory import RunDir
from launcher.rundir.trials import TrialRecord


def write_hparams(run: RunDir, trial: TrialRecord, metric: str, mode: str) -> None:
    """Put a trial's values and its best metric beside its curves; event files cannot be written to an object store."""
    best, local = trial.best(mode), run.local
    if best is None or local is None:
        return
    values = {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in trial.params.items()}
    name = f"best/{metric}"
    with SummaryWriter(str(local / "tensorboard")) as board:
        for summary in hparams(values, {name: best.value}):
            board.file_writer.add_summary(summary)
        board.add_scalar(name, best.value, best.step)
