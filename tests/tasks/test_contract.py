"""Contract of the task protocol (`launcher/tasks/base.py`), checked for each built-in task on a tiny model."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from pydantic import ValidationError

from launcher.data.rank_batches import BatchLayout, build_shard, cut_into_parts
from launcher.errors import UserError
from launcher.spec.model import ModelSpec
from launcher.tasks import params_class, params_models, task_class, task_names
from launcher.tasks.base import Task
from launcher.tasks.params import TaskParams
from launcher.tasks.samples import Batch, Outputs
from launcher.tasks.text_classification import TextClassification, TextParams
from tests.support.jobs import Columns

_ROWS = 23


@pytest.fixture(params=task_names())
def name(request: pytest.FixtureRequest) -> str:
    task_name: str = request.param
    return task_name


@pytest.fixture
def model(name: str, tiny_models: dict[str, Path]) -> ModelSpec:
    return ModelSpec(name=str(tiny_models[name]))


@pytest.fixture
def task(name: str, model: ModelSpec) -> Task:
    """Build a task as the stream does: with parameters inferred from the training data."""
    kind = task_class(name)
    params = kind.Params.model_validate({"max_length": 48} if "max_length" in kind.Params.model_fields else {})
    unlearned = kind(params, model, 0)
    return kind(unlearned.infer_params(Columns(unlearned.example_rows(200, 0))), model, 0)


def test_the_module_exports_its_task(name: str) -> None:
    module = importlib.import_module(f"launcher.tasks.{name.replace('-', '_')}")
    assert module.TASK is task_class(name)
    assert issubclass(module.TASK.Params, TaskParams)
    assert params_class(name) is params_models()[name] is module.TASK.Params
    members = [member for member in vars(Task) if not member.startswith("_") and callable(vars(Task)[member])]
    assert "encode" in members
    assert not [member for member in members if not callable(getattr(module.TASK, member, None))]


def test_parameters_survive_a_round_trip_and_are_frozen(name: str, task: Task) -> None:
    kind = params_class(name)
    learned = task.infer_params(Columns(task.example_rows(200, 0)))
    for params in (kind(), learned):
        assert kind.model_validate(params.model_dump()) == params
        assert kind.model_validate_json(params.model_dump_json()) == params
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate({"no_such_parameter": 1})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(learned, next(iter(kind.model_fields)), None)


def test_every_parameter_is_documented(name: str) -> None:
    assert not [key for key, field in params_class(name).model_fields.items() if not field.description]


def test_inferring_parameters_twice_changes_nothing(name: str, task: Task, model: ModelSpec) -> None:
    learned = task.infer_params(Columns(task.example_rows(200, 0)))
    again = task_class(name)(learned, model, 0)
    assert again.infer_params(Columns(again.example_rows(200, 1))) == learned


def test_example_rows_are_a_function_of_number_and_seed(task: Task) -> None:
    rows = task.example_rows(_ROWS, 1)
    assert len(rows) == _ROWS
    assert set(task.input_columns) | set(task.target_columns) <= set(rows.column_names)
    assert rows.equals(task.example_rows(_ROWS, 1))
    assert not rows.equals(task.example_rows(_ROWS, 2))


def test_encode_returns_a_sample_for_each_row(task: Task) -> None:
    rows = task.example_rows(_ROWS, 1)
    encoded = task.encode(rows, True)
    assert encoded.problems == ()
    assert np.array_equal(encoded.valid_rows, np.arange(_ROWS))
    assert len(encoded.samples) == len(encoded.lengths) == len(encoded.weights) == _ROWS
    assert np.issubdtype(encoded.valid_rows.dtype, np.integer)
    assert np.issubdtype(encoded.lengths.dtype, np.integer)
    assert (encoded.lengths > 0).all()
    assert (encoded.weights > 0).all()
    assert not [column for column in encoded.samples.column_names if column.startswith("__")]
    again = task.encode(rows, True)
    assert again.samples.equals(encoded.samples)
    assert np.array_equal(again.lengths, encoded.lengths)


def test_a_sample_does_not_depend_on_its_neighbours(task: Task) -> None:
    rows = task.example_rows(_ROWS, 1)
    whole = task.encode(rows, True)
    part = task.encode(rows.slice(5, 7), True)
    assert part.samples.to_pylist() == whole.samples.slice(5, 7).to_pylist()
    assert part.lengths.tolist() == whole.lengths[5:12].tolist()


def _without(rows: pa.Table, column: str, positions: list[int]) -> pa.Table:
    values = [None if i in positions else value for i, value in enumerate(rows.column(column).to_pylist())]
    return rows.set_column(rows.column_names.index(column), column, pa.array(values, rows.column(column).type))


def test_rows_with_a_null_are_reported_and_left_out(task: Task) -> None:
    rows = task.example_rows(_ROWS, 1)
    clean = task.encode(rows, True)
    bad = [0, 7, _ROWS - 1]
    for column in {*task.input_columns, *task.target_columns}:
        encoded = task.encode(_without(rows, column, bad), True)
        assert encoded.problems == tuple((i, f"{column} is null") for i in bad)
        valid = [i for i in range(_ROWS) if i not in bad]
        assert encoded.valid_rows.tolist() == valid
        assert encoded.samples.to_pylist() == clean.samples.take(pa.array(valid)).to_pylist()
        assert encoded.lengths.tolist() == clean.lengths[valid].tolist()
        assert len(encoded.weights) == len(valid)


def test_encode_accepts_a_window_without_valid_rows(task: Task) -> None:
    rows = task.example_rows(4, 1)
    encoded = task.encode(_without(rows, task.input_columns[0], [0, 1, 2, 3]), True)
    assert [position for position, _ in encoded.problems] == [0, 1, 2, 3]
    assert len(encoded.samples) == len(encoded.valid_rows) == len(encoded.lengths) == len(encoded.weights) == 0


def test_encode_without_targets_reads_inputs_only(name: str, task: Task) -> None:
    rows = task.example_rows(_ROWS, 1)
    inputs = task.encode(rows.select(list(task.input_columns)), False)
    assert inputs.problems == ()
    assert inputs.valid_rows.tolist() == list(range(_ROWS))
    batch, full = task.collate(inputs.samples), task.collate(task.encode(rows, True).samples)
    assert batch.inputs.keys() == full.inputs.keys()
    # A prompt ends where the answer begins, of a masked text the hidden tokens are the targets, and a row of several
    # sequences may have one alone for its inputs.
    is_single = all(len(value) == _ROWS for value in full.inputs.values() if not isinstance(value, bool))
    if not task.generates and name != "masked-lm" and is_single:
        assert all(_same(batch.inputs[key], full.inputs[key]) for key in full.inputs)


def _same(first: torch.Tensor | bool, second: torch.Tensor | bool) -> bool:
    return (
        torch.equal(first, second)
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        else first == second
    )


def _batch(task: Task, samples: pa.Table, whole: pa.Table) -> Batch:
    """Collate a part of a global batch, which is `whole`, as the loop does."""
    for name in task.partner_columns:
        samples = samples.append_column(f"partner_{name}", samples.column(name))
    totals = {name: float(sum(whole.column(name).to_pylist())) for name in task.normalizers}
    return replace(task.collate(samples), totals={"weight": float(len(whole)), **totals})


@pytest.mark.parametrize("size", [1, 2, _ROWS])
def test_collate_pads_to_the_longest(task: Task, size: int) -> None:
    encoded = task.encode(task.example_rows(_ROWS, 1), True)
    part = encoded.samples.slice(3, size)
    batch = _batch(task, part, part)
    size = min(size, _ROWS - 3)
    assert batch.mask.tolist() == [1.0] * size
    assert "labels" not in batch.inputs
    inputs = {name: value for name, value in batch.inputs.items() if isinstance(value, torch.Tensor)}
    assert len({len(tensor) for tensor in inputs.values()}) == 1
    assert all(tensor.dtype == torch.int64 for name, tensor in inputs.items() if name != "pixel_values")
    lengths = encoded.lengths[3 : 3 + size]
    # A row of one sequence has as many tokens as its length says; of several sequences it is their sum.
    if "decoder_input_ids" in inputs:
        targets = (batch.labels != -100).sum(1)
        assert (inputs["attention_mask"].sum(1) + targets).tolist() == lengths.tolist()
    elif len(next(iter(inputs.values()))) == size and "input_ids" in inputs:
        # The cost of a row counts its other sequences too.
        tokens = pc.list_value_length(part.column("input_ids")).to_pylist()
        assert all(n <= cost for n, cost in zip(tokens, lengths.tolist(), strict=True))
        assert inputs["input_ids"].shape == (size, max(tokens))
        if "attention_mask" in inputs:
            assert inputs["attention_mask"].sum(1).tolist() == tokens
    assert batch.to(torch.device("cpu")).inputs.keys() == batch.inputs.keys()


def test_losses_and_predictions_have_the_documented_shapes(task: Task) -> None:
    samples = task.encode(task.example_rows(_ROWS, 1), True).samples
    batch = _batch(task, samples, samples)
    model = task.build_model().eval()
    facts = task.check_model()
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["model_type"] == model.config.model_type
    with torch.no_grad():
        outputs = task.evaluation_forward(model, batch)
    losses = task.coupled_losses(outputs) if task.couples else task.sample_losses(outputs, batch)
    assert losses.shape == (_ROWS,)
    assert losses.dtype == torch.float32
    assert bool(losses.isfinite().all())
    decoded = task.decode(outputs, samples)
    assert len(decoded) == _ROWS
    assert decoded.schema == task.prediction_schema
    assert decoded.column(0).null_count == 0
    results = task.row_results(outputs, batch, samples, [*range(_ROWS)])
    assert len(results) == _ROWS
    assert task.row_results(outputs, batch, samples, [7, 3]) == [results[7], results[3]]
    # Some of them are shorter than the micro-batch, whose padding the outputs have.
    assert [task.row_results(outputs, batch, samples, [i])[0] for i in range(_ROWS)] == results
    assert all(result.target and isinstance(result.prediction, str) for result in results)


def test_predictions_of_rows_without_targets(task: Task) -> None:
    rows = task.example_rows(5, 1).select(list(task.input_columns))
    encoded = task.encode(rows, False)
    with torch.inference_mode():
        predictions = task.predict(task.build_model().eval(), encoded.samples)
    assert predictions.schema == task.prediction_schema
    assert len(predictions) == 5
    assert predictions.column(0).null_count == 0


def test_inputs_of_a_row_can_be_displayed(task: Task) -> None:
    shown = task.display_inputs(task.example_rows(1, 1).to_pylist()[0])
    assert tuple(shown.texts) == task.input_columns
    assert all(shown.texts.values())


def test_padding_does_not_change_a_loss(task: Task) -> None:
    encoded = task.encode(task.example_rows(_ROWS, 1), True)
    model = task.build_model().eval()

    def outputs_and_losses(samples: pa.Table) -> tuple[Outputs, list[float]]:
        batch = _batch(task, samples, encoded.samples)
        with torch.no_grad():
            outputs = task.forward(model, batch)
        return outputs, [] if task.couples else task.sample_losses(outputs, batch).tolist()

    whole, losses = outputs_and_losses(encoded.samples)
    alone = [outputs_and_losses(encoded.samples.slice(i, 1)) for i in range(_ROWS)]
    if task.couples:
        for key, tensor in whole.items():
            assert torch.allclose(tensor, torch.cat([outputs[key] for outputs, _ in alone]), atol=1e-5)
    assert losses == pytest.approx([loss for _, row in alone for loss in row], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in task_names() if "packing" in params_class(name).model_fields])
def test_packed_rows_have_the_losses_of_padded_ones(task: Task) -> None:
    assert task.pack_length == 48
    encoded, rows = task.encode(task.example_rows(_ROWS, 1), True), np.arange(_ROWS)
    layout = BatchLayout(world_size=1, parts=1, micro_batch=None, pack_length=task.pack_length)
    parts = cut_into_parts(rows, encoded.lengths, layout, np.zeros(_ROWS, np.int64))
    packed, _ = build_shard(encoded, rows, [rows], [parts], 0, layout)
    assert len(packed) < _ROWS / 2
    model = task.build_model().eval()

    def losses(samples: pa.Table) -> list[float]:
        batch = task.collate(samples)
        with torch.no_grad():
            return task.sample_losses(task.forward(model, batch), batch).tolist()

    padded = losses(encoded.samples)
    assert losses(packed) == pytest.approx([sum(padded[i] for i in sequence) for sequence in parts[0]], abs=1e-4)


def test_metrics_have_modes_and_baselines(task: Task) -> None:
    samples = task.encode(task.example_rows(200, 1), True).samples
    model = task.build_model().eval()
    metrics = task.metrics(torch.device("cpu"))
    for begin, end in ((0, 1), (1, 90), (90, 200)):
        part = samples.slice(begin, end - begin).append_column("__row", pa.array(range(begin, end)))
        batch = _batch(task, part, samples)
        with torch.no_grad():
            task.update_metrics(metrics, task.evaluation_forward(model, batch), batch, part)
    computed = metrics.compute()
    assert next(iter(computed)) == next(iter(task.metric_modes))
    assert computed.keys() <= task.metric_modes.keys()
    assert "loss" not in task.metric_modes
    assert metrics.baseline().keys() <= computed.keys()


def test_a_new_head_is_a_function_of_the_seed(name: str, task: Task, model: ModelSpec) -> None:
    if name in ("causal-lm", "masked-lm", "preference", "seq2seq", "sentence-embedding"):
        pytest.skip("its head is pretrained: nothing in it is new")
    learned = task.infer_params(Columns(task.example_rows(200, 0)))

    def weights(seed: int) -> dict[str, torch.Tensor]:
        return dict(task_class(name)(learned, model, seed).build_model().state_dict())

    first, again, second = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_an_unknown_task_is_refused_with_the_known_names() -> None:
    assert "text-classification" in task_names()
    assert task_names() == sorted(task_names())
    with pytest.raises(UserError) as caught:
        task_class("text-clasification")
    assert caught.value.message.startswith("task.type is text-clasification, which is not ")
    assert "text-classification" in caught.value.message
    for reserved in ("base", "labelled", "conversations", "__init__", ""):
        with pytest.raises(UserError):
            task_class(reserved)


_OUTSIDE = '''
from launcher.tasks.params import TaskParams
from launcher.tasks.text_classification import TextClassification, TextParams


class Params(TextParams):
    """With a parameter more."""

    shout: bool = False
    """Whether to shout."""


class Mine(TextClassification):
    """A task outside the package."""

    Params = Params
'''


def test_a_task_is_imported_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    (tmp_path / "outside_task.py").write_text(_OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    kind = task_class("outside_task:Mine")
    assert (kind.__module__, kind.__name__) == ("outside_task", "Mine")
    assert "shout" in params_class("outside_task:Mine").model_fields
    task = kind(kind.Params.model_validate({"shout": True, "labels": ["a", "b"]}), ModelSpec(name=str(tiny_bert)), 0)
    assert len(task.encode(task.example_rows(3, 0), True).samples) == 3
    assert task_names() == list(params_models())
    with pytest.raises(UserError) as caught:
        task_class("outside_task:Yours")
    assert caught.value.message.startswith("task.type is outside_task:Yours, which cannot be imported (")
    assert caught.value.message.endswith("); put the module on PYTHONPATH")


def _text_task(model: Path, **params: object) -> TextClassification:
    return TextClassification(TextParams.model_validate(params), ModelSpec(name=str(model)), 0)


def test_text_classification_reports_unknown_labels(tiny_bert: Path) -> None:
    task = _text_task(tiny_bert, labels=["a", "b"])
    table = pa.table({"text": ["w1", None, "w2", "w3", "w4"], "label": ["a", "a", "z", None, "b"]})
    encoded = task.encode(table, True)
    assert encoded.problems == (
        (1, "text is null"), (2, "label is 'z', which is not one of a, b"), (3, "label is null"),
    )  # fmt: skip
    assert encoded.valid_rows.tolist() == [0, 4]
    assert task.collate(encoded.samples).labels.tolist() == [0, 1]


def test_text_classification_of_pairs(tiny_bert: Path) -> None:
    task = _text_task(tiny_bert, text="one", text_pair="two", labels=["a", "b"], max_length=6)
    assert task.input_columns == ("one", "two")
    table = pa.table({"one": ["w0", "w1", "w0 " * 9], "two": ["w1 w2", None, "w3"], "label": [0, 1, 1]})
    encoded = task.encode(table, True)
    assert encoded.problems == ((1, "two is null"),)
    assert encoded.lengths.tolist() == [6, 6]
    batch = task.collate(encoded.samples)
    assert batch.inputs["input_ids"][0].tolist() == [2, 4, 3, 5, 6, 3]
    assert batch.inputs["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1]


def test_text_classification_cuts_at_max_length(tiny_bert: Path) -> None:
    task = _text_task(tiny_bert, labels=["a", "b"], max_length=8)
    encoded = task.encode(pa.table({"text": ["w1 " * 50, "w1", ""], "label": ["a", "b", "a"]}), True)
    assert encoded.lengths.tolist() == [8, 3, 2]
    assert task.collate(encoded.samples).inputs["input_ids"].tolist()[1:] == [[2, 5, 3] + [0] * 5, [2, 3] + [0] * 6]


@pytest.mark.parametrize(
    ("kind", "values", "shape", "classes"),
    [
        ("single-label", ["b", "a", "c"], (3,), 3),
        ("multi-label", [["a"], [], ["b", "c", "a"]], (3, 3), 3),
        ("regression", [0.5, 1.0, -2.0], (3,), 1),
    ],
)
def test_text_classification_of_each_kind(
    tiny_bert: Path, kind: str, values: list[object], shape: tuple[int, ...], classes: int
) -> None:
    table = pa.table({"text": ["w1", "w2 w3", "w4"], "label": values})
    unlearned = _text_task(tiny_bert, kind=kind)
    task = TextClassification(unlearned.infer_params(Columns(table)), unlearned.model, 0)
    assert task.params.labels == (None if kind == "regression" else ("a", "b", "c"))
    batch = task.collate(task.encode(table, True).samples)
    assert tuple(batch.labels.shape) == shape
    with torch.no_grad():
        outputs = task.forward(task.build_model().eval(), batch)
    assert outputs["logits"].shape == (3, classes)
    assert task.sample_losses(outputs, batch).shape == (3,)
    assert len(task.decode(outputs, table)) == 3
    assert all(result.target for result in task.row_results(outputs, batch, table, [0, 1, 2]))
