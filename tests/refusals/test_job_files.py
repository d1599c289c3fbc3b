"""Broken job files, and overrides that break valid ones: `launcher check` and `launcher train` refuse each.

The sentences of single keys are shown in `tests/spec/test_loader.py`.
"""

import gzip
import os
from pathlib import Path

import pytest

from tests.support.desk import Case, Desk, check_and

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(f'*{old}' for _ in range(9))}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
_CHECK = "check colons, indentation, brackets and quotes there"


def _instead(desk: Desk, content: bytes = b"", link: str = "") -> None:
    desk.file("job.yaml", content)
    if link:
        Path("job.yaml").unlink()
        Path("job.yaml").symlink_to(link)


def _windows() -> bytes:
    return Path("job.yaml").read_bytes().replace(b"\n", b"\r\n")


def _pipe(desk: Desk) -> None:
    Path("job.yaml").unlink()
    os.mkfifo("job.yaml")


def _broken_module(desk: Desk) -> list[str]:
    desk.file("broken_at_import.py", "1 / 0\n")
    desk.monkeypatch.syspath_prepend(".")
    return ["task.type=broken_at_import:Task"]


FILES = [
    Case("packed", lambda desk: _instead(desk, gzip.compress(b"name: first\n")),
         "job.yaml:1: byte 0x8b is not UTF-8; save the job file as UTF-8"),
    Case("a link to nowhere", lambda desk: _instead(desk, link="nowhere.yaml"),
         "job.yaml: there is no such file; check the path of the job file"),
    Case("a link to itself", lambda desk: _instead(desk, link="job.yaml"),
         "job.yaml: the job file cannot be read (Too many levels of symbolic links); check the path"),
    Case("a pipe", _pipe, "job.yaml: this is a device or a pipe, not a job file; name a YAML file"),
    Case("a device without end", lambda desk: _instead(desk, link="/dev/zero"),
         "job.yaml: this is a device or a pipe, not a job file; name a YAML file"),
    Case("two documents", lambda desk: _instead(desk, b"name: a\n---\nname: b\n"),
         "job.yaml:2:1: not valid YAML: found another document (expected a single document in the stream that began on "
         "line 1); keep one of the parts between ---"),
    Case("YAML of the future", lambda desk: _instead(desk, b"%YAML 9.9\n---\nname: b\n"),
         f"job.yaml:1:1: not valid YAML: found incompatible YAML document (version 1.* is required); {_CHECK}"),
    Case("aliases that make billions of values", lambda desk: _instead(desk, _BOMB.encode()),
         "job.yaml:1: not valid YAML: its aliases repeat more than 10000 values; write the values out, or fewer of "
         "them"),
    Case("a tab with Windows line ends", lambda desk: _instead(desk, _windows().replace(b"  epochs", b"\tepochs")),
         "job.yaml:8:1: not valid YAML: found character '\\t' that cannot start any token; indent with spaces"),
    Case("a merge key", lambda desk: desk.job("train:\n", "train:\n  <<: {epochs: 3}\n"),
         "job.yaml:8: train has a merge key <<, which job files do not support; write its keys out"),
    Case("a NUL in a path", lambda desk: desk.job("data/train.parquet", '"data/\\0.parquet"'),
         "job.yaml:5: data.train holds a NUL or half of a surrogate pair, which no file can store; remove it"),
    Case("more epochs than numbers", lambda desk: desk.job("epochs: 2", "epochs: 99999999999999999999999"),
         "job.yaml:8: train.epochs is 99999999999999999999999, which exceeds 64 bits; give a smaller number"),
    Case("more steps than a run may have", lambda desk: desk.job("epochs: 2", "epochs: 9_000_000_000"),
         "train.epochs: 9000000000 epochs of 5 steps are more than the 2147483647 steps a run may have; lower it, or "
         "set train.max_steps"),
    Case("a learning rate beyond all numbers", lambda desk: desk.job("  epochs: 2", "  learning_rate: 1e400"),
         "job.yaml:8: train.learning_rate is 1e400, which is not a finite number; give a number above 0"),
    Case("compiled code under ZeRO-3",
         lambda desk: desk.job("  batch_size: 8", "  batch_size: 8\n  compile: true\nparallel: {zero: 3}"),
         "job.yaml:7: the job file: train.compile is true and the ZeRO stage is 3, which gathers weights on the fly, "
         "and compiled code cannot; drop train.compile, or use parallel.zero: 2 without offload_parameters and "
         "offload_path"),
    Case("encoded rows in a bucket",
         lambda desk: desk.job("  train: data/train.parquet", "  train: data/train.parquet\n  cache: {path: s3://b/c}"),
         "job.yaml:6: data.cache.path is s3://b/c, but the cache needs many small reads; give a directory on the "
         "nodes"),
]  # fmt: skip

OVERRIDES = [
    Case("an item of a list", lambda desk: ["data.train[0]=a.parquet"],
         "override data.train[0]=a.parquet: data.train[0] is not a key of data; did you mean train?"),
    Case("a name with umlauts", lambda desk: ["name=läufe"],
         "override name=läufe: name is läufe, which is not made of at most 63 letters, digits, dots, dashes and "
         "underscores, with a letter or digit first; did you mean l-ufe?"),
    Case("a name without end", lambda desk: ["name=" + "a" * 300],
         "override name=aaa...: name is aaa..., which is not made of at most 63 letters, ...; choose another"),
    Case("a task that is nowhere", lambda desk: ["task.type=nowhere:Task"],
         "override task.type=nowhere:Task: task.type is nowhere:Task, which cannot be imported (No module named "
         "'nowhere'); put the module on PYTHONPATH"),
    Case("a task whose module fails", _broken_module,
         "override task.type=broken_at_import:Task: task.type is broken_at_import:Task, which cannot be imported "
         "(ZeroDivisionError: division by zero); fix the module broken_at_import"),
    Case("a task that is none", lambda desk: ["task.type=json:dumps"],
         "override task.type=json:dumps: task.type is json:dumps, which is not a task; see `launcher/tasks/base.py` "
         "for the protocol"),
    Case("a metric that the task has not", lambda desk: ["evaluation.metric=acuracy"],
         "evaluation.metric is acuracy, which is not one of accuracy, macro_f1, ...; did you mean accuracy?"),
    Case("a metric of another task", lambda desk: ["evaluation.metric=perplexity"],
         "evaluation.metric is perplexity, which is not one of accuracy, ...; choose one of them"),
    Case("input and label in one", lambda desk: ["task.label=text"],
         "task: column 'text' is both input and label, so there is nothing to learn; name two"),
    Case("one class for a classifier", lambda desk: ["task.labels=[a]"],
         "override task.labels=[a]: task.labels needs at least two names, each once; null reads them from ..."),
    Case("a conversation and a text at once", lambda desk: ["task={type: causal-lm, text: text, messages: chat}"],
         "override task={...: task.text and messages are both given, but a row is one of them; keep one"),
    Case("a key of another loss", lambda desk: ["task={type: preference, gamma: 0.5}"],
         "override task={...: task.gamma is for loss: simpo, and loss is dpo; drop gamma"),
    Case("a reference that nothing compares with",
         lambda desk: ["task={type: preference, loss: orpo, reference: gpt2}"],
         "override task={...: task.reference: loss orpo compares with no reference; drop reference"),
    Case("a prompt that takes all tokens", lambda desk: ["task={type: reward, max_length: 64, max_prompt_length: 64}"],
         "override task={...: task.max_prompt_length: 64 leaves nothing of max_length: 64 to the completion; lower it"),
    Case("an answer of nobody",
         lambda desk: ["task={type: causal-lm, prompt: text, response: label, answer_roles: []}"],
         "override task={...: task.answer_roles is [], which has fewer than 1 item; give a list, ..."),
]  # fmt: skip


@check_and("train", [*FILES, *OVERRIDES])
def test_a_broken_job_file_is_refused(command: str, case: Case, desk: Desk) -> None:
    desk.refuses_case(command, case)


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["BOM", "none"])
def test_windows_line_ends_and_byte_order_mark_are_read(mark: bytes, desk: Desk) -> None:
    _instead(desk, mark + _windows())
    assert desk.launcher("check", "job.yaml").code == 0
