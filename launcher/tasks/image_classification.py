"""Image classification (ResNet, ViT): a picture to one class, or several. Data workers and train workers."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from launcher.models.cells import cell_bytes
from launcher.models.images import Augment, Pixels, example_picture, thumbnail
from launcher.models.pretrained import load_config, load_image_processor
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Batch, Encoded, RowInputs
from launcher.tasks.metrics.labels import Labels
from launcher.tasks.targets import LabelParams, TargetTask

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


class ImageParams(LabelParams):
    """`task:` with `type: image-classification`."""

    image: str = "image"
    """Column with pictures: file contents, {bytes, path}, or absolute paths or URIs, below the directories of the data
    or of `data.files_below`."""
    label: str = "label"
    """Column that holds the label: an int or string; a list of them for multi-label."""
    kind: Literal["single-label", "multi-label"] = "single-label"
    """One class per picture, or any number."""
    augment: Augment = Augment()
    """How training pictures are changed at random; the same on any cluster."""


class ImageClassification(TargetTask):
    """Fine-tunes `AutoModelForImageClassification`. See `tasks/base.py` for what each method owes."""

    Params = ImageParams
    params: ImageParams
    auto_model = "AutoModelForImageClassification"
    from_scratch = "image"

    def __init__(self, params: ImageParams, model: ModelSpec, seed: int) -> None:
        names, weights = params.labels or (), params.ordered_weights
        self.labels = Labels(params.label, params.kind, names, weights, params.label_smoothing)
        super().__init__(params, model, seed, self.labels)
        self.input_columns = (params.image,)
        self.augments = params.augment != Augment()

    @cached_property  # once per process
    def _pixels(self) -> Pixels:
        channels = getattr(load_config(self.model), "num_channels", 3)
        return Pixels(load_image_processor(self.model), int(channels), self.params.image, self.places)

    def processor(self) -> "BaseImageProcessor":
        return self._pixels.processor

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        cells = rows.column(self.params.image).to_pylist()
        raw = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)
        kept, problems, targets = [], [], []
        pixels: list[npt.NDArray[np.uint8]] = []
        for i, cell in enumerate(cells):
            try:
                target = self.labels.target(raw[i]) if with_targets else []
                seed = None if noise is None else int(noise[i])
                ready = self._pixels.encode(cell, self.params.augment, seed)
                if pixels and ready.shape != pixels[0].shape:
                    # One batch has one shape: the processors of most models see to that.
                    raise ValueError(
                        f"{self.params.image} is {_size(ready)} for the model, where others are {_size(pixels[0])}, "
                        "and its processor does not make them alike; set do_resize and size in its "
                        "preprocessor_config.json"
                    )
                pixels.append(ready)
                targets.append(target)
                kept.append(i)
            except ValueError as problem:
                problems.append((i, str(problem)))
        shapes = pa.array([list(p.shape) for p in pixels], pa.list_(pa.int32()))
        content = pa.array([p.tobytes() for p in pixels], pa.large_binary())
        samples = pa.table({"pixels": content, "shape": shapes, "target": pa.array(targets, pa.list_(pa.float64()))})
        lengths = np.ones(len(kept), np.int64)
        return Encoded(
            samples, np.array(kept, np.int64), lengths, self.targets.sample_weights(targets), tuple(problems)
        )

    def collate(self, samples: pa.Table) -> Batch:
        """pixel_values float (B, C, H, W); labels (B,) or, multi-label, (B, classes)."""
        import torch

        labels = self.labels.tensor(samples.column("target"))
        return Batch({"pixel_values": self._pixels.floats(samples)}, labels, torch.ones(len(samples)))

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        cell = row[self.params.image]
        path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
        return RowInputs({self.params.image: str(path or "picture")}, thumbnail(cell_bytes(cell, self.places)))

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Noisy pictures of 16 x 16, bright in their upper half (a) or in their lower half (b)."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, rows)
        pictures = [{"bytes": example_picture(rng, int(label)), "path": None} for label in labels]
        return pa.table({self.params.image: pictures, self.params.label: [("a", "b")[i] for i in labels]})


def _size(pixels: npt.NDArray[np.uint8]) -> str:
    """Say the size of a picture (C, H, W), as people do."""
    return f"{pixels.shape[2]} x {pixels.shape[1]}"


TASK = ImageClassification
