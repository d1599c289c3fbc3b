"""The dashboard and the alerts query metrics that exist, by labels they have."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from launcher.train.loggers import prometheus

_FOLDER = Path(__file__).resolve().parents[3] / "cluster" / "monitoring"
_QUERY = re.compile(r"ray_(launcher_[a-z_]+)(?:\{([^}]*)\})?")
_LABELS = {prometheus.SCORE: {"run", "split", "metric"}, prometheus.FAILURES: {"run", "kind"}}


def _expressions() -> dict[str, str]:
    board = json.loads((_FOLDER / "grafana-dashboard.json").read_text())
    panels = {
        f"panel {panel['id']}{target['refId']} {panel['title']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", ())
    }
    rules = YAML(typ="safe").load((_FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
    return panels | {f"alert {rule['alert']}": rule["expr"] for rule in rules}


@pytest.mark.parametrize("where", _expressions())
def test_queried_metrics_and_labels_exist(where: str) -> None:
    for name, selectors in _QUERY.findall(_expressions()[where]):
        is_known = name in prometheus.GAUGES or name == prometheus.SCORE
        counter = name.removesuffix("_total")
        is_known |= name.endswith("_total") and (counter in prometheus.COUNTERS or counter == prometheus.FAILURES)
        assert is_known, f"{where}: nothing exports {name}"
        labels = set(re.findall(r"(\w+)=~?", selectors))
        assert labels <= _LABELS.get(counter, {"run"}), f"{where}: {name} has no such labels"


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name.removesuffix("_total") for text in _expressions().values() for name, _ in _QUERY.findall(text)}
    assert {*prometheus.GAUGES, *prometheus.COUNTERS, prometheus.SCORE, prometheus.FAILURES} - shown == {
        "launcher_epoch"
    }


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads((_FOLDER / "grafana-dashboard.json").read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's prometheus package)")
def test_promtool_accepts_the_rules() -> None:
    process = subprocess.run(
        ["promtool", "check", "rules", str(_FOLDER / "alerts.yaml")], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
