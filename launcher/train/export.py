"""Export of the model as a transformers directory: safetensors, tokenizer, model card. Runs in train workers."""

import re
import tempfile
from pathlib import Path

import torch

from launcher.errors import TrainingError
from launcher.models.adapters import merge_adapters, save_adapters
from launcher.rundir.certificate import Certificate, find_certificate
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.records import ResultRecord, ScoresRecord
from launcher.rundir.uri import split_options
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.train.engine import Engine

_MADE_BY = "Fine-tuned with launcher."
_PROOF = re.compile(r"^(Proven|Not proven): .*$", re.MULTILINE)


def export_model(run: RunDir, engine: Engine, task: Task, job: JobSpec, plan: Plan) -> None:
    """Write `model/`, and `adapter/` for LoRA, to the run directory. Collective: gathers shards; rank 0 writes."""
    # Before any rank returns: every rank takes part in gathering the weights.
    state = engine.full_state_dict()
    if engine.rank != 0 or state is None:
        return
    check_finite(state)
    # On a local disk first: transformers and peft cannot write to an object store, and readers must not see a part.
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        model = engine.model
        # The adapter before the model: the model's card marks an export as complete (`worker.py`).
        if job.model.lora is not None:
            adapters = Path(scratch) / "adapter"
            save_adapters(model, state, adapters)  # type: ignore[arg-type]  # a PeftModel, kept as nn.Module
            if job.model.add_tokens:
                # Their rows are in the adapters; whoever loads these resizes the base model to this tokenizer first.
                task.processor().save_pretrained(adapters)
            run.publish_directory(adapters, "adapter")
            model, state = merge_adapters(model, state)  # type: ignore[arg-type]  # a PeftModel, kept as nn.Module
        model.save_pretrained(target, state_dict=state)  # type: ignore[operator]  # a transformers model, kept as nn.Module
        task.processor().save_pretrained(target)
        for name, content in task.export_files(model.config).items():  # type: ignore[arg-type]  # a transformers model, kept as nn.Module
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_text(content, encoding="utf-8")
        (target / "README.md").write_text(_card(job, plan), encoding="utf-8")
        run.publish_directory(target, "model")


def check_finite(state: dict[str, torch.Tensor]) -> None:
    """Check that all weights are finite.

    Raises:
        TrainingError: Some are NaN or infinite.
    """
    non_finite = [n for n, weight in state.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if non_finite:
        raise TrainingError(
            f"{len(non_finite)} of {len(state)} weights are not finite ({', '.join(non_finite[:3])}), so no model is "
            "exported; lower train.learning_rate and train again under another name"
        )


def write_model_card(run: RunDir, job: JobSpec, plan: Plan, result: ResultRecord) -> None:
    """Write the model card with the scores of all evaluated splits."""
    lines = [_card(job, plan), "## Results\n", f"Weights of step {result.best_step} of {result.steps}.\n"]
    for split in ("validation", "test"):
        scores = run.find_record(f"scores-{split}.json", ScoresRecord)
        if scores is not None:
            lines += [f"\n| {split} | value | baseline |\n| --- | --- | --- |"]
            lines += [
                f"| {name} | {value:.4f} | {_number(scores.baseline.get(name))} |"
                for name, value in scores.metrics.items()
            ]
            lines += [f"| loss | {scores.loss:.4f} | |", f"| rows | {scores.rows} | |\n"]
            lines += [f"{note}\n" for note in scores.notes]
    run.write_bytes("model/README.md", "\n".join(lines).encode())
    certificate = find_certificate(run)
    if certificate is not None:
        write_proof(run, certificate)


def write_proof(run: RunDir, certificate: Certificate) -> None:
    """Write into the model card, if there is one, what the certificate proves, in place of an earlier such line."""
    if not run.exists("model/README.md"):
        return
    card = run.read_bytes("model/README.md").decode()
    # Changed and not rendered again: its owner may have added to it.
    card, replaced = _PROOF.subn(lambda _: certificate.sentence, card, count=1)
    if not replaced:
        head, found, rest = card.partition(_MADE_BY)
        card = f"{head}{found}\n\n{certificate.sentence}{rest}" if found else f"{card}\n{certificate.sentence}\n"
    run.write_bytes("model/README.md", card.encode())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _card(job: JobSpec, plan: Plan) -> str:
    # A Hub name, or the last part of a path: a card is published, and paths and URI options may be secret.
    is_path = job.model.name.startswith("/") or "://" in job.model.name
    base = split_options(job.model.name)[0].rstrip("/").rsplit("/", 1)[-1] if is_path else job.model.name
    train = job.train
    optimizer = train.optimizer.model_dump(exclude={"type"})
    rows = {
        "base model": base + (f" @ {job.model.revision}" if job.model.revision else ""),
        "task": job.task.type,
        "training rows": plan.train_rows,
        "data fingerprint": plan.fingerprint,
        "epochs / steps": f"{train.epochs} / {plan.total_steps}",
        "global batch": train.batch_size,
        "learning rate": f"{train.learning_rate:g}, {train.schedule.type}, warm-up {train.schedule.warmup_fraction:g}",
        "optimizer": ", ".join([train.optimizer.type, *(f"{key} {value:g}" for key, value in optimizer.items())]),
        "gradient clipping": train.max_grad_norm,
        **({} if train.ema is None else {"weights": f"exponential moving average, decay {train.ema:g}"}),
        "precision": train.precision,
        "seed": job.seed,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    head = f"---\nlibrary_name: transformers\nbase_model: {base}\n---\n# {job.name}\n\n"
    return f"{head}{_MADE_BY}\n\n| | |\n| --- | --- |\n{table}\n"
