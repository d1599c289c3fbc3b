"""Job files: what loads, what is refused in which sentence, and that `dump_job` and `load_job` are inverse."""

import json
import pickle
from collections.abc import Callable, Sequence
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator, model_validator
from ruamel.yaml import YAML

from launcher.errors import ModelError, SpecError
from launcher.spec.base import Section
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job, load_job
from launcher.spec.messages import not_one_of
from launcher.spec.schema import job_schema
from tests.support.job_loader import Load

JOB = """\
name: sst2
seed: 7
task:
  type: classify
  labels: [bad, good]
model:
  name: models/minilm
data:
  train: data/train.parquet
train:
  batch_size: 64
  schedule:
    type: cosine
"""


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


class ByCount(Section):
    type: Literal["count"] = "count"
    count: int = Field(default=1, ge=1)


class ByName(Section):
    type: Literal["name"] = "name"
    pattern: str = ".*"


class Head(Section):
    width: int
    inner: "Head | None" = None


class ClassifyParams(Section):
    """Parameters of a task, with one field for each kind of error."""

    labels: list[str]
    """Names of the classes; in the order of their numbers."""
    length: int | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.9, 0.99)
    head: Head | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    by_number: dict[int, str] = Field(default_factory=dict)
    rule: Annotated[ByCount | ByName, Field(discriminator="type")] | None = None
    pair: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    since: date | None = None
    size: Size = Size.SMALL
    code: Annotated[str, Field(max_length=3)] = "a"
    step: Annotated[int, Field(multiple_of=8, le=64)] = 8
    odd: int = 1

    @field_validator("odd")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"odd is {value}, which is even;\n add 1")
        return value

    @model_validator(mode="after")
    def _labels_differ(self) -> "ClassifyParams":
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels holds a name twice; remove one")
        return self


class LooseParams(BaseModel):
    """Parameters without an `extra` setting, so that pydantic ignores unknown keys."""

    labels: int = 1


def params_of(type_name: str, /) -> type[BaseModel]:
    tasks: dict[str, type[BaseModel]] = {"classify": ClassifyParams, "loose": LooseParams}
    if type_name == "broken":
        raise ModelError("task.type is broken,\nwhich cannot be imported; install it")
    if type_name not in tasks:
        raise SpecError((not_one_of("task.type", type_name, list(tasks)),))
    return tasks[type_name]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)
    return Load(params_of)


# Reading


def test_a_job_file_is_loaded(load: Load) -> None:
    job = load.job(JOB)
    assert (job.name, job.seed, job.model.name) == ("sst2", 7, "models/minilm")
    assert job.data.train == ("data/train.parquet",)
    assert job.train.schedule.type == "cosine"
    assert job.task.parameters() == {"labels": ["bad", "good"]}  # as written: without defaults of the task


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2e-5", 2e-5),
        ("1_000", 1000),
        ("0o17", 15),
        ("off", "off"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("=", "="),
        ("-_", "-_"),
        ("'3'", "3"),
        ("~", None),
        ("true", True),
        ("9" * 5000, "9" * 5000),
        ("|\n    a\n    b\n", "a\nb\n"),
        ("{0: zero, true: one}", {"0": "zero", "true": "one"}),
    ],
)
@pytest.mark.usefixtures("load")
def test_values_are_read_as_yaml_1_2(written: str, read: object) -> None:
    Path("job.yaml").write_text(JOB.replace("[bad, good]", written))
    value = load_job("job.yaml").task.parameters()["labels"]
    assert value == read
    assert type(value) is type(read)


def test_anchors_are_read_and_may_be_defined_twice(load: Load) -> None:
    job = load.job("x: &a 1\n".replace("x:", "seed:") + JOB.replace("seed: 7\n", "").replace("64", "*a"))
    assert job.train.batch_size == 1
    text = JOB.replace("7", "&a 7").replace("64", "&a 64")
    assert load.job(text).train.batch_size == 64


def test_a_byte_order_mark_is_ignored(load: Load) -> None:
    assert load.job("\ufeff" + JOB).name == "sst2"


def test_number_keys_reach_the_task_as_text(load: Load) -> None:
    job = load.job(JOB, "task.by_number={0: zero, 1: one}")
    assert job.task.parameters()["by_number"] == {"0": "zero", "1": "one"}
    assert ClassifyParams.model_validate(job.task.parameters()).by_number == {0: "zero", 1: "one"}


# Files that are not job files


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "job.yaml: the job file is empty; it needs at least name, task, model and data"),
        ("# soon\n", "job.yaml: the job file is empty; it needs at least name, task, model and data"),
        ("- a\n", "job.yaml: the job file is a list, not a mapping; write it as lines of `key: value`"),
        ("sst2\n", "job.yaml: the job file is sst2, not a mapping; write it as lines of `key: value`"),
        ("name: a: b\n",
         "job.yaml:1:8: not valid YAML: mapping values are not allowed here; "
         "check colons, indentation, brackets and quotes there"),
        ("name: x\n\tseed: 1\n",
         "job.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ("name: [x\nseed: 1\n",
         "job.yaml:2:5: not valid YAML: expected ',' or ']', but got ':' "
         "(while parsing a flow sequence that began on line 1); "
         "check colons, indentation, brackets and quotes there"),
        ("data: *.parquet\n",
         "job.yaml:1:7: not valid YAML: found undefined alias '.parquet'; put text that starts with * in quotes"),
        ("name: x\nseed: \x07\n",
         "job.yaml:2: not valid YAML: character #x0007 is not allowed; "
         "check colons, indentation, brackets and quotes there"),
        ("a: " + "[" * 1000,
         "job.yaml:1: not valid YAML: it is nested too deeply; check colons, indentation, brackets and quotes there"),
        ("!!set {a}\n", "job.yaml:1: the job file has the YAML tag !!set, which is not known; remove the tag"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_job_file_is_one_sentence(load: Load, text: str, problem: str) -> None:
    assert load.problems(text) == [problem]


@pytest.mark.usefixtures("load")
def test_an_unreadable_file_is_one_sentence() -> None:
    Path("jobs").mkdir()
    Path("latin.yaml").write_bytes(b"name: x\nseed: \xff\n")
    sentences = {
        "none.yaml": "none.yaml: there is no such file; check the path of the job file",
        "jobs": "jobs: this is a directory, not a job file; name a YAML file in it",
        "latin.yaml": "latin.yaml:2: byte 0xff is not UTF-8; save the job file as UTF-8",
        "latin.yaml/x": "latin.yaml/x: the job file cannot be read (Not a directory); check the path",
    }
    for path, sentence in sentences.items():
        with pytest.raises(SpecError) as caught:
            load_job(path)
        assert caught.value.problems == (sentence,)


def test_duplicate_keys_tags_and_loops_are_reported_with_the_other_problems(load: Load) -> None:
    text = JOB.replace("seed: 7", "seed: 7\nname: again").replace("64", "0\n  batch_size: 3")
    text = text.replace("bad, good", "!x bad, good").replace("name: models/minilm", "name: m\n  ? [a]\n  : b")
    assert load.problems(text + "output: &o\n  storage: [*o]\n") == [
        "job.yaml:3: name is given twice, first on line 1; keep one of them",
        "job.yaml:6: task.labels[0] has the YAML tag !x, which is not known; remove the tag",
        "job.yaml:9: a key of model is not text; write it as `key: value`",
        "job.yaml:14: train.batch_size is 0, which is below 1; give a whole number of at least 1",
        "job.yaml:15: train.batch_size is given twice, first on line 14; keep one of them",
        # An alias has no line of its own; the loop begins where the anchor stands.
        "job.yaml:18: output.storage[0] contains itself; write it without the alias",
        "job.yaml:19: output.storage is [null], which is not text; give text that is not empty",
    ]


# Wrong values


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.bach_size=3", "train.bach_size is not a key of train; did you mean batch_size?"),
        ("train.lr=3", "train.lr is not a key of train; did you mean learning_rate?"),
        ("train.max-steps=3", "train.max-steps is not a key of train; did you mean max_steps?"),
        ("learning_rate=3", "learning_rate is not a key of the job file; learning_rate belongs to train"),
        ("model.seed=3", "model.seed is not a key of model; seed belongs to the top of the job file"),
        ("train.beta1=0.5", "train.beta1 is not a key of train; beta1 belongs to train.optimizer"),
        ("train.labels=0", "train.labels is not a key of train; labels belongs to task"),
        ("data.batch_size=1", "data.batch_size is not a key of data; batch_size belongs to train or evaluation"),
        ("train.schedule.warmup=0",
         "train.schedule.warmup is not a key of train.schedule; did you mean warmup_fraction?"),
        ("output.xyz=0", "output.xyz is not a key of output; the keys allowed there: storage"),
        ("task.lables=0", "task.lables is not a key of task; did you mean labels?"),
        ("parallel.zero=5", "parallel.zero is 5, which is not one of auto, 0, 1, 2, 3; choose one of them"),
        ("train.precision=FP61", "train.precision is FP61, which is not one of fp32, bf16, fp16; did you mean fp16?"),
        ("train.optimizer.type=lion",
         "train.optimizer.type is lion, which is not one of adamw, sgd, adafactor, adamw_8bit; choose one of them"),
        ("train.schedule.type=foo",
         "train.schedule.type is foo, which is not one of constant, linear, cosine; choose one of them"),
        ("train.schedule={}", "train.schedule.type is missing; choose one of constant, linear, cosine"),
        ("train.schedule=linear", "train.schedule is linear, which is not a section; write {type: linear}"),
        ("train.schedule=3",
         "train.schedule is 3, which is not a section; give it the key type, one of constant, linear, cosine"),
        ("checkpoint=3",
         "checkpoint is 3, which is not a section; give it keys of its own (every_steps, every_minutes, keep_last, "
         "background, on_failure)"),
        ("output=", "output is empty, which is not a section; give it keys of its own (storage) or remove it"),
        ("task.head=3", "task.head is 3, which is not a section; give it keys of its own (width, inner)"),
        ("train.epochs=0", "train.epochs is 0, which is below 1; give a whole number of at least 1"),
        ("train.epochs=abc", "train.epochs is abc, which is not a whole number; give a whole number of at least 1"),
        ("train.epochs=1.5", "train.epochs is 1.5, which is not a whole number; give a whole number of at least 1"),
        ("train.epochs=", "train.epochs is empty; give a whole number of at least 1"),
        ("train.epochs=[1, 2]",
         "train.epochs is [1, 2], which is not a whole number; give a whole number of at least 1"),
        ("train.learning_rate=0.0", "train.learning_rate is 0.0, which is not above 0; give a number above 0"),
        ("train.learning_rate=fast", "train.learning_rate is fast, which is not a number; give a number above 0"),
        ("data.window_steps=1_000_000",
         "data.window_steps is 1_000_000, which is above 4096; give a whole number of at least 1 and at most 4096"),
        ("model.dropout=1",
         "model.dropout is 1, which is not below 1; give a number of at least 0 and below 1, or null"),
        ("model.dropout=.nan",
         "model.dropout is .nan, which is not a finite number; give a number of at least 0 and below 1, or null"),
        ("model.revision=1234e56", "model.revision is 1234e56, which is not text; put it in quotes"),
        ("model.name=[a]", 'model.name is ["a"], which is not text; give text'),
        ("model.name=''", "model.name is missing; give a model directory or Hub name, or a from_config"),
        ("train.deterministic=maybe", "train.deterministic is maybe, which is not true or false; choose one of them"),
        ("train.epochs=true", "train.epochs is true, which is not a whole number; give a whole number of at least 1"),
        ("train.max_steps=false",
         "train.max_steps is false, which is not a whole number; give a whole number of at least 1, or null"),
        ("train.learning_rate=true", "train.learning_rate is true, which is not a number; give a number above 0"),
        ("train.schedule={type: cosine, warmup_fraction: true}",
         "train.schedule.warmup_fraction is true, which is not a number; give a number of at least 0 and at most 1"),
        ("parallel.zero=true", "parallel.zero is true, which is not one of auto, 0, 1, 2, 3; choose one of them"),
        ("parallel.zero='2'", 'parallel.zero is the text "2"; write 2 without quotes'),
        ("name=true", "name is true, which is not text; put it in quotes"),
        ("task.betas=[0.5, true]", "task.betas[1] is true, which is not a number; give one"),
        ("task.head={width: true}", "task.head.width is true, which is not a whole number; give one"),
        ("task.rule={type: count, count: true}",
         "task.rule.count is true, which is not a whole number; give a whole number of at least 1"),
        ("task.weights={a: true}", "task.weights.a is true, which is not a number; give one"),
        ("data.train=''", 'data.train[0] is "", which has fewer than 1 character; give text that is not empty'),
        ("data.train=hub:a/b/c/d#x",
         "data.train[0]: hub:a/b/c/d#x has 4 parts; "
         "write hub:NAME#SPLIT, hub:ORG/NAME#SPLIT or hub:ORG/NAME/CONFIG#SPLIT"),
        ("data.validation=[a, 3]", "data.validation[1] is 3, which is not text; put it in quotes"),
        ("name=my run",
         'name is "my run", which is not made of at most 63 letters, digits, dots, dashes and underscores, '
         "with a letter or digit first; did you mean my-run?"),
        ("name=..",
         "name is .., which is not made of at most 63 letters, digits, dots, dashes and underscores, "
         "with a letter or digit first; choose another"),
        ("cluster.pass_env=[A-B]",
         "cluster.pass_env[0] is A-B, which is not made of letters, digits and underscores, with no digit first; "
         "did you mean A_B?"),
        ("parallel={zero: 2, offload_parameters: true}",
         "parallel.offload_parameters needs zero: 3, not 2; set zero: 3 or drop offload_parameters"),
        ("parallel={offload_path: /mnt/nvme}",
         "parallel.offload_path is for offloaded optimizer states, and offload_optimizer is false; set "
         "offload_optimizer: true or drop offload_path"),
        ("parallel={offload_path: /mnt/nvme, offload_optimizer: true, zero: 2}",
         "parallel.offload_path needs zero: 3, not 2; set zero: 3 or drop offload_path"),
        ("parallel={offload_path: s3://bucket/states, offload_optimizer: true}",
         "parallel.offload_path is s3://bucket/states, which is not an absolute path; give a directory on a "
         "local disk of every node (/mnt/nvme)"),
        ("task={}",
         "task.type is missing; add type to task (Name of a built-in task (text-classification), "
         "or import path of your own (package.module:Task))"),
        ("task.type=3", "task.type is 3, which is not text; put it in quotes"),
        ("task=", "task is empty, which is not a section; give it keys of its own (type)"),
        ("task.length=abc", "task.length is abc, which matches none of the allowed forms; give a whole number or auto"),
        ("task.betas=[1]", "task.betas has too few items; give a list of 2: a number, a number"),
        ("task.betas=[1, x]", "task.betas[1] is x, which is not a number; give one"),
        ("task.head={}", "task.head.width is missing; add width to task.head"),
        ("task.head={width: x}", "task.head.width is x, which is not a whole number; give one"),
        ("task.head={width: 1, inner: {width: x}}",
         "task.head.inner.width is x, which is not a whole number; give one"),
        ("task.weights={a: b}", "task.weights.a is b, which is not a number; give one"),
        ("task.weights=3", "task.weights is 3, which is not a mapping; give a section"),
        ("task.by_number={a: b}", "task.by_number.a is a, which is not a whole number; give one"),
        ("task.rule={type: size}", "task.rule.type is size, which is not one of count, name; choose one of them"),
        ("task.rule={type: count, count: 0}",
         "task.rule.count is 0, which is below 1; give a whole number of at least 1"),
        ("task.pair=[a]",
         'task.pair is ["a"], which has fewer than 2 items; '
         "give a list, each item text, at least 2 of them, or null"),
        ("task.pair=[a, 3]", "task.pair[1] is 3, which is not text; put it in quotes"),
        ("task.code=abcd", "task.code is abcd, which has more than 3 characters; give text"),
        ("task.size=tiny", "task.size is tiny, which is not one of small, large; choose one of them"),
        ("task.step=9",
         "task.step is 9, which is refused (input should be a multiple of 8); give a whole number of at most 64"),
        ("task.labels=[a, a]", "task.labels holds a name twice; remove one"),
        ("task.odd=2", "task.odd is 2, which is even; add 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_sentence(load: Load, override: str, problem: str) -> None:
    assert load.problems(JOB, override) == [f"override {override}: {problem}"]


def test_errors_that_only_a_task_can_raise_keep_the_words_of_pydantic(load: Load) -> None:
    (problem,) = load.problems(JOB, "task.since=soon")
    assert problem.startswith("override task.since=soon: task.since is soon, which is refused (")
    assert problem.endswith("); give a date, or null")


def test_a_missing_key_is_reported_at_the_line_of_its_section(load: Load) -> None:
    text = JOB.replace("  labels: [bad, good]\n", "").replace("  name: models/minilm\n", "  trust_remote_code: off\n")
    assert load.problems(text.replace("data:\n  train: data/train.parquet\n", "")) == [
        "job.yaml:1: data is missing; add data to the job file "
        "(Where the rows come from and in which order they are read)",
        "job.yaml:3: task.labels is missing; add labels to task (Names of the classes)",
        "job.yaml:5: model.name is missing; give a model directory or Hub name, or a from_config",
    ]


def test_all_problems_are_reported_at_once_in_line_order(load: Load) -> None:
    text = JOB.replace("seed: 7", "seed: -7").replace("[bad, good]", "3").replace("batch_size", "bach_size")
    assert load.problems(text + "parallel: {zero: 5}\n", "train.epochs=0", "nothing") == [
        "job.yaml:2: seed is -7, which is below 0; give a whole number of at least 0 and below 2147483648",
        "job.yaml:5: task.labels is 3, which is not a list; give a list, each item text",
        "job.yaml:11: train.bach_size is not a key of train; did you mean batch_size?",
        "job.yaml:14: parallel.zero is 5, which is not one of auto, 0, 1, 2, 3; choose one of them",
        "override train.epochs=0: train.epochs is 0, which is below 1; give a whole number of at least 1",
        "override nothing: there is no = in it; write it as key.path=value, for example train.epochs=3",
    ]


def test_an_unknown_key_without_a_similar_one_lists_the_keys(load: Load) -> None:
    assert load.problems(JOB + "zzz: 1\n") == [
        "job.yaml:14: zzz is not a key of the job file; the keys allowed there: name, seed, task, model, data, train, "
        "evaluation, checkpoint, fault_tolerance, parallel, cluster, output, logging, tune"
    ]


def test_a_rule_between_keys_is_reported_at_the_override_that_broke_it(load: Load) -> None:
    text = JOB + "parallel:\n  zero: 3\n  offload_parameters: true\n"
    sentence = "parallel.offload_parameters needs zero: 3, not 1; set zero: 3 or drop offload_parameters"
    assert load.problems(text, "parallel.zero=1") == [f"override parallel.zero=1: {sentence}"]
    assert load.problems(text.replace("zero: 3", "zero: 1")) == [f"job.yaml:16: {sentence}"]


def test_long_and_multi_line_values_are_shortened_to_one_line(load: Load) -> None:
    (problem,) = load.problems(JOB.replace("sst2", '"a\\nb' + "x" * 500 + '"'))
    assert "\n" not in problem
    assert 'name is "a\\nbxxx' in problem
    assert len(problem) < 250


# The task


def test_an_unknown_task_is_reported_with_the_other_problems(load: Load) -> None:
    assert load.problems(JOB.replace("64", "0"), "task.type=clasify") == [
        "job.yaml:11: train.batch_size is 0, which is below 1; give a whole number of at least 1",
        "override task.type=clasify: task.type is clasify, which is not one of classify, loose; did you mean classify?",
    ]
    assert load.problems(JOB, "task.type=broken") == [
        "override task.type=broken: task.type is broken, which cannot be imported; install it"
    ]


def test_unknown_keys_are_reported_even_if_the_task_model_ignores_them(load: Load) -> None:
    text = JOB.replace("classify", "loose").replace("labels: [bad, good]", "labels: 3\n  speed: 3")
    assert load.problems(text) == ["job.yaml:6: task.speed is not a key of task; the keys allowed there: type, labels"]


@pytest.mark.usefixtures("load")
def test_without_params_of_the_task_is_not_validated() -> None:
    Path("job.yaml").write_text(JOB.replace("classify", "whatever"))
    assert load_job(Path("job.yaml")).task.type == "whatever"


# Overrides


def test_overrides_are_yaml_create_sections_and_the_last_one_wins(load: Load) -> None:
    job = load.job(
        JOB,
        "train.learning_rate=3e-5",
        "train.learning_rate=4e-5",
        "evaluation.patience=3",
        "data.validation=[a.parquet, 'b c.parquet']",
        "data.train=hub:glue/sst2#train",
        "train.optimizer={beta1: 0.5}",
        "train.optimizer.beta2 = 0.6",
        "task.head.width=8",
        "train.max_grad_norm=",
    )
    assert job.train.learning_rate == 4e-5
    assert job.evaluation.patience == 3
    assert job.data.validation == ("a.parquet", "b c.parquet")
    assert job.data.train == ("hub:glue/sst2#train",)
    assert (job.train.optimizer.beta1, job.train.optimizer.beta2) == (0.5, 0.6)
    assert job.task.parameters()["head"] == {"width": 8}
    assert job.train.max_grad_norm is None
    assert load.job(JOB, "train.epochs='8'", "train.learning_rate=1").train.epochs == 8
    assert load.job(JOB.replace("train:\n  batch", "evaluation:\ntrain:\n  batch"), "evaluation.patience=1")


def test_an_override_fixes_an_invalid_file(load: Load) -> None:
    text = JOB.replace("type: cosine", "type: cosin").replace("64", "0")
    assert load.job(text, "train.schedule.type=linear", "train.batch_size=8").train.batch_size == 8


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("foo", "there is no = in it; write it as key.path=value, for example train.epochs=3"),
        ("", "there is no = in it; write it as key.path=value, for example train.epochs=3"),
        ("=3", "there is an empty key before the =; write it as key.path=value, for example train.epochs=3"),
        ("train..x=3", "there is an empty key before the =; write it as key.path=value, for example train.epochs=3"),
        ("name.x=3", "name is sst2, which has no keys of its own; override name as a whole"),
        ("task.labels.0=x",
         'task.labels is ["bad", "good"], which has no keys of its own; override task.labels as a whole'),
        ("data.train=*.parquet",
         "the value is not valid YAML: found undefined alias '.parquet'; put the value in quotes"),
        ("train.epochs=!x 3", "train.epochs has the YAML tag !x, which is not known; remove the tag"),
        ("train={epochs: 1, epochs: 2}", "train.epochs is given twice, first on line 1; keep one of them"),
    ],
)  # fmt: skip
def test_a_malformed_override_is_one_sentence(load: Load, override: str, problem: str) -> None:
    assert f"override {override}: {problem}" in load.problems(JOB, override)


def test_problems_survive_pickling(load: Load) -> None:
    with pytest.raises(SpecError) as caught:
        load.job(JOB, "train.epochs=0")
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


# Dumping


def test_a_dumped_job_is_block_yaml_in_the_order_of_the_model(load: Load) -> None:
    text = dump_job(load.job(JOB, "task.since=2024-01-31", r'task.code="a\nb"'))
    sections = [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert sections == list(JobSpec.model_fields)
    assert "\n  labels:\n    - bad\n    - good\n" in text
    assert "\n  code: |-\n    a\n    b\n" in text
    assert "\n  max_steps: null\n" in text
    assert "\n  learning_rate: 2e-05\n" in text


EXACT = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
TRICKY = st.sampled_from(
    ["off", "null", "2e-5", "0o17", "2024-01-31", "a: b", "- x", "#", "<<", "=", " a\n b ", "\n", "a\n"]
)
COUNTS = st.integers(min_value=1, max_value=4096)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | EXACT | WORDS | TRICKY | st.just(""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | TRICKY, inner, max_size=3),
    max_leaves=8,
)


def section(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=fields)


def positive() -> st.SearchStrategy[float]:
    return st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


def jobs() -> st.SearchStrategy[dict[str, Any]]:
    """Draw valid job files as values, with locations as lists."""
    locations = st.lists(WORDS | TRICKY, min_size=1, max_size=3)
    decay = st.floats(min_value=0, max_value=1, exclude_max=True)
    warmup = st.floats(min_value=0, max_value=1)
    kind = st.sampled_from(["constant", "linear", "cosine"])
    params = st.dictionaries((WORDS | TRICKY).filter(lambda key: key != "type"), VALUES, max_size=3)
    train = section(
        epochs=COUNTS,
        max_steps=st.none() | COUNTS,
        learning_rate=positive(),
        optimizer=section(type=st.just("adamw"), beta1=decay, eps=positive()),
        schedule=st.fixed_dictionaries({"type": kind}, optional={"warmup_fraction": warmup}),
        max_grad_norm=st.none() | positive(),
        precision=st.sampled_from(["fp32", "bf16"]),  # fp16 refuses stage 0
        deterministic=st.booleans(),
    )
    data = st.fixed_dictionaries(
        {"train": locations}, optional={"validation": st.none() | locations, "window_steps": COUNTS}
    )
    return st.fixed_dictionaries(
        {
            "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"),
            "task": st.builds(lambda name, rest: {"type": name, **rest}, WORDS | TRICKY, params),
            "model": st.fixed_dictionaries({"name": WORDS}, optional={"revision": st.none() | WORDS | TRICKY}),
            "data": data,
        },
        optional={
            "seed": st.integers(min_value=0, max_value=2**31 - 1),
            "train": train,
            "evaluation": section(metric=st.none() | WORDS, patience=st.none() | COUNTS),
            "checkpoint": section(every_minutes=st.none() | positive()),
            "parallel": section(zero=st.integers(min_value=0, max_value=3), micro_batch=st.none() | COUNTS),
            "cluster": section(
                address=st.none() | WORDS,
                cpus_per_worker=positive(),
                pass_env=st.lists(st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]*\Z"), max_size=3),
            ),
            "output": section(storage=WORDS),
        },
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs") / "job.yaml"


PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROPERTY
@given(values=jobs())
def test_a_dumped_job_loads_as_the_same_job(file: Path, values: dict[str, Any]) -> None:
    job = JobSpec.model_validate(values)
    text = dump_job(job)
    file.write_text(text, encoding="utf-8", newline="")
    loaded = load_job(file)
    assert loaded == job
    assert loaded.task.parameters() == job.task.parameters()
    assert dump_job(loaded) == text


def problems_in(file: Path, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    try:
        load_job(file, overrides, params_of)
    except SpecError as error:
        return error.problems
    return ()


def assert_problems_have_places(problems: Sequence[str], file: Path) -> None:
    for problem in problems:
        assert problem.isprintable()
        assert problem.startswith((f"{file}:", "override "))


@PROPERTY
@given(overrides=st.lists(st.text() | st.builds("{}={}".format, st.text(), st.text()), max_size=3))
def test_any_overrides_load_or_are_refused_in_sentences(file: Path, overrides: Sequence[str]) -> None:
    file.write_text(JOB)
    assert_problems_have_places(problems_in(file, overrides), file)


def paths_of(model: type[BaseModel]) -> list[str]:
    def inner(schema: dict[str, Any], prefix: str) -> list[str]:
        paths = []
        for key, value in schema.get("properties", {}).items():
            paths.append(prefix + key)
            reference = value.get("$ref", "#/$defs/")
            paths += inner(root["$defs"].get(reference.removeprefix("#/$defs/"), {}), f"{prefix}{key}.")
        return paths

    root = model.model_json_schema()
    return inner(root, "")


@PROPERTY
@given(
    path=st.sampled_from(paths_of(JobSpec) + [f"task.{path}" for path in paths_of(Head)])
    | st.builds("task.{}".format, st.sampled_from(list(ClassifyParams.model_fields))),
    value=VALUES,
)
def test_any_value_anywhere_loads_or_is_refused_by_its_key(file: Path, path: str, value: object) -> None:
    file.write_text(JOB)
    problems = problems_in(file, [f"{path}={json.dumps(value)}"])
    assert_problems_have_places(problems, file)
    assert all(path in problem for problem in problems)
    assert all(problem.startswith("override ") for problem in problems)


# The schema for editors


@pytest.fixture(scope="module")
def check() -> Callable[[object], list[str]]:
    schema = job_schema({"classify": ClassifyParams, "loose": LooseParams})
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    return lambda job: [error.json_path for error in validator.iter_errors(job)]


def job_values(**changes: object) -> dict[str, object]:
    return {**YAML(typ="safe", pure=True).load(JOB.replace("data/train.parquet", "[data/train.parquet]")), **changes}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"task": {"type": "classify", "labels": ["a"], "head": {"width": 3}}}, []),
        ({"task": {"type": "loose"}}, []),
        ({"task": {"type": "my.tasks:Parser", "anything": [1]}}, []),
        ({"task": {"type": "unknown"}}, ["$.task"]),
        ({"task": {"type": "classify"}}, ["$.task"]),
        ({"task": {"type": "classify", "labels": ["a"], "lables": 1}}, ["$.task"]),
        ({"task": {"type": "loose", "speed": 1}}, ["$.task"]),
        ({"task": {"labels": ["a"]}}, ["$.task"]),
        ({"parallel": {"zero": 5}}, ["$.parallel.zero"]),
        ({"train": {"bach_size": 5}}, ["$.train"]),
        ({"train": {"schedule": {"type": "linear", "warmup_fraction": 0.5}}}, []),
        ({"train": {"schedule": {"type": "foo"}}}, ["$.train.schedule"]),
        ({"data": {"train": "a.parquet", "validation": "b.parquet"}}, []),
        ({"data": {"train": ["a.parquet"], "validation": None}}, []),
        ({"data": {"train": []}}, ["$.data.train"]),
        ({"data": {"train": 3}}, ["$.data.train"]),
        ({"train": {"epochs": True}}, ["$.train.epochs"]),
        ({"extra": 1}, ["$"]),
    ],
)
def test_the_schema_accepts_what_loads(
    check: Callable[[object], list[str]], changes: dict[str, object], wrong: list[str]
) -> None:
    assert check(job_values(**changes)) == wrong


@PROPERTY
@given(values=jobs())
def test_the_schema_accepts_every_valid_job(check: Callable[[object], list[str]], values: dict[str, Any]) -> None:
    values["task"]["type"] = "package.module:Task"
    assert check(values) == []


def test_the_schema_describes_keys_and_separates_models_of_the_same_name() -> None:
    def params(field: type) -> type[BaseModel]:
        head = type("Head", (BaseModel,), {"__annotations__": {"x": field}, "__module__": f"tasks.{field.__name__}"})
        return type(
            "Params", (BaseModel,), {"__annotations__": {"head": head}, "__module__": f"tasks.{field.__name__}"}
        )

    schema = job_schema({"a": params(int), "b": params(str)})
    validator = jsonschema.Draft202012Validator(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert validator.is_valid(job_values(task={"type": "a", "head": {"x": 1}}))
    assert validator.is_valid(job_values(task={"type": "b", "head": {"x": "1"}}))
    assert not validator.is_valid(job_values(task={"type": "a", "head": {"x": "1"}}))
    text = json.dumps(schema)
    assert "Global batch: samples per optimizer step over all workers." in text
    assert "DeepSpeed ZeRO stage" in text
    assert "Names of the classes" in json.dumps(job_schema({"classify": ClassifyParams}))
