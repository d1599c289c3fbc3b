"""cluster/ray-cluster*.yaml: Ray takes them, their commands are commands, and a spot notice drains the node."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli
from ruamel.yaml import YAML

_FOLDER = Path(__file__).resolve().parents[2] / "cluster"
_FILES = sorted(_FOLDER.glob("ray-cluster*.yaml"))


def _load(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def _commands(config: dict[str, Any]) -> list[str]:
    return [command for key, commands in config.items() if key.endswith("_commands") for command in commands]


def test_there_are_files() -> None:
    assert {path.stem for path in _FILES} == {"ray-cluster", "ray-cluster-onprem"}


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_ray_takes_it(path: Path) -> None:
    prepared = prepare_config(_load(path))
    validate_config(prepared)
    kinds = prepared["available_node_types"]
    assert prepared["max_workers"] >= sum(kind.get("min_workers", 0) for kind in kinds.values()) >= 2
    assert prepared["docker"]["container_name"] == "launcher"
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"] == {"/home/launcher/.ray/auth_token": "~/.ray/auth_token"}


def test_ray_takes_no_misspelt_key() -> None:
    """Show that the test above can fail."""
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config({**_load(_FOLDER / "ray-cluster.yaml"), "idle_timeout_minuts": 5}))


def test_the_head_takes_no_work() -> None:
    config = _load(_FOLDER / "ray-cluster.yaml")
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1].split()


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_its_commands_are_commands(path: Path) -> None:
    starts = 0
    for command in _commands(_load(path)):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        words = shlex.split(command)
        if words[:2] == ["ray", "start"]:
            starts += 1
            start = cli.commands["start"]
            start.make_context("start", words[2:], resilient_parsing=False)  # an option it does not know raises
    assert starts == 2


def _spot_notice(folder: Path) -> Path:
    """Return the script as the setup command writes it."""
    (command,) = _load(_FOLDER / "ray-cluster.yaml")["worker_setup_commands"]
    subprocess.run(["bash", "-c", command], check=True, env={**os.environ, "HOME": str(folder)})
    return folder / "spot-notice.sh"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (Debian: shellcheck)")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    done = subprocess.run(["shellcheck", str(_spot_notice(tmp_path))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_spot_notice_drains_the_node(tmp_path: Path) -> None:
    script = _spot_notice(tmp_path)
    fakes = {
        # The third look finds the notice; until then there is no such page.
        "wget": 'echo "wget $*" >> "$LOG"; case $* in */api/token) echo abc ;; '
        '*instance-action) [ "$(grep -c instance-action $LOG)" -ge 3 ] && echo \'{"action": "terminate"}\' ;; esac',
        "ray": 'echo "ray $*" >> "$LOG"',
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "LOOK_EVERY_S": "0.1",
        "RAY_ADDRESS": "10.0.0.10:6379",
    }  # fmt: skip
    subprocess.run(["bash", str(script)], env=env, check=True, timeout=30, capture_output=True)
    lines = log.read_text().splitlines()
    assert sum("instance-action" in line for line in lines) == 3
    assert "X-aws-ec2-metadata-token: abc" in lines[-2]
    words = shlex.split(lines[-1])
    assert words[:2] == ["ray", "drain-node"] and words[2] == "--address=10.0.0.10:6379"
    options = [word.split("=", 1)[0] for word in words[2:] if word.startswith("--")]
    known = [option for parameter in cli.commands["drain-node"].params for option in parameter.opts]
    assert set(options) <= set(known)
    assert "--reason=DRAIN_NODE_REASON_PREEMPTION" in words and "--deadline-remaining-seconds=110" in words
