"""Jobs on a real cluster of four nodes, from outside: submit, follow, stop, go on, lose a node, tune; with a token.

The nodes share nothing but `/mnt`, as pods share a volume. KubeRay's own submitter line runs against the same cluster.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.network_namespaces import TOKEN, Netns, four_nodes, why_not

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

_LAUNCHER = (sys.executable, "-m", "launcher")
_JOB = """\
name: NAME
task: {type: text-classification, max_length: 32}
model: {name: /mnt/model, dropout: 0.0}
data:
  train: /mnt/data/train.parquet
  validation: /mnt/data/validation.parquet
  test: /mnt/data/test.parquet
  window_steps: 16
train: {epochs: EPOCHS, batch_size: 8, learning_rate: 1e-3, log_every_steps: 5}
evaluation: {every_steps: 200}
checkpoint: {every_minutes: null}
cluster: {workers: 2, cpus_per_worker: 1.5, grace_s: 45}
output: {storage: /mnt/runs}
"""
_EPOCHS = 6
_STEPS = 50 * _EPOCHS


@pytest.fixture(scope="module")
def cluster() -> Iterator[Netns]:
    """Start a Ray cluster that requires a token."""
    env = {
        # As a rendered pod has it, for the grace of these jobs.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "40",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }
    with four_nodes(env, AUTH="token", AUTH_TOKEN=TOKEN) as made:
        yield made


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Write a job file on the client."""
    return _job(tmp_path, "steady")


def _job(folder: Path, name: str, epochs: int = _EPOCHS, more: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(_JOB.replace("NAME", name).replace("EPOCHS", str(epochs)) + more)
    return path


def _outside(cluster: Netns, *words: str) -> list[str]:
    return cluster.outside(*_LAUNCHER, *words)


def _client(cluster: Netns, *words: str, timeout: float = 200) -> "subprocess.CompletedProcess[str]":
    """Run a launcher command on a machine outside of the cluster, with the cluster's token."""
    return cluster.run(_outside(cluster, *words), timeout, **_env(cluster))


def _env(cluster: Netns) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_API_SERVER_ADDRESS": cluster.dashboard}


def _steps(cluster: Netns, name: str) -> list[tuple[int, float]]:
    """Return (step, loss) of each line of a run's metrics, in the order of the file."""
    path = cluster.shared / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]


def _wait_for_step(cluster: Netns, name: str, step: int, timeout_s: float = 600) -> None:
    """Wait for a step; the first start may compile DeepSpeed's kernel, which takes minutes on a busy machine."""
    until = time.monotonic() + timeout_s
    while max((number for number, _ in _steps(cluster, name)), default=0) < step:
        assert time.monotonic() < until, f"{name}: no step {step} within {timeout_s} s"
        time.sleep(0.2)


def _hosts(cluster: Netns, name: str) -> list[str]:
    records = sorted((cluster.shared / "runs" / name / "workers").glob("rank-*.json"))
    return [json.loads(record.read_text())["host"] for record in records]


def _nodes_at_work(cluster: Netns) -> list[int]:
    """Return the nodes that run a train worker now."""
    count = "ps -eo args | grep -c '[R]ayTrainWorker'"
    return [node for node in (1, 2, 3) if int(cluster.run(cluster.inside(node, "bash", "-c", count)).stdout or 0)]


def test_without_the_token_nothing_is_sent(cluster: Netns, job: Path) -> None:
    for env, expected in (({}, "requires a token and got none"), ({"RAY_AUTH_TOKEN": "x" * 40}, "does not accept")):
        mode = {"RAY_AUTH_MODE": "token"} if env else {}
        done = cluster.run(
            _outside(cluster, "submit", str(job), "--address", cluster.dashboard), **env, **mode, HOME="/nonexistent"
        )
        assert done.returncode == 2
        assert expected in done.stderr and "RAY_AUTH_TOKEN" in done.stderr and done.stderr.count("\n") == 1


def test_a_stopped_job_saves_and_the_next_submission_goes_on(cluster: Netns, job: Path) -> None:
    """Stop by `jobs stop`, then lose a node by a pod's deletion; the curve is the uninterrupted one's (next test)."""
    follower = cluster.start(_outside(cluster, "submit", str(job), "--follow"), **_env(cluster))
    _wait_for_step(cluster, "steady", 20)
    second = _client(cluster, "submit", str(job))
    assert second.returncode == 2 and "works on this run now" in second.stderr
    began = time.monotonic()
    stopped = _client(cluster, "jobs", "stop", "steady")
    assert stopped.returncode == 0 and "STOPPED" in stopped.stdout, stopped
    assert time.monotonic() - began < 40, "the stop took the whole grace: it was a kill"
    shown, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, shown
    saved = int(re.search(r"stopped after step (\d+), which is saved", shown).group(1))
    assert list((cluster.shared / f"runs/steady/checkpoints/step-{saved:08d}").glob("*/manifest.json"))
    assert [step for step, _ in _steps(cluster, "steady")] == list(range(1, saved + 1))

    follower = cluster.start(_outside(cluster, "submit", str(job), "--follow"), **_env(cluster))
    _wait_for_step(cluster, "steady", saved + 20)
    working = _nodes_at_work(cluster)
    assert len(working) == 2
    cluster.tool("term", str(working[0]), "60")
    shown, _ = follower.communicate(timeout=240)
    assert follower.returncode == 0, shown
    assert f"resuming from step {saved}" in shown
    away = re.search(r"a node is preempted: step (\d+) is saved", shown)
    assert away is not None and int(away.group(1)) > saved, shown
    assert [step for step, _ in _steps(cluster, "steady")] == list(range(1, _STEPS + 1))
    assert len(set(_hosts(cluster, "steady"))) == 2
    cluster.tool("start", str(working[0]))
    status = _client(cluster, "jobs", "status", "steady")
    assert status.returncode == 0 and "SUCCEEDED" in status.stdout
    states = _client(cluster, "jobs", "list").stdout
    assert states.count("steady-train-") == 2 and "STOPPED" in states


def test_kuberays_submitter_does_the_same(cluster: Netns, tmp_path: Path) -> None:
    """Run the line that KubeRay runs for the rendered RayJob, on a node: the same run, never interrupted."""
    from tests.support.kubernetes_submitter import submitter_command

    kubernetes = (
        "  kubernetes:\n    image: test/launcher:1\n    volumes: {shared: {type: pvc, claim: shared, path: /mnt}}\n"
    )
    path = _job(tmp_path, "uninterrupted")
    path.write_text(path.read_text().replace("cluster: {workers: 2, cpus_per_worker: 1.5, grace_s: 45}\n",
                    "cluster:\n  workers: 2\n  cpus_per_worker: 1.5\n  grace_s: 45\n" + kubernetes))  # fmt: skip
    rendered = cluster.run([*_LAUNCHER, "kube", "render", str(path)])
    assert rendered.returncode == 0, rendered.stderr
    manifests = {line["kind"]: line for line in YAML(typ="safe").load_all(rendered.stdout)}
    (cluster.shared / "job.yaml").write_text(manifests["ConfigMap"]["data"]["job.yaml"])
    # What the kubelet would do: the ConfigMap at its place, in the pods alone.
    mounting = (
        "cp -a /etc /tmp/etc && mkdir -p /tmp/etc/launcher && cp /mnt/job.yaml /tmp/etc/launcher/"
        " && mount --bind /tmp/etc /etc"
    )
    for node in range(4):
        assert cluster.run(cluster.inside(node, "bash", "-c", mounting)).returncode == 0
    line = cluster.inside(1, *submitter_command(manifests["RayJob"], cluster.dashboard))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = cluster.run(line, 240, **token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"done: {_STEPS} steps" in done.stdout
    again = cluster.run(line, 60, **token)
    assert again.returncode == 0, "a retry of the submitter attaches to the job that is there"
    assert dict(_steps(cluster, "uninterrupted")) == pytest.approx(dict(_steps(cluster, "steady")), abs=1e-5)


@pytest.mark.long
def test_a_run_is_evaluated_and_predicts_where_it_is(cluster: Netns, job: Path) -> None:
    trained = _client(cluster, "submit", str(job), "--follow", timeout=300)  # nothing to do where it is
    assert trained.returncode == 0, trained.stdout + trained.stderr
    evaluated = _client(cluster, "submit", str(job), "--command", "evaluate --split validation", "--follow")
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert "60 rows; details in /mnt/runs/steady/scores-validation.json" in evaluated.stdout
    command = "predict /mnt/data/test.parquet --output /mnt/predictions"
    predicted = _client(cluster, "submit", str(job), "--command", command, "--follow")
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    assert "40 rows in /mnt/predictions" in predicted.stdout
    failed = _client(cluster, "submit", str(job), "--command", "evaluate --split none", "--follow")
    assert failed.returncode == 2 and "--split is none, which is not one of" in failed.stderr  # before it is sent


@pytest.mark.long
def test_a_sweep_uses_all_nodes(cluster: Netns, tmp_path: Path) -> None:
    more = "tune: {space: {train.learning_rate: {loguniform: [1e-4, 1e-2]}}, trials: 4, max_concurrent: 3}\n"
    path = _job(tmp_path, "sweep", epochs=2, more=more)
    overrides = ("cluster.workers=1", "evaluation.every_steps=50")
    done = _client(cluster, "submit", str(path), *overrides, "--command", "tune", "--follow", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = sorted((cluster.shared / "runs/sweep/sweep/trials").glob("*/trial.json"))
    assert len(trials) == 4
    assert (cluster.shared / "runs/sweep/sweep/best.yaml").exists()


@pytest.mark.long
def test_the_plain_way_of_ray_works(cluster: Netns, tmp_path: Path) -> None:
    """Run `ray job submit --working-dir . -- python -m launcher train x.yaml`, as the README has it."""
    _job(tmp_path, "plain", epochs=1)
    done = cluster.run(
        cluster.outside(
            "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", str(tmp_path), "--",
            "python", "-m", "launcher", "train", "plain.yaml",
        ), **_env(cluster),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step for step, _ in _steps(cluster, "plain")] == list(range(1, 51))
