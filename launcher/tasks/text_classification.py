"""Text classification: one or two text columns to one class, several, or a number. Data workers and train workers."""

from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from launcher.arrays import list_column, pad_lists
from launcher.errors import DataError
from launcher.metrics.labels import Kind, Labels, distinct
from launcher.models.pretrained import count_parameters, load_config, load_model, load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Batch, Encoded, ReadColumn, TaskParams

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from launcher.tasks.base import TaskMetrics


class TextParams(TaskParams):
    """`task:` with `type: text-classification`."""

    text: str = "text"
    """Column that holds the text."""
    text_pair: str | None = None
    """Column that holds a second text (premise and hypothesis, question and answer)."""
    label: str = "label"
    """Column that holds the label: an int or string; a list of them for multi-label; a number for regression."""
    kind: Kind = "single-label"
    """One class per row, any number of classes per row, or a number."""
    labels: tuple[str, ...] | None = None
    """Class names in order; int labels index them. null reads them from the training data."""
    max_length: int = Field(default=128, ge=4)
    """Tokens kept of each row; the rest is cut off."""


class TextClassification:
    """Fine-tunes `AutoModelForSequenceClassification`. See `tasks/base.py` for what each method owes."""

    Params = TextParams

    def __init__(self, params: TextParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns = tuple(c for c in (params.text, params.text_pair) if c)
        self.target_columns = (params.label,)
        self.labels = Labels(params.label, params.kind, params.labels or ())
        self.main_metric = self.labels.main_metric
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def metric_mode(self, metric: str) -> Literal["max", "min"] | None:
        return self.labels.metric_mode(metric)

    def learn(self, read_column: ReadColumn) -> TextParams:
        """Class names, unless the job file gives them: the distinct labels."""
        if self.params.kind == "regression" or self.params.labels:
            return self.params
        names = distinct(read_column(self.params.label))
        if len(names) < 2:
            only = f"only the label {names[0]!r}" if names else "no label"
            raise DataError(
                f"task.label: column {self.params.label} of the training data holds {only}; at least two "
                "classes are needed, or kind: regression"
            )
        return self.params.model_copy(update={"labels": names})

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        self._tokenizer = self._tokenizer or load_tokenizer(self.model)  # once per process
        return self._tokenizer

    def encode(self, rows: pa.Table, with_targets: bool) -> Encoded:
        texts = [rows.column(c).to_pylist() for c in self.input_columns]
        raw = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)
        kept, targets, problems = [], [], []
        for i in range(len(rows)):
            try:
                for name, values in zip(self.input_columns, texts, strict=True):
                    if values[i] is None:
                        raise ValueError(f"{name} is null")
                targets.append(self.labels.target(raw[i]) if with_targets else [])
                kept.append(i)
            except ValueError as problem:
                problems.append((i, str(problem)))
        columns = [[str(values[i]) for i in kept] for values in texts]
        ids = self.tokenizer()(*columns, truncation=True, max_length=self.params.max_length) if kept else {}
        names = [n for n in ("input_ids", "token_type_ids") if n in ids]
        samples = {n: list_column(ids[n]) for n in names} | {"target": pa.array(targets, pa.list_(pa.float64()))}
        lengths = np.array([len(t) for t in ids["input_ids"]] if kept else [], np.int64)
        return Encoded(pa.table(samples), np.array(kept, np.int64), lengths, np.ones(len(kept)), tuple(problems))

    def collate(self, samples: pa.Table) -> Batch:
        """input_ids, attention_mask (and token_type_ids) (B, T); labels (B,) or, multi-label, (B, classes)."""
        import torch

        pad = {"input_ids": self.tokenizer().pad_token_id or 0, "token_type_ids": 0}
        inputs = {n: torch.from_numpy(pad_lists(samples.column(n), pad[n])) for n in samples.column_names if n in pad}
        lengths = torch.from_numpy(pc.list_value_length(samples.column("input_ids")).to_numpy().copy())
        inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
        return Batch(inputs, self.labels.tensor(samples.column("target")), torch.ones(len(samples)))

    def _config(self) -> "PretrainedConfig":
        config = load_config(self.model, **self.labels.config())
        if config.pad_token_id is None:  # GPT-style models pool the last token before the padding
            config.pad_token_id = self.tokenizer().pad_token_id or 0
        return config

    def check_model(self) -> dict[str, object]:
        from transformers import AutoModelForSequenceClassification

        config = self._config()
        parameters = count_parameters(AutoModelForSequenceClassification, config)
        return {"model_type": config.model_type, "classes": config.num_labels, "parameters": parameters}

    def build_model(self) -> "PreTrainedModel":
        """`forward(**inputs).logits` is (B, classes)."""
        from transformers import AutoModelForSequenceClassification

        return load_model(AutoModelForSequenceClassification, self.model, self._config(), self.seed)

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        return self.labels.sample_losses(logits, labels)

    def metrics(self, device: "torch.device") -> "TaskMetrics":
        return self.labels.metrics(device)

    def predict(self, logits: "torch.Tensor") -> pa.Table:
        return self.labels.predict(logits)

    def target_text(self, label: object) -> str:
        return self.labels.text(label)

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Texts of words w0..w199, where the words w0..w99 mean class a and the rest class b."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, rows)
        words = [rng.integers(0, 100, rng.integers(3, 20)) + 100 * label for label in labels]
        texts = [" ".join(f"w{w}" for w in row) for row in words]
        return pa.table({self.params.text: texts, self.params.label: [("a", "b")[i] for i in labels]})


TASK = TextClassification
