"""Events of a run: each a file of its own."""

from pathlib import Path

from launcher.rundir.directory import RunDir
from launcher.rundir.events import read_events, record_event


def test_a_file_that_a_killed_process_left_is_no_event(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    event = record_event(run, "worker-lost", 3, "rank 1 is gone")
    run.write_bytes("events/1-worker-lost.json.0123abcd.tmp", b"{")
    assert read_events(run) == (event,)
