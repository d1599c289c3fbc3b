"""The directory of a sweep, `sweep/` of a run directory. Runs on the head; only the driver writes it.

sweep/job.yaml                 the resolved job with `tune:`
sweep/sweep.json               `SweepRecord`
sweep/trials/trial-0007/       a run directory per trial, with trial.json
sweep/best.yaml, trials.parquet, trials.csv, report.html
"""

from dataclasses import dataclass, field

from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.trials import SweepRecord, TrialRecord, read_trials
from launcher.rundir.uri import join
from launcher.spec.job import JobSpec
from launcher.spec.tune import TuneSpec
from launcher.train.checkpoint import catalog
from launcher.train.loggers import trackers
from launcher.tune.trial import trial_name

_GIB = 1 << 30
_TRACKER_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


@dataclass
class SweepDir:
    """All trials of a sweep, in memory and on disk.

    Args:
        run: Run that the sweep belongs to.
        record: Facts that all trials share.
        spec: Section `tune:` of the job file.
        job: Job that the trials vary.
        trials: Trials by number.
    """

    run: RunDir
    record: SweepRecord
    spec: TuneSpec
    job: JobSpec
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Directory of the trials, as path or URI."""
        return self.run.path("sweep/trials")

    def trial_run(self, number: int) -> RunDir:
        """Return the run directory of a trial."""
        return RunDir(join(self.folder, trial_name(number)))

    def load(self) -> None:
        """Load the trials of earlier attempts.

        Raises:
            RunError: A trial sets a key that is not searched. Such a file could switch on what the job file forbids.
        """
        trials = read_trials(self.run)
        for trial in trials:
            for key in trial.params.keys() - self.spec.space.keys():
                path = self.trial_run(trial.number).path("trial.json")
                raise RunError(f"{path}: sets {key}, which is not in tune.space; remove the directory of this trial")
        self.trials = {trial.number: trial for trial in trials}

    def record_trial(self, trial: TrialRecord) -> None:
        """Publish a trial if it changed, and end its tracker run if it is complete."""
        if self.trials.get(trial.number) != trial:
            self.trials[trial.number] = trial
            run = self.trial_run(trial.number)
            # The record first: a resumed sweep reads it, while the trackers only mirror it.
            run.write_record("trial.json", trial)
            if trial.status != "running":
                trackers.end(run, self.job, _TRACKER_STATUS[trial.status])

    def save(self, **changes: object) -> None:
        """Publish sweep.json with the changed fields."""
        self.record = self.record.model_copy(update=changes)
        self.run.write_record("sweep/sweep.json", self.record)

    def rank_trials(self) -> list[TrialRecord]:
        """Return the searched trials, the best first, those without an evaluation or failed last."""
        return self.record.rank_trials(self.trials.values())

    def free_space(self, budget_gib: float) -> None:
        """Remove checkpoints of pruned and failed trials, and of the worst finished ones beyond the budget.

        The best trial so far keeps its checkpoints even if it is pruned, because it may be trained to its end.
        """
        used = 0
        best_first = sorted(self.trials.values(), key=lambda t: (-t.score(self.record.mode), t.number))
        for rank, trial in enumerate(best_first):
            if trial.status == "running" or self._sizes.get(trial.number) == 0:
                continue
            # Measured once per trial: this runs after every trial, and each manifest is a request to the storage.
            size = self._sizes.setdefault(trial.number, _checkpoint_bytes(self.trial_run(trial.number)))
            is_expendable = trial.status != "finished" or used + size > budget_gib * _GIB
            if rank and is_expendable:
                run = self.trial_run(trial.number)
                # Complete ones first, their manifests before their files: a checkpoint that is half removed must not
                # look complete.
                for step in catalog.complete_steps(run):
                    catalog.remove(run, step)
                run.delete("checkpoints")
                self._sizes[trial.number] = size = 0
            used += size


def _checkpoint_bytes(run: RunDir) -> int:
    manifests = [catalog.read_manifest(run, step) for step in catalog.complete_steps(run)]
    return sum(entry.size_bytes for manifest in manifests for entry in manifest.files)
