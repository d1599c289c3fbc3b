"""A process that was interrupted while it imported is not used again."""

import subprocess
import sys

_TASK = """
from launcher.data.process import whole_imports
for interrupted in {interrupted}:
    try:
        with whole_imports():
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("goes on", flush=True)
print("lives", flush=True)
"""


def _run(*interrupted: bool) -> tuple[int, list[str]]:
    code = _TASK.format(interrupted=interrupted)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout.split("\n")[:-1]


def test_before_its_first_task_is_done_it_ends() -> None:
    assert _run(True, False) == (1, [])


def test_afterwards_it_is_only_interrupted() -> None:
    assert _run(False, True, False) == (0, ["goes on", "lives"])
