"""Preference tuning of language models: DPO, IPO, ORPO and SimPO of pairs, KTO of single judged completions.

Losses compare log-probabilities of whole completions, most of them with those of a reference: the model that training
starts from. With LoRA it is the trained model with its adapters switched off; otherwise a frozen copy
(`Task.reference_model`). KTO compares each row with the whole global batch, so its rows are coupled.

Runs wherever a task runs (`base.py` says where). Read `completions.py` next for the parameters,
`metrics/judgements.py` for pairs and judged completions, and `metrics/preferences.py` for the formulas.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from launcher.errors import ModelError
from launcher.models.completions import decode_labels
from launcher.models.generate import generate
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task, with_replaced
from launcher.tasks.completions import CompletionTask, PreferenceParams, encode_prompts
from launcher.tasks.metrics.judgements import Judged, Pairs, prompt_batch
from launcher.tasks.results import RowResult, TaskMetrics
from launcher.tasks.samples import Batch, Encoded, Outputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Preference(CompletionTask):
    """Preference tuning of `AutoModelForCausalLM`. A row is a pair of completions, or one with a judgement."""

    Params = PreferenceParams
    params: PreferenceParams
    auto_model = "AutoModelForCausalLM"
    generates = True

    def __init__(self, params: PreferenceParams, model: ModelSpec, seed: int) -> None:
        if params.has_reference and model.from_config is not None:
            raise ModelError(
                f"model.from_config: loss {params.loss} compares with the model that training starts from, which has "
                "learned nothing; give a pretrained model.name alone, or set task.loss: orpo"
            )
        super().__init__(params, model, seed)
        self.couples = params.loss == "kto"
        self.judgements = Judged(params) if self.couples else Pairs(params, params.label_smoothing)
        self.input_columns = (params.prompt or params.completion_columns[0], *params.context_columns)
        # Whole conversations are both; prompts are read of them alone.
        self.target_columns = tuple(c for c in self.judgements.columns if c not in self.input_columns)
        self.column_kinds = {params.label: "class"} if self.couples else {}
        self.normalizers = ("chosen_tokens",) if params.loss == "orpo" else ()
        self.partner_columns = ("input_ids", "labels") if self.couples else ()
        self.metric_modes = self.judgements.metric_modes
        self.prediction_schema = pa.schema({"prediction": pa.string()})
        if params.reference is not None:
            place = {"name": params.reference, "revision": params.reference_revision, "from_config": None}
            self.reference_model = self.model.model_copy(update=place)
        elif params.has_reference and model.lora is None:
            self.reference_model = self.model

    def exported_params(self) -> PreferenceParams:
        return self.params.with_reference(self.model.name, self.model.revision)

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        if with_targets:
            return self.judgements.encode(self._writer, rows)
        return encode_prompts(self.params, self._writer, rows)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad the sequences of B rows to (S, T): of pairs first all chosen, then all rejected ones, so S is 2 B."""
        collate = prompt_batch if samples.column_names == ["input_ids"] else self.judgements.collate
        return collate(samples, self._tokenizer.pad_token_id or 0)

    def forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Return log-probabilities of completions, of kto log-ratios to the reference, float32 (B,) each."""
        return self.judgements.forward(model, batch, self._reference_of)

    @contextmanager
    def _reference_of(self, model: "torch.nn.Module") -> "Iterator[torch.nn.Module]":
        if self.reference_model is None:
            # The model is inside of DeepSpeed's engine, and is called through it: ZeRO-3 gathers weights there.
            peft_model: Any = getattr(model, "module", model)
            with peft_model.disable_adapter():
                yield model
        else:
            # No engine has set it outside of a train worker.
            self.reference = self.build_reference() if self.reference is None else self.reference
            yield self.reference

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        assert isinstance(self.judgements, Pairs)
        return self.judgements.losses(outputs, batch.totals)

    def coupled_losses(self, outputs: Outputs) -> "torch.Tensor":
        assert isinstance(self.judgements, Judged)
        return self.judgements.losses(outputs)

    def for_evaluation(self) -> Task:
        return with_replaced(self, judgements=Pairs(self.params)) if self.params.label_smoothing else self

    def metrics(self, device: "torch.device") -> TaskMetrics:
        return self.judgements.metrics(device)

    def update_metrics(self, metrics: Any, outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        self.judgements.update(metrics, outputs)

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        """Return the completion of each row, of two the one with the larger reward."""
        texts = decode_labels(self._tokenizer, self.judgements.preferred(outputs, samples))
        return pa.table({"prediction": texts}, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        return self.judgements.row_results(outputs, samples, chosen, self._tokenizer)

    def predict(self, model: "PreTrainedModel", samples: pa.Table) -> pa.Table:
        """Return the text that the model generates after each prompt."""
        texts = generate(model, self._tokenizer, samples.column("input_ids").to_pylist(), self.params.max_new_tokens)
        return pa.table({"prediction": texts}, self.prediction_schema)


TASK = Preference
