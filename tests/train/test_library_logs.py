"""Ray's own lines: those that the launcher says better stay out of its output, all others pass."""

import pytest
import ray._private.worker as worker

from launcher.train.library_logs import silence_ray_messages


def test_known_lines_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # put back afterwards
    silence_ray_messages()
    silence_ray_messages()
    said = {
        "started": "WARNING: 8 PYTHON worker processes have been started on node: 61b7 with address: 192.0.2.2",
        "died": "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot",
        "memory": "1 Workers (tasks / actors) killed due to memory pressure (OOM)",
    }
    for line in said.values():
        worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    printed = capsys.readouterr().out
    assert said["memory"] in printed and said["started"] not in printed and said["died"] not in printed
