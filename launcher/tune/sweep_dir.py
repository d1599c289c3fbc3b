"""A sweep on disk: `sweep/` of a run directory. Written by the driver alone; runs on the head.

`sweep/job.yaml` (resolved, with `tune:`), `sweep/sweep.json`, `sweep/trials/trial-0007/` (a run directory each, with
`trial.json`), and at the end `best.yaml`, `trials.parquet`, `trials.csv`, `report.html`.
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
_ENDS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


@dataclass
class SweepDir:
    """All trials, in memory and on disk alike.

    Args:
        run: the run that the sweep belongs to.
        record: what the trials have in common.
        spec: `tune:` of the job file.
        job: the job that the trials vary.
        trials: by number.
    """

    run: RunDir
    record: SweepRecord
    spec: TuneSpec
    job: JobSpec
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Directory of the trials, a path or URI."""
        return self.run.path("sweep/trials")

    def trial_run(self, number: int) -> RunDir:
        """A trial's own run directory."""
        return RunDir(join(self.folder, trial_name(number)))

    def load(self) -> None:
        """Load the trials of earlier attempts.

        Raises:
            RunError: One sets a key that is not searched, which might permit what the job file does not.
        """
        for trial in read_trials(self.run):
            for key in trial.params.keys() - self.spec.space.keys():
                where = self.trial_run(trial.number).path("trial.json")
                raise RunError(f"{where}: sets {key}, which is not in tune.space; remove the directory of this trial")
        self.trials = {trial.number: trial for trial in read_trials(self.run)}

    def put(self, trial: TrialRecord) -> None:
        """Publish what is known of a trial now."""
        if self.trials.get(trial.number) != trial:
            self.trials[trial.number] = trial
            run = self.trial_run(trial.number)
            run.write_record("trial.json", trial)
            if trial.status != "running":
                trackers.end(run, self.job, _ENDS[trial.status])

    def save(self, **changes: object) -> None:
        """Publish what the trials have in common."""
        self.record = self.record.model_copy(update=changes)
        self.run.write_record("sweep/sweep.json", self.record)

    def ranked(self) -> list[TrialRecord]:
        """The trials that were searched, best first; those that failed or saw nothing last."""
        return self.record.ranked(self.trials.values())

    def free_space(self, budget_gib: float) -> None:
        """Remove the checkpoints of pruned and failed trials, and of the worst finished ones beyond the budget.

        The best trial so far keeps its own whatever became of it: it may be trained to its end.
        """
        used = 0
        best_first = sorted(self.trials.values(), key=lambda t: (-t.score(self.record.mode), t.number))
        for place, trial in enumerate(best_first):
            if trial.status == "running" or self._sizes.get(trial.number) == 0:
                continue
            size = self._sizes.setdefault(trial.number, _checkpoint_bytes(self.trial_run(trial.number)))
            given_up = trial.status != "finished" or used + size > budget_gib * _GIB
            if place and given_up:
                run = self.trial_run(trial.number)
                for step in catalog.complete_steps(run):
                    catalog.remove(run, step)
                run.delete("checkpoints")
                self._sizes[trial.number] = size = 0
            used += size


def _checkpoint_bytes(run: RunDir) -> int:
    manifests = [catalog.read_manifest(run, step) for step in catalog.complete_steps(run)]
    return sum(entry.size_bytes for manifest in manifests for entry in manifest.files)
