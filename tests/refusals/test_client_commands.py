"""Unusable data and arguments of init, submit, kube and tasks: each is refused in one sentence."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.desk import Desk, Order, well


def _pipe(_: Desk) -> None:
    os.mkfifo("in.parquet")


def _rows(**columns: object) -> Callable[[Desk], None]:
    return lambda desk: desk.table("in.parquet", **columns)


def _elsewhere(_: Desk) -> None:
    """Write a job whose paths are valid on every node."""
    text = Path("job.yaml").read_text().replace("data/", "/shared/").replace("./model", "/shared/model")
    Path("job.yaml").write_text(text + "output: {storage: /shared/runs}\n")


ORDERS = [
    Order("init in.parquet --yes --output new.yaml", _pipe,
          "in.parquet cannot be listed (it is a device or a pipe, neither file nor directory); check the address, the "
          "network and your rights"),
    Order("init data --yes --output job.yaml/new.yaml", well,
          "--output job.yaml/new.yaml: nothing can be written to DESK/job.yaml; name a file elsewhere"),
    Order("init data --yes --output /proc/new.yaml", well,
          "--output /proc/new.yaml: cannot be written (...); name a file elsewhere"),
    Order("init data --yes --output new.yaml --label stars", well,
          "--label stars: data has no such column; it has text, label"),
    Order("init in.parquet --yes --output new.yaml", _rows(label=["a", "b"]),
          "in.parquet has the columns label (string): these are numbers and categories, and the launcher has no task "
          "for tables; if one is meant, name it: --task, --text COLUMN, --label COLUMN"),
    Order("submit job.yaml output.storage=runs", _elsewhere,
          "output.storage: runs is a relative path that is not packed with the job; give a URI or an absolute path on "
          "storage that all nodes share"),
    Order("submit job.yaml --command tarin", _elsewhere,
          "--command: 'tarin' is none of train, tune, evaluate, predict; give one of them"),
    Order("submit job.yaml --command predict", _elsewhere,
          "--command predict: needs its data and --output; write 'predict s3://in --output s3://out'"),
    Order("submit job.yaml --working-dir nowhere", well,
          "--working-dir: nowhere is not a directory; name the one to pack"),
    Order("submit job.yaml cluster.code=[helpers.py]", _elsewhere,
          "cluster.code: helpers.py is not in DESK; give an existing file or directory"),
    Order("submit job.yaml --address http://127.0.0.1:1", _elsewhere,
          "http://127.0.0.1:1: no Ray dashboard answers (ConnectionError); give --address http://HEAD:8265, or forward "
          "its port"),
    Order("kube render job.yaml", well,
          "job.yaml:10: cluster.kubernetes is missing; add it with at least an image: `kubernetes: {image: "
          "registry/launcher:0.1.0}`"),
    Order("tasks text-clasification", well,
          "task.type is text-clasification, which is not one of ...; did you mean text-classification?"),
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.words)
def test_a_wrong_command_is_one_sentence(order: Order, desk: Desk) -> None:
    desk.refuses_order(order)
