"""Preference tuning as a task: references, what each loss reads, predictions, and the parameters of an export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from launcher.models.adapters import add_adapters
from launcher.spec.model import LoraSpec, ModelSpec
from launcher.tasks.preference import Preference
from launcher.tasks.reward import Reward
from launcher.tasks.samples import Batch, Outputs

_ROWS = 7


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> ModelSpec:
    return ModelSpec(name=str(tiny_models["preference"]))


def _task(model: ModelSpec, **params: Any) -> Preference:
    return Preference(Preference.Params.model_validate({"max_length": 48, **params}), model, 0)


def _batch(task: Preference, rows: pa.Table) -> tuple[Batch, pa.Table]:
    """A whole global batch, in which the partner of each row is the next one."""
    samples = task.encode(rows, True).samples
    for name in task.partner_columns:
        order = pa.array([(i + 1) % len(rows) for i in range(len(rows))])
        samples = samples.append_column(f"partner_{name}", samples.column(name).take(order))
    totals = {name: float(sum(samples.column(name).to_pylist())) for name in task.normalizers}
    return replace(task.collate(samples), totals={"weight": float(len(rows)), **totals}), samples


def _changed(module: torch.nn.Module) -> torch.nn.Module:
    """The same model after some training: other trained weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _outputs(task: Preference, module: torch.nn.Module, batch: Batch) -> Outputs:
    with torch.no_grad():
        return task.forward(module, batch)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_rewards_are_zero_before_training_and_not_after(loss: str, model: ModelSpec) -> None:
    task = _task(model, loss=loss)
    batch, samples = _batch(task, task.example_rows(_ROWS, 0))
    for module, is_trained in ((task.build_model().eval(), False), (_changed(task.build_model()), True)):
        metrics = task.metrics(torch.device("cpu"))
        task.update_metrics(metrics, _outputs(task, module, batch), batch, samples)
        assert (abs(metrics.compute()["reward_margin"]) > 1e-3) is is_trained


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of peft 0.21, for GPT-2's layers
def test_a_model_without_its_adapters_is_its_reference(model: ModelSpec) -> None:
    lora = model.model_copy(update={"lora": LoraSpec(rank=2)})
    task, whole = _task(lora), _task(model)
    assert task.reference_model is None and whole.reference_model is not None
    batch, _ = _batch(task, task.example_rows(_ROWS, 0))
    adapted = _changed(add_adapters(task.build_model(), task.auto_model, lora, 0))
    outputs = _outputs(task, adapted, batch)
    for name in ("chosen", "rejected"):
        base = _outputs(whole, task.build_model().eval(), batch)[name]
        assert torch.equal(outputs[f"{name}_reference"], base)
        assert not torch.allclose(outputs[name], base, atol=1e-2)
    assert all(p.requires_grad for n, p in adapted.named_parameters() if "lora_" in n)


def test_the_pass_with_gradients_needs_no_constants_of_kto(model: ModelSpec) -> None:
    """The gradient of the first pass's outputs, propagated by the second, is that of the loss."""
    task = _task(model, loss="kto", beta=0.5)
    batch, _ = _batch(task, task.example_rows(_ROWS, 0))
    module = _changed(task.build_model())
    first = _outputs(task, module, batch)
    leaf = first["log_ratio"].clone().requires_grad_()
    task.coupled_losses({**first, "log_ratio": leaf}).sum().backward()
    assert leaf.grad is not None and bool((leaf.grad != 0).all())
    (task.forward(module, batch)["log_ratio"] * leaf.grad).sum().backward()
    propagated = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad()
    ratio = task.forward(module, batch)["log_ratio"]
    constant = (first["log_ratio"] - ratio).detach()
    task.coupled_losses({**first, "log_ratio": ratio + constant}).sum().backward()
    direct = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert len(propagated) == len(direct) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(propagated, direct, strict=True))


def test_orpo_is_the_likelihood_of_chosen_tokens_and_the_odds(model: ModelSpec) -> None:
    task = _task(model, loss="orpo", beta=0.2)
    batch, _ = _batch(task, task.example_rows(_ROWS, 0))
    outputs = _outputs(task, task.build_model().eval(), batch)
    assert task.reference_model is None and not [name for name in outputs if "reference" in name]
    likelihood = -outputs["chosen"].sum() / outputs["chosen_tokens"].sum()
    means = [outputs[name] / outputs[f"{name}_tokens"] for name in ("chosen", "rejected")]
    odds = [mean - torch.log(1 - mean.exp()) for mean in means]
    expected = likelihood - 0.2 * torch.nn.functional.logsigmoid(odds[0] - odds[1]).mean()
    assert float(task.sample_losses(outputs, batch).mean()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_exported_model_is_compared_with_the_one_training_began_with(loss: str, model: ModelSpec) -> None:
    hub = model.model_copy(update={"revision": "abc", "lora": LoraSpec()})
    params = _task(hub, loss=loss).exported_params()
    exported = Preference(params, hub.exported("/runs/a/model"), 0)
    assert exported.reference_model is not None
    assert (exported.reference_model.name, exported.reference_model.revision) == (model.name, "abc")
    assert exported.model.name == "/runs/a/model"
    assert exported.exported_params() == params
    assert _task(model, loss="simpo").exported_params() == _task(model, loss="simpo").params


def test_dropout_is_off_unless_the_job_asks_for_it(model: ModelSpec) -> None:
    assert _task(model).model.dropout == 0.0
    assert _task(model.model_copy(update={"dropout": 0.1})).model.dropout == 0.1


def test_smoothing_is_for_training_only(model: ModelSpec) -> None:
    task = _task(model, label_smoothing=0.1)
    batch, _ = _batch(task, task.example_rows(_ROWS, 0))
    outputs = _outputs(task, _changed(task.build_model()), batch)
    plain = _task(model).sample_losses(outputs, batch)
    assert torch.equal(task.for_evaluation().sample_losses(outputs, batch), plain)
    assert not torch.allclose(task.sample_losses(outputs, batch), plain)


def test_rows_in_words_have_completions_and_rewards(model: ModelSpec) -> None:
    rows = pa.table({"prompt": ["w1"] * 2, "chosen": ["w2"] * 2, "rejected": ["w3 w4"] * 2})
    task = _task(model)
    batch, samples = _batch(task, rows)
    (result,) = task.row_results(_outputs(task, task.build_model().eval(), batch), batch, samples, [1])
    assert (result.target, result.prediction) == (
        "chosen, reward 0: w2 <end>", "rejected, reward 0: w3 w4 <end>",
    )  # fmt: skip
    judged = pa.table({"prompt": ["w1"] * 2, "completion": ["w2", "w3"], "label": [True, False]})
    task = _task(model, loss="kto")
    batch, samples = _batch(task, judged)
    (result,) = task.row_results(_outputs(task, task.build_model().eval(), batch), batch, samples, [1])
    assert (result.target, result.prediction) == ("undesirable: w3 <end>", "reward 0")


def test_what_is_cut_is_counted(model: ModelSpec) -> None:
    rows = pa.table({"prompt": ["w1 " * 60, "w1"], "chosen": ["w2", "w2 " * 60], "rejected": ["w3", "w3"]})
    prompts, completions = _task(model).remarks(rows)
    assert "(1 of the 2 rows looked at), prompts lose their beginning beyond 48 tokens" in prompts
    assert "(1 of the 2 rows looked at), completions lose their end beyond 48 tokens" in completions
    assert _task(model).remarks(rows.slice(0, 0)) == ()


def test_a_margin_is_asked_of_rewards(model: ModelSpec) -> None:
    rows = Reward(Reward.Params(), model, 0).example_rows(_ROWS, 0)
    rows = rows.append_column("gap", pa.array([0.5, *[1.0] * (_ROWS - 2), None]))
    task = Reward(Reward.Params(max_length=48, margin="gap"), model, 0)
    encoded = task.encode(rows, True)
    assert encoded.problems == ((_ROWS - 1, "gap is null"),)
    batch = task.collate(encoded.samples)
    with torch.no_grad():
        outputs = task.forward(task.build_model().eval(), batch)
    expected = -torch.nn.functional.logsigmoid(outputs["chosen"] - outputs["rejected"] - batch.labels)
    assert batch.labels.tolist() == [0.5, *[1.0] * (_ROWS - 2)]
    assert torch.allclose(task.sample_losses(outputs, batch), expected)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_whole_conversations_are_inputs_and_what_is_learned(loss: str, model: ModelSpec) -> None:
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    other = [turns[0], {"role": "assistant", "content": "w3"}]
    rows = pa.table({"chosen": [turns], "rejected": [other], "completion": [turns], "label": [True]})
    task = _task(model, loss=loss, prompt=None)
    assert not set(task.input_columns) & set(task.target_columns)
    assert set(task.columns()) == ({"completion", "label"} if task.couples else {"chosen", "rejected"})
    assert task.encode(rows, True).problems == ()
    (prompt,) = task.encode(rows, False).samples.column("input_ids").to_pylist()
    assert task.processor().decode(prompt) == "user : w1 <end> assistant :"
