"""Pictures from table cells, augmented and made ready for a model. Runs in data workers, and train workers (floats)."""

import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import BaseModel, ConfigDict, Field

from launcher.arrays import shown
from launcher.errors import RunError
from launcher.storage import open_uri, os_reason

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BaseImageProcessor


def image_bytes(cell: object) -> bytes:
    """The picture file in a cell.

    Args:
        cell: the content; a path or URI; or {bytes, path} as `datasets` stores images.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if isinstance(cell, dict):
        if not {"bytes", "path"} & set(cell):
            raise ValueError(f"holds {', '.join(map(str, cell))}, but neither bytes nor path")
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise ValueError("is null" if cell is None else f"is {type(cell).__name__}, which is no picture")
    try:
        fs, path = open_uri(cell)
        if isinstance(fs, pafs.LocalFileSystem) and not os.path.isfile(path):  # a device or a pipe might never end
            raise ValueError(f"is {shown(cell)}, which is no file here")
        with fs.open_input_file(path) as file:
            return bytes(file.read())
    except (OSError, RunError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else error.message
        raise ValueError(f"is {shown(cell)}, which cannot be read ({reason})") from error


def open_image(content: bytes, channels: int) -> "Image":
    """A decoded picture, upright, in grey (1 channel) or colour (3).

    Raises:
        ValueError: it cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as file:
            return ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"is no picture ({len(content)} bytes of no known format)") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded ({str(error).splitlines()[0]})") from error


class Augment(BaseModel):
    """How training pictures are changed at random; the defaults change nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    crop_scale_min: float = Field(default=1.0, gt=0.0, le=1.0)
    """Smallest share of the area that a random crop keeps."""
    flip_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of pictures that are mirrored left to right."""
    rotate_degrees: float = Field(default=0.0, ge=0.0, le=180.0)
    """Largest turn to either side."""
    brightness: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Largest relative change of brightness, and of contrast."""


def augmented(image: "Image", change: Augment, seed: int) -> "Image":
    """A changed picture: a function of its arguments alone.

    The crop is Inception's (Szegedy et al. 2015, arXiv:1409.4842): a random share of the area, sides 3:4 to 4:3.
    """
    from PIL import Image, ImageEnhance

    rng = np.random.Generator(np.random.PCG64(seed))
    share, ratio, x, y, flip, turn, light, contrast = rng.random(8)
    if change.rotate_degrees:
        image = image.rotate((2 * turn - 1) * change.rotate_degrees, Image.Resampling.BILINEAR)
    if change.crop_scale_min < 1:
        area = image.width * image.height * (change.crop_scale_min + share * (1 - change.crop_scale_min))
        aspect = (image.width / image.height) * np.exp((2 * ratio - 1) * np.log(4 / 3))
        width = min(image.width, max(1, round(np.sqrt(area * aspect))))
        height = min(image.height, max(1, round(np.sqrt(area / aspect))))
        left, top = int(x * (image.width - width + 1)), int(y * (image.height - height + 1))
        image = image.crop((left, top, left + width, top + height))
    if flip < change.flip_fraction:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if change.brightness:
        image = ImageEnhance.Brightness(image).enhance(1 + (2 * light - 1) * change.brightness)
        image = ImageEnhance.Contrast(image).enhance(1 + (2 * contrast - 1) * change.brightness)
    return image


@dataclass(frozen=True)
class Pixels:
    """Pictures as one model takes them.

    Args:
        processor: the model's, on Pillow.
        channels: 1 for grey, 3 for colour.
        column: where the pictures come from, for messages.
    """

    processor: "BaseImageProcessor"
    channels: int
    column: str

    def encode(self, cell: object, change: Augment, seed: int | None) -> npt.NDArray[np.uint8]:
        """uint8 (C, H, W), augmented if there is a seed.

        Raises:
            ValueError: the cell holds no picture.
        """
        try:
            image = open_image(image_bytes(cell), self.channels)
        except ValueError as problem:
            raise ValueError(f"{self.column} {problem}") from problem
        image = image if seed is None else augmented(image, change, seed)
        array = np.asarray(image).reshape(image.height, image.width, -1)  # a grey picture gets its channel axis
        # Bytes travel; they become floats behind the wire, at a quarter of the size.
        ready = self.processor(array, input_data_format="channels_last", do_rescale=False, do_normalize=False)
        return np.asarray(ready["pixel_values"][0]).astype(np.uint8)

    def floats(self, samples: pa.Table) -> "torch.Tensor":
        """float32 (B, C, H, W) of B rows with `pixels` and `shape`, scaled as the processor says."""
        import torch

        content, shape = b"".join(samples.column("pixels").to_pylist()), samples.column("shape")[0].as_py()
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(len(samples), *shape).float()
        how = self.processor.to_dict()
        if how.get("do_rescale"):
            pixels *= how["rescale_factor"]
        if how.get("do_normalize"):
            mean, std = (torch.tensor(how[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / std
        return pixels


def example_picture(rng: np.random.Generator, low: int) -> bytes:
    """A noisy PNG of 16 x 16 pixels, brighter in its upper half (`low` 0) or in its lower half (1)."""
    from PIL import Image

    pixels = rng.integers(0, 120, (16, 16, 3))
    pixels[8 * low : 8 * low + 8] += 100
    Image.fromarray(pixels.astype(np.uint8)).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


def thumbnail(content: bytes, side: int = 160) -> bytes:
    """A picture as a small PNG or JPEG for the report; small ones are kept as they are."""
    image = open_image(content, 3)
    if max(image.size) <= side and len(content) < 20_000 and content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0"):
        return content
    image.thumbnail((side, side))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=85)
    return sink.getvalue()
