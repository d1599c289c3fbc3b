"""Ray's own lines: those that the launcher reports better are dropped, all others pass."""

import pytest
import ray._private.worker as worker

from launcher.driver.library_logs import silence_ray_messages


def test_known_lines_of_ray_are_dropped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # restored at the end
    silence_ray_messages()
    silence_ray_messages()
    lines = {
        "started": "WARNING: 8 PYTHON worker processes have been started on node: 61b7 with address: 192.0.2.2",
        "died": "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot",
        "memory": "1 Workers (tasks / actors) killed due to memory pressure (OOM)",
    }
    for line in lines.values():
        worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    printed = capsys.readouterr().out
    assert lines["memory"] in printed and lines["started"] not in printed and lines["died"] not in printed
