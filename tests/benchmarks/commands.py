"""Commands that benchmarks start and compare: their environment, log and last line. Runs on the client."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SST2 = ROOT.parent / "shared" / "data" / "text-classification" / "sst2"
MODEL = ROOT / "data" / "quickstart" / "model"
"""MiniLM-L6; `get_model` makes the directory."""

# One thread per process, as torchrun and the launcher have it on two cores.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "RAY_AUTH_MODE": "disabled",
}  # fmt: skip


def get_model() -> None:
    """Make `MODEL`, if it is not there yet; what the script prints goes to standard error."""
    subprocess.run([sys.executable, str(ROOT / "jobs" / "quickstart" / "prepare.py")], check=True, stdout=sys.stderr)


def empty_folder(path: Path) -> Path:
    """Return an empty directory as an absolute path; what was in it is removed."""
    path = path.resolve()
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def torchrun(workers: int, *words: object, python: Path = Path(sys.executable)) -> list[str]:
    """Return the command that starts a script and its arguments in `workers` processes."""
    command = [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
    return [*command, *map(str, words)]


def call(command: list[str], log: Path, env: Mapping[str, str] = ENVIRONMENT) -> str:
    """Run a command in the repository's root and return its output; messages go to the log, then the output too."""
    with log.open("w", encoding="utf-8") as messages:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=messages, text=True, check=False
        )
        messages.write(done.stdout)
    if done.returncode != 0:
        end = log.read_text(encoding="utf-8")[-3000:]
        sys.exit(f"{end}\nerror: exit code {done.returncode}, see {log}: {' '.join(command)}")
    return done.stdout


def last_object(output: str) -> dict[str, Any]:
    """Parse the JSON object on the last line of an output."""
    parsed: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return parsed
