"""Image classification (ResNet, ViT): a picture to one class, or several. Data workers and train workers."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from launcher.metrics.labels import ClassNames, Labels, learn_names
from launcher.models.images import Augment, Pixels, example_picture, image_bytes, thumbnail
from launcher.models.pretrained import load_config, load_image_processor
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Batch, Encoded, Shown, Task, TaskParams, TrainingColumns, Verdict

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor

    from launcher.tasks.base import TaskMetrics


class ImageParams(TaskParams):
    """`task:` with `type: image-classification`."""

    image: str = "image"
    """Column with pictures: file contents, {bytes, path}, or absolute paths or URIs."""
    label: str = "label"
    """Column that holds the label: an int or string; a list of them for multi-label."""
    kind: Literal["single-label", "multi-label"] = "single-label"
    """One class per picture, or any number."""
    labels: ClassNames = None
    """Class names in order; int labels index them. null reads them from the training data."""
    augment: Augment = Augment()
    """How training pictures are changed at random; the same on any cluster."""


class ImageClassification(Task):
    """Fine-tunes `AutoModelForImageClassification`. See `tasks/base.py` for what each method owes."""

    Params = ImageParams
    auto_model = "AutoModelForImageClassification"
    from_scratch = "image"

    def __init__(self, params: ImageParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns, self.target_columns = (params.image,), (params.label,)
        self.labels = Labels(params.label, params.kind, params.labels or ())
        self.metric_modes = self.labels.metric_modes
        self.prediction_schema = self.labels.prediction_schema

    def learn(self, data: TrainingColumns) -> ImageParams:
        """Class names, unless the job file gives them."""
        if self.params.labels:
            return self.params
        column = self.params.label
        names = learn_names(data.column(column), data.class_names(column), column)
        return self.params.model_copy(update={"labels": names})

    @cached_property  # once per process
    def _pixels(self) -> Pixels:
        channels = getattr(load_config(self.model), "num_channels", 3)
        return Pixels(load_image_processor(self.model), int(channels), self.params.image)

    def processor(self) -> "BaseImageProcessor":
        return self._pixels.processor

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        cells = rows.column(self.params.image).to_pylist()
        raw = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)
        kept, problems, targets, pixels = [], [], [], []
        for i, cell in enumerate(cells):
            try:
                target = self.labels.target(raw[i]) if with_targets else []
                seed = None if noise is None else int(noise[i])
                pixels.append(self._pixels.encode(cell, self.params.augment, seed))
                targets.append(target)
                kept.append(i)
            except ValueError as problem:
                problems.append((i, str(problem)))
        shapes = pa.array([list(p.shape) for p in pixels], pa.list_(pa.int32()))
        content = pa.array([p.tobytes() for p in pixels], pa.large_binary())
        samples = pa.table({"pixels": content, "shape": shapes, "target": pa.array(targets, pa.list_(pa.float64()))})
        ones = np.ones(len(kept))
        return Encoded(samples, np.array(kept, np.int64), ones.astype(np.int64), ones, tuple(problems))

    def collate(self, samples: pa.Table) -> Batch:
        """pixel_values float (B, C, H, W); labels (B,) or, multi-label, (B, classes)."""
        import torch

        labels = self.labels.tensor(samples.column("target"))
        return Batch({"pixel_values": self._pixels.floats(samples)}, labels, torch.ones(len(samples)))

    def head(self) -> dict[str, object]:
        return self.labels.config()

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        return self.labels.sample_losses(logits, labels)

    def metrics(self, device: "torch.device") -> "TaskMetrics":
        return self.labels.metrics(device)

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        return self.labels.decode(logits)

    def verdicts(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[Verdict]:
        return [Verdict(*answer) for answer in self.labels.answers(logits, labels)]

    def show(self, row: Mapping[str, object]) -> Shown:
        cell = row[self.params.image]
        path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
        return Shown({self.params.image: str(path or "picture")}, thumbnail(image_bytes(cell)))

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Noisy pictures of 16 x 16, bright in their upper half (a) or in their lower half (b)."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, rows)
        pictures = [{"bytes": example_picture(rng, int(label)), "path": None} for label in labels]
        return pa.table({self.params.image: pictures, self.params.label: [("a", "b")[i] for i in labels]})


TASK = ImageClassification
