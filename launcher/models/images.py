"""Images from table cells: decoded, augmented and resized in data workers, scaled to floats in train workers."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from launcher.models.cells import CellSource, read_cell

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BaseImageProcessor


# Formats of photographs and scans. Pillow's others start programs (EPS: Ghostscript) or have rarely audited decoders.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Pillow only warns of a decompression bomb above this (`Image.MAX_IMAGE_PIXELS`), and raises above twice as much.
_MAX_PIXELS = 89_478_485


class _UnusableImageError(ValueError):
    """Image that can be decoded but not used."""


def open_image(content: bytes, channels: int) -> "Image":
    """Decode an image to 8 bits per channel, rotated as its EXIF data says, transparent parts on white.

    Args:
        content: Image file.
        channels: Number of channels: 1 for grey, 3 for colour.

    Raises:
        ValueError: The image cannot be decoded or used.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    # Registers all plugins: `Image.OPEN` lacks the rarer ones before. Formats that this build lacks (AVIF) are left
    # out, as `Image.open` of Pillow 13 raises KeyError for them.
    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(content), formats=known) as file:
            # The size is in the header: nothing is decoded yet.
            if file.width * file.height > _MAX_PIXELS:
                raise _UnusableImageError(
                    f"has {file.width} x {file.height} pixels, more than {_MAX_PIXELS:,}; make it smaller"
                )
            # In this order: 16 bits would be clipped by the conversions that follow, and transparency lost by the last
            # one.
            image = _on_white(_to_8_bits(ImageOps.exif_transpose(file)))
            return image.convert("L" if channels == 1 else "RGB")
    except (_UnusableImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"is not a picture ({len(content)} bytes of no known format)") from error
    # On corrupt bytes decoders raise anything (struct.error, SyntaxError).
    except Exception as error:
        raise ValueError(f"cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0]})") from error


def _to_8_bits(image: "Image") -> "Image":
    """Scale a grey image of 16 bits to 8; Pillow's `convert` would clip its values at 255.

    Raises:
        ValueError: The values have no known scale.
    """
    from PIL import Image

    if image.mode == "F":
        raise _UnusableImageError("holds floating-point pixels, whose scale is not known; save it with 8 or 16 bits")
    # Modes of 16 bits are `I;16` and its byte orders; `I` has 32 bits.
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise _UnusableImageError("holds 32-bit pixels, whose scale is not known; save it with 8 or 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def _on_white(image: "Image") -> "Image":
    """Put an image with transparent parts on white; `convert` would reveal the arbitrary colours under them."""
    from PIL import Image

    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    transparent = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)


class Augment(BaseModel):
    """Random augmentation of training images; the defaults change nothing."""

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
    """Return an augmented image, a function of the arguments only.

    The crop is Inception's (Szegedy et al. 2015, arXiv:1409.4842): a random share of the area, sides 3:4 to 4:3.

    Args:
        image: Decoded image.
        change: Ranges of the augmentation.
        seed: Seed of this image in this epoch.
    """
    from PIL import Image, ImageEnhance

    # PCG64 by name: `default_rng` may change its generator with a version of numpy.
    rng = np.random.Generator(np.random.PCG64(seed))
    # All eight numbers are drawn whatever is switched on, so that switching one on leaves the others as they were.
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
    """Conversion of image cells to the pixels of one model.

    Args:
        processor: Image processor of the model, with the Pillow backend.
        channels: Number of channels: 1 for grey, 3 for colour.
        column: Image column, for messages.
        source: Directories from which files may be read.
    """

    processor: "BaseImageProcessor"
    channels: int
    column: str
    source: CellSource

    def encode(self, cell: object, change: Augment, seed: int | None) -> npt.NDArray[np.uint8]:
        """Return the pixels of a cell, uint8 (C, H, W), resized but not scaled.

        Args:
            cell: Content, path or {bytes, path} (`read_cell`).
            change: Ranges of the augmentation.
            seed: Seed of the augmentation; None does not augment.

        Raises:
            ValueError: The cell does not hold an image that can be used.
        """
        try:
            image = open_image(read_cell(cell, self.source), self.channels)
        except ValueError as problem:
            raise ValueError(f"{self.column} {problem}") from problem
        image = image if seed is None else augmented(image, change, seed)
        # Adds the channel axis of a grey image.
        array = np.asarray(image).reshape(image.height, image.width, -1)
        # Samples are stored and sent as bytes, a quarter of the size of floats; `floats` does the scaling.
        features = self.processor(array, input_data_format="channels_last", do_rescale=False, do_normalize=False)
        return np.asarray(features["pixel_values"][0]).astype(np.uint8)

    def floats(self, samples: pa.Table) -> "torch.Tensor":
        """Return pixels scaled and normalized as the processor says, float32 (B, C, H, W).

        Args:
            samples: B rows with `pixels` (bytes) and `shape` (the same in all rows).
        """
        import torch

        content, shape = b"".join(samples.column("pixels").to_pylist()), samples.column("shape")[0].as_py()
        # A bytearray, because torch warns of a tensor on read-only bytes. Floats are made here, in the train worker.
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(len(samples), *shape).float()
        settings = self.processor.to_dict()
        if settings.get("do_rescale"):
            pixels *= settings["rescale_factor"]
        if settings.get("do_normalize"):
            mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / std
        return pixels


def example_picture(rng: np.random.Generator, low: int) -> bytes:
    """Return a noisy PNG of 16 x 16 pixels, brighter in its upper half (`low` 0) or in its lower half (1)."""
    from PIL import Image

    pixels = rng.integers(0, 120, (16, 16, 3))
    pixels[8 * low : 8 * low + 8] += 100
    Image.fromarray(pixels.astype(np.uint8)).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


def thumbnail(content: bytes, side: int = 160) -> bytes:
    """Return an image as a small PNG or JPEG for the report; a small image is returned as it is."""
    image = open_image(content, 3)
    if max(image.size) <= side and len(content) < 20_000 and content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0"):
        return content
    image.thumbnail((side, side))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=85)
    return sink.getvalue()
