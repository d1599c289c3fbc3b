"""Pictures from cells, and their augmentation (`launcher/models/images.py`)."""

import io
import json
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from launcher.models.cells import CellSource, read_cell
from launcher.models.images import Augment, augmented, example_picture, open_image, thumbnail
from launcher.spec.model import ModelSpec
from launcher.tasks.image_classification import ImageClassification, ImageParams


@pytest.fixture
def picture() -> bytes:
    return example_picture(np.random.default_rng(0), 1)


def test_pictures_are_read_from_each_form_of_cell(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture)
    path = str(tmp_path / "x.png")
    cells: list[object] = [picture, path, {"bytes": picture, "path": None}, {"bytes": None, "path": path}]
    for cell in cells:
        assert read_cell(cell, CellSource((str(tmp_path),))) == picture
    assert open_image(picture, 3).size == (16, 16)
    assert open_image(picture, 1).mode == "L"


def test_a_cell_without_a_picture_is_a_bad_row(picture: bytes, tiny_models: dict[str, Path]) -> None:
    task = ImageClassification(
        ImageParams(labels=("a", "b")), ModelSpec(name=str(tiny_models["image-classification"])), 0
    )
    cells = [picture, None, b"GIF89a but not really", picture[:60], b""]
    encoded = task.encode(pa.table({"image": pa.array(cells, pa.binary()), "label": ["a"] * 5}), True)
    assert encoded.valid_rows.tolist() == [0]
    reasons = [reason for _, reason in encoded.problems]
    assert reasons[0] == "image is null"
    assert all(reason.startswith(("image is not a picture (", "image cannot be decoded (")) for reason in reasons[1:])


def _file(image: Image.Image, kind: str = "PNG") -> bytes:
    image.save(sink := io.BytesIO(), kind)
    return sink.getvalue()


def test_grey_of_16_bits_keeps_its_shades() -> None:
    """Check what Pillow's own conversion clips to 255."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        shades = np.asarray(open_image(_file(Image.fromarray(ramp), kind), 1)).ravel()
        assert shades.tolist() == list(range(256))
    with pytest.raises(ValueError, match="holds floating-point pixels, whose scale is not known"):
        open_image(_file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 1)
    with pytest.raises(ValueError, match="holds 32-bit pixels"):
        open_image(_file(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode: str) -> None:
    """Draw in the alpha channel alone, over hidden black."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:4] = 255
    drawn = np.asarray(open_image(_file(_drawing(alpha, mode)), 3))
    assert (drawn[2:4] == 0).all() and (drawn[:2] == 255).all() and (drawn[4:] == 255).all()


def _drawing(alpha: np.ndarray, mode: str) -> Image.Image:
    if mode == "P":
        image = Image.fromarray((alpha == 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.info["transparency"] = 1
        return image
    black = np.zeros((*alpha.shape, 1 if mode == "LA" else 3), np.uint8)
    return Image.fromarray(np.concatenate([black, alpha[..., None]], axis=2), mode)


def test_eps_is_refused() -> None:
    """Refuse a format that Pillow gives to Ghostscript."""
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="of no known format"):
        open_image(drawing, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "DDS"])
def test_corrupt_files_are_pictures_or_bad_rows(kind: str) -> None:
    if kind not in Image.SAVE and not Image.init() and kind not in Image.SAVE:
        return
    rng = np.random.default_rng(7)
    content = np.frombuffer(_file(Image.fromarray(rng.integers(0, 255, (9, 7, 3), np.uint8)), kind), np.uint8)
    for _ in range(150):
        changed = content.copy()
        places = rng.integers(0, len(changed), 4)
        changed[places] = rng.integers(0, 255, 4)
        with suppress(ValueError):
            open_image(changed[: rng.integers(1, len(changed) + 1)].tobytes(), 3)


def test_a_picture_with_too_many_pixels_is_a_bad_row() -> None:
    huge = _file(Image.new("1", (1 << 14, (1 << 13) + 1)))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"has 16384 x 8193 pixels, more than 89,478,485"):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        open_image(huge, 1)


def test_augmentation_is_a_function_of_the_seed(picture: bytes) -> None:
    image = open_image(picture, 3)
    change = Augment(crop_scale_min=0.5, flip_fraction=0.5, rotate_degrees=20, brightness=0.3)
    first, again, second = (np.asarray(augmented(image, change, seed).resize((16, 16))) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert np.array_equal(np.asarray(augmented(image, Augment(), 1)), np.asarray(image))
    flips = [np.array_equal(np.asarray(augmented(image, Augment(flip_fraction=0.3), i)), image) for i in range(300)]
    assert 180 < sum(flips) < 240


def test_thumbnails_are_small(picture: bytes) -> None:
    assert thumbnail(picture) == picture
    Image.new("RGB", (2000, 1000), "red").save(sink := io.BytesIO(), "PNG")
    small = open_image(thumbnail(sink.getvalue()), 3)
    assert max(small.size) == 160


def test_pictures_of_several_shapes_are_bad_rows(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Use a processor that does not resize: the pixels of a batch need one shape."""
    folder = shutil.copytree(tiny_models["image-classification"], tmp_path / "vit")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    task = ImageClassification(ImageParams(labels=("a", "b")), ModelSpec(name=str(folder)), 0)
    cells = [_file(Image.new("RGB", size, "red")) for size in ((16, 32), (32, 16), (16, 32))]
    encoded = task.encode(pa.table({"image": pa.array(cells, pa.binary()), "label": ["a"] * 3}), True)
    assert encoded.valid_rows.tolist() == [0, 2]
    assert encoded.problems[0][1].startswith(
        "image is 32 x 16 for the model, where others are 16 x 32, and its processor"
    )
