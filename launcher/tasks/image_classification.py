"""Image classification (ResNet, ViT): a picture to one class or several. Runs wherever a task runs (`base.py`).

Read `models/images.py` next for how pictures are decoded, augmented and scaled.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from launcher.models.cells import read_cell
from launcher.models.images import Augment, Pixels, example_picture, thumbnail
from launcher.models.pretrained import load_config, load_image_processor
from launcher.spec.model import ModelSpec
from launcher.tasks.metrics.labels import Labels
from launcher.tasks.results import RowInputs
from launcher.tasks.samples import Batch, Encoded
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
    """Fine-tuning of `AutoModelForImageClassification`."""

    Params = ImageParams
    params: ImageParams
    auto_model = "AutoModelForImageClassification"
    from_scratch = "image"

    def __init__(self, params: ImageParams, model: ModelSpec, seed: int) -> None:
        names, weights = params.labels or (), params.ordered_weights
        self.labels = Labels(params.label, params.kind, names, weights, params.label_smoothing)
        super().__init__(params, model, seed, self.labels)
        self.input_columns = (params.image,)
        # The default changes no picture; samples that need no noise are encoded once and cached.
        self.augments = params.augment != Augment()

    @cached_property
    def _pixels(self) -> Pixels:
        channels = getattr(load_config(self.model), "num_channels", 3)
        return Pixels(load_image_processor(self.model), int(channels), self.params.image, self.cell_source)

    def processor(self) -> "BaseImageProcessor":
        return self._pixels.processor

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        cells = rows.column(self.params.image).to_pylist()
        raw_labels = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)
        valid_rows, problems, targets = [], [], []
        pixels: list[npt.NDArray[np.uint8]] = []
        for i, cell in enumerate(cells):
            try:
                # The label first: a bad one costs nothing, while a picture must be read and decoded.
                target = self.labels.target(raw_labels[i]) if with_targets else []
                seed = None if noise is None else int(noise[i])
                array = self._pixels.encode(cell, self.params.augment, seed)
                # A batch has one shape, and most processors ensure it. `Pixels.floats` takes the shape of the first
                # sample for all: pictures of swapped sides would be misread without an error.
                if pixels and array.shape != pixels[0].shape:
                    raise ValueError(
                        f"{self.params.image} is {_size(array)} for the model, where others are {_size(pixels[0])}, "
                        "and its processor does not make them alike; set do_resize and size in its "
                        "preprocessor_config.json"
                    )
                # The three lists grow together, after all that may raise: a bad row must not leave an entry in one of
                # them.
                pixels.append(array)
                targets.append(target)
                valid_rows.append(i)
            except ValueError as problem:
                problems.append((i, str(problem)))
        shapes = pa.array([list(p.shape) for p in pixels], pa.list_(pa.int32()))
        # `large_binary` has 64-bit offsets: the pixels of a window exceed the 2 GiB of `binary`.
        content = pa.array([p.tobytes() for p in pixels], pa.large_binary())
        samples = pa.table({"pixels": content, "shape": shapes, "target": pa.array(targets, pa.list_(pa.float64()))})
        lengths, weights = np.ones(len(valid_rows), np.int64), self.targets.sample_weights(targets)
        return Encoded(samples, np.array(valid_rows, np.int64), lengths, weights, tuple(problems))

    def collate(self, samples: pa.Table) -> Batch:
        """Return pixel_values, float32 (B, C, H, W); labels are (B,), or (B, classes) if multi-label."""
        import torch

        labels = self.labels.tensor(samples.column("target"))
        return Batch({"pixel_values": self._pixels.floats(samples)}, labels, torch.ones(len(samples)))

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        cell = row[self.params.image]
        # Read from the storage again: samples hold resized pixels only, and the report shows few rows.
        path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
        return RowInputs({self.params.image: str(path or "picture")}, thumbnail(read_cell(cell, self.cell_source)))

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return noisy pictures of 16 x 16 pixels, bright in the upper half (class a) or in the lower half (b)."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, rows)
        pictures = [{"bytes": example_picture(rng, int(label)), "path": None} for label in labels]
        return pa.table({self.params.image: pictures, self.params.label: [("a", "b")[i] for i in labels]})


def _size(pixels: npt.NDArray[np.uint8]) -> str:
    """Return the size of a picture (C, H, W) as width x height."""
    return f"{pixels.shape[2]} x {pixels.shape[1]}"


TASK = ImageClassification
