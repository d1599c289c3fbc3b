"""Export from ZeRO-3: adapters alone, merged adapters, and BatchNorm statistics; and the line of a proof."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from launcher.data.rank_batches import collate
from launcher.data.stream import ShardStream
from launcher.driver.prepare import PreparedJob
from launcher.errors import TrainingError
from launcher.rundir.verify import read_certificate
from launcher.tasks import build_task
from launcher.train.engine import Engine
from launcher.train.export import check_finite, export_model, write_proof
from launcher.train.loop import forward_backward
from tests.support.certified_run import certified_run
from tests.support.jobs import mark_texts, prepared_job, write_splits
from tests.support.worker_group import run_group, share_cells


def _train_and_export(prepared: PreparedJob) -> list[list[float]]:
    """Train three steps and export; return the trained model's own logits for a batch."""
    task = build_task(prepared.job)
    engine = Engine(prepared.job, task, prepared.plan.micro_batch)
    engine.train_mode()
    batches = [batch for _, _, batch in ShardStream(share_cells(prepared, 2, engine.rank, 0)).steps()]
    for step, batch in enumerate(batches[:3]):
        forward_backward(engine, task, batch.parts, batch.global_batch, step)
        engine.step(1e-2, step)
    export_model(prepared.run, engine, task, prepared.job, prepared.plan)
    inputs = collate(task, batches[0].micro_batches[0], batches[0].global_batch)
    Path(prepared.run.uri).mkdir(parents=True, exist_ok=True)
    torch.save(dict(inputs.inputs), f"{prepared.run.uri}/inputs-{engine.rank}.pt")
    with engine.evaluation_mode():
        logits: list[list[float]] = engine.model(**inputs.inputs).logits.flatten(1).tolist()
    return logits


_CAUSAL = ("causal-lm", AutoModelForCausalLM, {"max_length": 48})
_CLASSES = ("text-classification", AutoModelForSequenceClassification, {"max_length": 32})
_DORA = {"rank": 4, "dora": True, "rank_stabilized": True}
# `w5` exists: it is skipped.
_TOKENS = ("w5", "<sep>", "<end-of-row>")


@pytest.mark.parametrize(
    ("kind", "zero", "model"),
    [
        (_CAUSAL, 3, {"lora": {"rank": 4}}),
        (_CLASSES, 3, {"lora": {"rank": 4}}),
        (_CAUSAL, 3, {"lora": _DORA}),
        (_CLASSES, 3, {"lora": {**_DORA, "target_modules": ["layer.1.*.query", "*.value"]}}),
        # The embeddings of GPT-2 are its output layer too.
        (_CAUSAL, 3, {"lora": {"rank": 4}, "add_tokens": _TOKENS}),
        (_CLASSES, 2, {"lora": _DORA, "add_tokens": _TOKENS}),
    ],
    ids=["causal", "classes", "causal-dora", "classes-dora", "causal-tokens", "classes-dora-tokens"],
)
def test_adapters_alone_and_merged_match_the_trained_model(
    kind: tuple[str, Any, dict[str, Any]],
    zero: int,
    model: dict[str, Any],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    task, auto, params = kind
    data = write_splits(tmp_path / "data", train=40, task=task)
    if "add_tokens" in model:
        mark_texts(data["train"])
    prepared = prepared_job(
        tiny_models[task], data, tmp_path, task={"type": task, **params}, model=model,
        parallel={"zero": zero}, train={"batch_size": 10},
    )  # fmt: skip
    expected = torch.tensor(run_group(2, _train_and_export, prepared))
    inputs = torch.load(f"{prepared.run.uri}/inputs-0.pt")
    merged = auto.from_pretrained(prepared.run.path("model")).eval()
    base = auto.from_pretrained(tiny_models[task])
    base.config.num_labels = merged.config.num_labels
    base = auto.from_pretrained(tiny_models[task], config=base.config).eval()
    if "add_tokens" in model:
        tokenizer = AutoTokenizer.from_pretrained(prepared.run.path("adapter"))
        assert tokenizer.convert_tokens_to_ids(list(_TOKENS[1:])) == [len(tokenizer) - 2, len(tokenizer) - 1]
        assert (inputs["input_ids"] >= len(tokenizer) - 2).any()
        base.resize_token_embeddings(len(tokenizer))
        assert merged.config.vocab_size == len(tokenizer)
    adapted = PeftModel.from_pretrained(base, prepared.run.path("adapter")).eval()
    with torch.no_grad():
        for exported in (merged, adapted):
            assert torch.allclose(exported(**inputs).logits.flatten(1), expected, atol=1e-5)
    assert not [name for name in merged.state_dict() if "lora" in name]


def test_exported_batch_norm_statistics_match_the_trained_model(tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=40, task="image-classification")
    config = {"model_type": "resnet", "image_size": 16, "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    prepared = prepared_job(
        Path("none"), data, tmp_path, task={"type": "image-classification"}, train={"batch_size": 10},
        model={"name": "", "from_config": {**config, "layer_type": "basic"}},
    )  # fmt: skip
    assert prepared.plan.notes[-1].startswith("BatchNorm sees one part of a batch, 3 samples")
    expected = torch.tensor(run_group(2, _train_and_export, prepared))
    inputs = torch.load(f"{prepared.run.uri}/inputs-0.pt")
    model = AutoModelForImageClassification.from_pretrained(prepared.run.path("model")).eval()
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits.flatten(1), expected, atol=1e-5)
    assert any("running_mean" in name and float(value.abs().sum()) > 0 for name, value in model.state_dict().items())


def test_weights_that_are_not_finite_are_not_exported() -> None:
    check_finite({"a": torch.ones(3), "b": torch.arange(3)})
    with pytest.raises(TrainingError, match=r"1 of 2 weights are not finite \(b\), so no model is exported"):
        check_finite({"a": torch.ones(3), "b": torch.tensor([0.0, float("nan")])})


def test_the_model_card_says_what_is_proven_and_keeps_what_its_owner_wrote(tiny_bert: Path, tmp_path: Path) -> None:
    run = certified_run(tiny_bert, tmp_path / "runs", write_splits(tmp_path / "data", 40))
    certificate = read_certificate(run)
    lines = run.read_bytes("model/README.md").decode().splitlines()
    head = lines.index("Fine-tuned with launcher.")
    assert lines[head + 1 : head + 4] == ["", certificate.sentence, ""]
    run.write_bytes("model/README.md", "\n".join([*lines, "", "For \\1 reviews alone."]).encode())
    one = certificate.model_copy(update={"shapes": certificate.shapes[:1]}).seal()
    write_proof(run, one)
    changed = run.read_bytes("model/README.md").decode().splitlines()
    assert changed == [*lines[: head + 2], one.sentence, *lines[head + 3 :], "", "For \\1 reviews alone."]
    run.write_bytes("model/README.md", b"# mine\n")
    write_proof(run, one)
    assert run.read_bytes("model/README.md").decode() == f"# mine\n\n{one.sentence}\n"
    run.delete("model/README.md")
    write_proof(run, one)
    assert not run.exists("model/README.md")
