"""Pictures from cells, and their augmentation (`launcher/models/images.py`)."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from launcher.models.images import Augment, augmented, example_picture, image_bytes, open_image, thumbnail
from launcher.spec.model import ModelSpec
from launcher.tasks.image_classification import ImageClassification, ImageParams


@pytest.fixture
def picture() -> bytes:
    return example_picture(np.random.default_rng(0), 1)


def test_a_picture_may_be_stored_in_several_ways(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture)
    path = str(tmp_path / "x.png")
    cells: list[object] = [picture, path, {"bytes": picture, "path": None}, {"bytes": None, "path": path}]
    for cell in cells:
        assert image_bytes(cell) == picture
    assert open_image(picture, 3).size == (16, 16)
    assert open_image(picture, 1).mode == "L"


def test_what_is_no_picture_is_a_bad_row(picture: bytes, tiny_models: dict[str, Path]) -> None:
    task = ImageClassification(
        ImageParams(labels=("a", "b")), ModelSpec(name=str(tiny_models["image-classification"])), 0
    )
    cells = [picture, None, b"GIF89a but not really", picture[:60], b""]
    encoded = task.encode(pa.table({"image": pa.array(cells, pa.binary()), "label": ["a"] * 5}), True)
    assert encoded.kept.tolist() == [0]
    reasons = [reason for _, reason in encoded.problems]
    assert reasons[0] == "image is null"
    assert all(reason.startswith(("image is no picture (", "image cannot be decoded (")) for reason in reasons[1:])


def test_augmentation_is_a_function_of_the_seed(picture: bytes) -> None:
    image = open_image(picture, 3)
    change = Augment(crop_scale_min=0.5, flip_fraction=0.5, rotate_degrees=20, brightness=0.3)
    one, again, other = (np.asarray(augmented(image, change, seed).resize((16, 16))) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.array_equal(np.asarray(augmented(image, Augment(), 1)), np.asarray(image))
    flips = [np.array_equal(np.asarray(augmented(image, Augment(flip_fraction=0.3), i)), image) for i in range(300)]
    assert 180 < sum(flips) < 240


def test_thumbnails_are_small(picture: bytes) -> None:
    assert thumbnail(picture) == picture
    Image.new("RGB", (2000, 1000), "red").save(sink := io.BytesIO(), "PNG")
    small = open_image(thumbnail(sink.getvalue()), 3)
    assert max(small.size) == 160
