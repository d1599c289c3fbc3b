"""The first window is encoded by the process that `warm_up` has prepared: a whole run on its own Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.spec.loader import dump_job
from tests.support.jobs import make_job, write_splits

pytestmark = [pytest.mark.ray, pytest.mark.long]

_MODULE = """\
import os

from launcher.tasks.text_classification import TextClassification


class Recording(TextClassification):
    def encode(self, rows, with_targets, noise=None):
        with open(os.environ["PYTHONPATH"].split(":")[0] + "/recorded", "a") as file:
            file.write(f"{os.getpid()} {len(rows)}\\n")
        return super().encode(rows, with_targets, noise)
"""


def test_the_first_window_is_encoded_by_the_warm_process(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "recording.py").write_text(_MODULE)
    data = write_splits(tmp_path / "data", 121)
    job = make_job(tiny_bert, data, tmp_path / "runs", task={"type": "recording:Recording", "max_length": 32})
    (tmp_path / "job.yaml").write_text(dump_job(job))
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "train", str(tmp_path / "job.yaml")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    recorded = [line.split() for line in (tmp_path / "recorded").read_text().splitlines()]
    (warm,) = [process for process, rows in recorded if rows == "8"]
    windows = [process for process, rows in recorded if rows == "44"]  # 4 steps of 11
    assert windows[0] == warm
