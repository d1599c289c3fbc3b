"""The command line of KubeRay's submitter, and what a shell makes of it."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.spec.loader import load_job
from launcher.submit.kubernetes.render import objects
from tests.support.kubernetes_submitter import JOB_ID, go_quoted, submitter_command


def _submitted(rayjob: dict[str, Any], folder: Path) -> list[list[str]]:
    """Run the submitter's line with stand-ins for `ray` and `python3`; the argv of each call of `ray`."""
    (folder / "ray").write_text(
        f"#!{shlex.quote('/usr/bin/env')} python3.real\nimport json, sys\n"
        f"open({str(folder / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "sys.exit(1 if sys.argv[2] == 'status' else 0)\n"
    )
    (folder / "python3").write_text("#!/bin/sh\nexit 0\n")
    (folder / "python3.real").symlink_to("/usr/bin/python3")
    for name in ("ray", "python3"):
        (folder / name).chmod(0o755)
    command = submitter_command(rayjob, "head-svc:8265")
    subprocess.run(command, check=True, env={"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/submitter"}, timeout=30)
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_the_line_has_kuberays_words(rayjob: dict[str, Any]) -> None:
    bash, flags, end, line = submitter_command(rayjob, "head-svc:8265")
    assert (bash, flags, end) == ("/bin/bash", "-ce", "--")
    wait, _, rest = line.partition("done ; ")
    assert wait.startswith("until python3 -c ") and "http://head-svc:8265/api/gcs_healthz" in wait
    metadata = r'"{\"launcher.command\":\"train\",\"launcher.run\":\"sst2\",\"launcher.storage\":\"s3://bucket/runs\"}"'
    assert rest == (
        f"if ! ray job status --address http://head-svc:8265 {JOB_ID} >/dev/null 2>&1 ; then "
        "ray job submit --address http://head-svc:8265 --no-wait "
        r'--runtime-env-json "{\"env_vars\":{\"RAY_JOB_STOP_WAIT_TIME_S\":\"60\"}}" '
        f"--metadata-json {metadata} --submission-id {JOB_ID} "
        "-- exec python -m launcher train /etc/launcher/job.yaml ; fi ; "
        f"ray job logs --address http://head-svc:8265 --follow {JOB_ID}"
    )


def test_a_shell_hands_the_words_on(rayjob: dict[str, Any], tmp_path: Path) -> None:
    status, submit, logs = _submitted(rayjob, tmp_path)
    assert status[:2] == ["job", "status"] and logs[:2] == ["job", "logs"]
    assert submit[submit.index("--") + 1 :] == ["exec", "python", "-m", "launcher", "train", "/etc/launcher/job.yaml"]
    assert json.loads(submit[submit.index("--runtime-env-json") + 1]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    }


@pytest.mark.parametrize(
    "prepare",
    ["python prepare.py", "echo $HOME && ls *.py > files", "echo 'it''s' \"$USER\" `hostname`", "a=b; ! test -e '#'"],
)
def test_what_prepares_reaches_the_driver_as_it_was_written(job_file: Path, tmp_path: Path, prepare: str) -> None:
    job = load_job(job_file, [f"cluster.prepare={json.dumps(prepare)}"])
    _, submit, _ = _submitted(objects(job, "tune", "job")[1], tmp_path)
    line = f"{prepare} && exec python -m launcher tune /etc/launcher/job.yaml"
    # `ray job submit` joins the words again with shlex.join, and the driver's shell reads that.
    assert submit[submit.index("--") + 1 :] == ["sh", "-c", line]


def test_a_driver_on_a_worker_asks_for_a_cpu(job_file: Path) -> None:
    rayjob = objects(load_job(job_file, ["cluster.driver=worker"]), "train", "job")[1]
    assert " --entrypoint-num-cpus 1.000000 -- exec python " in submitter_command(rayjob, "head-svc:8265")[-1]


def test_quotes_are_gos() -> None:
    assert go_quoted('a "b" \\ $c\n') == '"a \\"b\\" \\\\ $c\\n"'
