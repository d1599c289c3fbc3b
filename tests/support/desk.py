"""Working directory with a valid job, methods that break it, and the command line in this process."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from launcher.rundir.directory import RunDir
from launcher.rundir.records import ResultRecord, ScoresRecord, TrainerState
from tests.support.command_line import CommandLine, Ended
from tests.support.jobs import example_table
from tests.support.records import step_record

JOB = """\
name: first
task: {type: text-classification, max_length: 32}
model: {name: ./model}
data:
  train: data/train.parquet
  validation: data/validation.parquet
train:
  epochs: 2
  batch_size: 8
cluster: {workers: 2}
"""


class Case(NamedTuple):
    """One broken job that `launcher check job.yaml` refuses.

    Args:
        name: Name of the test case.
        damage: Function that breaks the desk. It may return overrides for the command.
        sentence: Whole error sentence. `...` matches text of a library or the system; DESK is the folder.
    """

    name: str
    damage: "Callable[[Desk], object]"
    sentence: str


class Order(NamedTuple):
    """One command that is refused on a desk with a finished run.

    Args:
        words: Words of the command line.
        damage: Function that breaks the desk.
        sentence: Whole error sentence, as in a `Case`.
    """

    words: str
    damage: "Callable[[Desk], object]"
    sentence: str


def well(_: "Desk") -> None:
    """Break nothing: only the command is wrong."""


def check_and(other: str, cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrize a test by `command` and `case`: `launcher check` and another command refuse each case.

    Both prepare a job by the same code, so the other command has every fourth case, and the others as `long`.
    """
    params = []
    for number, case in enumerate(cases):
        marks = [] if number % 4 == 0 else [pytest.mark.long]
        params.append(pytest.param("check", case, id=f"{case.name}-check"))
        params.append(pytest.param(other, case, id=f"{case.name}-{other}", marks=marks))
    return pytest.mark.parametrize(("command", "case"), params)


@dataclass(frozen=True)
class Desk:
    """A folder that is the working directory, and the fixtures its methods need."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    models: dict[str, Path]
    """Tiny model of each task, by the task's name."""

    @property
    def bert(self) -> Path:
        return self.models["text-classification"]

    def job(self, old: str = "", new: str = "") -> None:
        """Write the job file with one part replaced."""
        assert old in JOB
        Path("job.yaml").write_text(JOB.replace(old, new, 1))

    def file(self, name: str, content: str | bytes = "") -> None:
        """Write a file, replacing whatever is there."""
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def table(self, name: str = "data/train.parquet", **columns: Any) -> None:
        """Write a Parquet file with these columns."""
        pq.write_table(pa.table(columns), name)

    def texts(self, labels: Any, name: str = "data/train.parquet") -> None:
        """Write a Parquet file with one text per label."""
        labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
        self.table(name, text=[f"w{i}" for i in range(len(labels))], label=labels)

    def model(self, *without: str) -> Path:
        """Replace the link to the model by a copy without some of its files."""
        Path("model").unlink()
        Path("model").mkdir()
        for file in self.bert.iterdir():
            if file.name not in without:
                (Path("model") / file.name).write_bytes(file.read_bytes())
        return Path("model")

    def config(self, **changes: object) -> None:
        """Change entries of the model's configuration."""
        path = self.model() / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def weights(self, change: "Callable[[dict[str, Any]], object]") -> None:
        """Change the model's weights in place."""
        path = Path("model") if Path("model/config.json").is_file() and not Path("model").is_symlink() else self.model()
        path = path / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def begun(self) -> None:
        """Create the run as `launcher train` leaves it when it is interrupted at once."""
        from launcher.driver.prepare import prepare
        from launcher.spec.loader import dump_job, load_job
        from launcher.tasks import params_class

        prepared = prepare(load_job("job.yaml", (), params_class))
        prepared.run.write_bytes("job.yaml", dump_job(prepared.job).encode())
        prepared.run.write_record("plan.json", prepared.plan)

    def finished(self) -> None:
        """Create a run that looks finished, but without checkpoints."""
        self.begun()
        run = RunDir("runs/first")
        run.append_metrics(step_record(step, 1.0 / step) for step in range(1, 5))
        result = ResultRecord(steps=4, best_step=4, stopped_early=False, skipped_rows=0, elapsed_s=4.0)
        run.write_record("result.json", result)
        scores = ScoresRecord(
            split="test", step=4, loss=0.5, rows=20, skipped_rows=0, metrics={"accuracy": 0.8},
            baseline={"accuracy": 0.5}, confusion=None, classes=(), worst=(),
        )  # fmt: skip
        run.write_record("scores-test.json", scores)
        shutil.copytree(self.bert, "runs/first/model")

    def edit(self, name: str, change: "Callable[[dict[str, Any]], object]") -> None:
        """Change a JSON file in place."""
        content = json.loads(Path(name).read_text())
        change(content)
        Path(name).write_text(json.dumps(content))

    def checkpoint(self, **changes: object) -> None:
        """Write a checkpoint of the run; `sha` is the hash of its only shard in the manifest."""
        folder = Path("runs/first/checkpoints/step-00000005")
        (folder / "state").mkdir(parents=True)
        (folder / "state/a.pt").write_bytes(b"shard")
        digest = hashlib.sha256(b"shard").hexdigest()
        entry = {"path": "state/a.pt", "size_bytes": 5, "sha256": changes.pop("sha", digest)}
        manifest = {"step": 5, "world_size": 2, "zero": 2, "spec_hash": "0" * 64, "files": [entry], **changes}
        state = TrainerState(
            step=5, skipped_rows=0, elapsed_s=1.0, best_step=None, best_value=None, evaluations_without_improvement=0
        )
        (folder / "state.json").write_text(state.model_dump_json())
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def launcher(self, *arguments: str) -> Ended:
        """Run a command in this process."""
        ended = CommandLine(self.monkeypatch, self.capsys)(*arguments)
        return ended._replace(err=ended.err.replace(str(self.folder), "DESK"))

    def files(self) -> dict[str, tuple[str, int, int]]:
        """Return kind, size and time of everything in the folder; directories have neither size nor time."""
        entries = {}
        for path in sorted(self.folder.rglob("*")):
            stat = path.lstat()
            kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
            size_and_time = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
            entries[str(path.relative_to(self.folder))] = (kind, *size_and_time)
        return entries

    def refuses_case(self, command: str, case: Case, may_leave: str = "") -> None:
        """Break the desk as the case says, and check that the command refuses the job."""
        damage = case.damage(self)
        overrides = damage if isinstance(damage, list) else []
        self.refuses(command, case.sentence, "job.yaml", *overrides, may_leave=may_leave)

    def refuses_order(self, order: Order) -> None:
        """Create a finished run, break the desk as the order says, and check that the command is refused."""
        self.finished()
        order.damage(self)
        command, *arguments = order.words.split()
        self.refuses(command, order.sentence, *arguments)

    def refuses(self, command: str, sentence: str, *arguments: str, may_leave: str = "") -> None:
        """Check that a command prints only this sentence, exits with code 2 and changes no file."""
        before = self.files()
        ended = self.launcher(command, *arguments)
        assert (ended.code, ended.out) == (2, ""), ended
        assert ended.err.count("\n") == 1, ended.err
        assert fits(sentence, ended.err.strip()), f"\nprinted  {ended.err}expected {sentence}"
        after = {name: facts for name, facts in self.files().items() if not (may_leave and name.startswith("runs"))}
        assert after == before


def fits(expected: str, sentence: str) -> bool:
    """Return whether a sentence is the expected one, in which `...` matches anything."""
    return re.fullmatch(".+?".join(map(re.escape, expected.split("..."))), sentence) is not None


def lay_out(folder: Path, bert: Path) -> None:
    """Write a valid job, its data and a link to its model."""
    (folder / "data").mkdir()
    for seed, (name, rows) in enumerate({"train": 40, "validation": 12}.items()):
        pq.write_table(example_table(rows, seed), folder / f"data/{name}.parquet", row_group_size=16)
    (folder / "model").symlink_to(bert)
    (folder / "job.yaml").write_text(JOB)
