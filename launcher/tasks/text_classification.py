"""Text classification: one or two text columns to one class, several, or a number. Data workers and train workers."""

import json
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from launcher.arrays import list_column, pad_lists
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
    kind: Literal["single-label", "multi-label", "regression"] = "single-label"
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
        self.main_metric = {"single-label": "accuracy", "multi-label": "f1", "regression": "pearson"}[params.kind]
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._index = {name: i for i, name in enumerate(params.labels or ())}

    def metric_mode(self, metric: str) -> Literal["max", "min"] | None:
        """Errors fall, everything else rises."""
        families = {"single-label": ("accuracy", "micro_f1", "f1", "precision", "recall"), "regression": ("spearman",)}
        known = (self.main_metric, *families.get(self.params.kind, ("exact_match",)))
        macros = () if self.params.kind == "regression" else ("macro_f1", "macro_precision", "macro_recall", "roc_auc")
        lower = ("loss", "mse") if self.params.kind == "regression" else ("loss",)
        return "min" if metric in lower else "max" if metric in known + macros else None

    def learn(self, read_column: ReadColumn) -> TextParams:
        """Class names: the job file's, else the data schema's, else the distinct labels in sorted order."""
        if self.params.kind == "regression" or self.params.labels:
            return self.params
        column = read_column(self.params.label)
        flat = pc.list_flatten(column) if self.params.kind == "multi-label" else column
        values = sorted(v for v in pc.unique(flat).to_pylist() if v is not None)
        return self.params.model_copy(update={"labels": tuple(str(v) for v in values)})

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Loaded once per process."""
        self._tokenizer = self._tokenizer or load_tokenizer(self.model)
        return self._tokenizer

    def encode(self, rows: pa.Table, with_targets: bool) -> Encoded:
        """Tokens of each usable row, and its label as numbers."""
        texts = [rows.column(c).to_pylist() for c in self.input_columns]
        raw = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)
        kept, targets, problems = [], [], []
        for i in range(len(rows)):
            try:
                for name, values in zip(self.input_columns, texts, strict=True):
                    if values[i] is None:
                        raise ValueError(f"{name} is null")
                targets.append(self._target(raw[i]) if with_targets else [])
                kept.append(i)
            except ValueError as problem:
                problems.append((i, str(problem)))
        columns = [[str(values[i]) for i in kept] for values in texts]
        ids = self.tokenizer()(*columns, truncation=True, max_length=self.params.max_length) if kept else {}
        names = [n for n in ("input_ids", "token_type_ids") if n in ids]
        samples = {n: list_column(ids[n]) for n in names} | {"target": pa.array(targets, pa.list_(pa.float64()))}
        lengths = np.array([len(t) for t in ids["input_ids"]] if kept else [], np.int64)
        return Encoded(pa.table(samples), np.array(kept, np.int64), lengths, np.ones(len(kept)), tuple(problems))

    def _target(self, value: object) -> list[float]:
        if value is None:
            raise ValueError(f"{self.params.label} is null")
        if self.params.kind == "regression":
            number = float(value)  # type: ignore[arg-type]  # whatever the column holds; float says what it cannot take
            if not np.isfinite(number):
                raise ValueError(f"{self.params.label} is {number}")
            return [number]
        if self.params.kind == "multi-label":
            chosen = {self._class(v) for v in value}  # type: ignore[attr-defined]  # a list column; else TypeError
            return [float(i in chosen) for i in range(len(self._index))]
        return [float(self._class(value))]

    def _class(self, value: object) -> int:
        index = self._index.get(str(value))
        if index is None and isinstance(value, int) and 0 <= value < len(self._index):
            index = int(value)
        if index is None:
            raise ValueError(f"{self.params.label} is {value!r}, which is not one of {', '.join(self._index)}")
        return index

    def collate(self, samples: pa.Table) -> Batch:
        """input_ids, attention_mask (and token_type_ids) (B, T); labels (B,) or, multi-label, (B, classes)."""
        import torch

        pad = {"input_ids": self.tokenizer().pad_token_id or 0, "token_type_ids": 0}
        inputs = {n: torch.from_numpy(pad_lists(samples.column(n), pad[n])) for n in samples.column_names if n in pad}
        lengths = torch.from_numpy(pc.list_value_length(samples.column("input_ids")).to_numpy().copy())
        inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
        labels = torch.tensor(samples.column("target").to_pylist())
        labels = labels if self.params.kind == "multi-label" else labels.reshape(len(samples), -1)[:, :1].squeeze(-1)
        return Batch(inputs, labels.long() if self.params.kind == "single-label" else labels, torch.ones(len(samples)))

    def _config(self) -> "PretrainedConfig":
        names = self.params.labels or ("value",)
        kind = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}
        return load_config(
            self.model,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type=kind.get(self.params.kind, "regression"),
        )

    def check_model(self) -> dict[str, object]:
        """Facts from the config and the tokenizer, without weights."""
        from transformers import AutoModelForSequenceClassification

        config, tokenizer = self._config(), self.tokenizer()
        parameters = count_parameters(AutoModelForSequenceClassification, config)
        facts = {"model_type": config.model_type, "classes": config.num_labels, "vocabulary": len(tokenizer)}
        return {**facts, "parameters": parameters}

    def build_model(self) -> "PreTrainedModel":
        """Sequence classification; `forward(**inputs).logits` is (B, classes)."""
        from transformers import AutoModelForSequenceClassification

        config = self._config()
        if config.pad_token_id is None:  # GPT-style models pool the last token before the padding
            config.pad_token_id = self.tokenizer().pad_token_id or 0
        return load_model(AutoModelForSequenceClassification, self.model, config, self.seed)

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """(B,) cross entropy; multi-label its binary form averaged over classes; regression the squared error."""
        from torch.nn import functional

        if self.params.kind == "single-label":
            return functional.cross_entropy(logits.float(), labels, reduction="none")
        if self.params.kind == "multi-label":
            return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").mean(-1)
        return functional.mse_loss(logits.float().squeeze(-1), labels, reduction="none")

    def metrics(self, device: "torch.device") -> "TaskMetrics":
        """The metrics of this kind of label."""
        from launcher.metrics.classification import MulticlassMetrics, MultilabelMetrics
        from launcher.metrics.regression import RegressionMetrics

        if self.params.kind == "regression":
            return RegressionMetrics(device)
        family = MulticlassMetrics if self.params.kind == "single-label" else MultilabelMetrics
        return family(self.params.labels or (), device)

    def predict(self, logits: "torch.Tensor") -> pa.Table:
        """`prediction` (class name, list of names, or number) and `scores` (JSON of name to probability)."""
        names = self.params.labels or ()
        if self.params.kind == "regression":
            return pa.table({"prediction": pa.array(logits.float().squeeze(-1).tolist(), pa.float64())})
        single = self.params.kind == "single-label"
        scores = (logits.float().softmax(-1) if single else logits.float().sigmoid()).tolist()
        chosen: list[object] = [
            names[int(np.argmax(row))] if single else [n for n, s in zip(names, row, strict=True) if s > 0.5]
            for row in scores
        ]
        text = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in scores]
        return pa.table(
            {"prediction": pa.array(chosen, pa.string() if single else pa.list_(pa.string())), "scores": text}
        )

    def target_text(self, label: object) -> str:
        """Class name, names, or number."""
        names = self.params.labels or ()
        if isinstance(label, list):
            return ", ".join(n for n, on in zip(names, label, strict=True) if on) or "none"
        return names[int(label)] if self.params.kind == "single-label" else f"{label:.4g}"  # type: ignore[call-overload]  # a number

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Texts of words w0..w199, where the words w0..w99 mean class a and the rest class b."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, rows)
        words = [rng.integers(0, 100, rng.integers(3, 20)) + 100 * label for label in labels]
        texts = [" ".join(f"w{w}" for w in row) for row in words]
        return pa.table({self.params.text: texts, self.params.label: [("a", "b")[i] for i in labels]})


TASK = TextClassification
