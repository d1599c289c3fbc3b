"""Pictures from table cells, augmented and made ready for a model. Runs in data workers, and train workers (floats)."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from launcher.models.cells import CellSource, cell_bytes

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BaseImageProcessor


# Formats of photographs and scans. Others start programs (EPS: Ghostscript) or have decoders that few have looked at.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Where Pillow begins to warn of decompression bombs.
_MOST_PIXELS = 89_478_485


class _Unusable(ValueError):
    """A picture that can be decoded, and is of no use."""


def open_image(content: bytes, channels: int) -> "Image":
    """Decode a picture, upright, in grey (1 channel) or colour (3), 8 bits each, on white where it is transparent.

    Raises:
        ValueError: it cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(content), formats=known) as file:
            if file.width * file.height > _MOST_PIXELS:
                raise _Unusable(f"has {file.width} x {file.height} pixels, more than {_MOST_PIXELS:,}; make it smaller")
            upright = _on_white(_in_8_bits(ImageOps.exif_transpose(file)))
            return upright.convert("L" if channels == 1 else "RGB")
    except (_Unusable, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"is no picture ({len(content)} bytes of no known format)") from error
    except Exception as error:  # decoders of bytes that nobody vouches for raise whatever they like
        raise ValueError(f"cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0]})") from error


def _in_8_bits(image: "Image") -> "Image":
    """Scale the grey of 16 bits, which Pillow's `convert` would cut off at 255.

    Raises:
        ValueError: Its values have no known scale.
    """
    from PIL import Image

    if image.mode == "F":
        raise _Unusable("holds floating-point pixels, whose scale is not known; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise _Unusable("holds 32-bit pixels, whose scale is not known; save it with 8 or 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def _on_white(image: "Image") -> "Image":
    """Lay a picture with transparent parts on white: what lies under them is no part of it."""
    from PIL import Image

    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)


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
        places: Where the files may lie that cells name.
    """

    processor: "BaseImageProcessor"
    channels: int
    column: str
    places: CellSource

    def encode(self, cell: object, change: Augment, seed: int | None) -> npt.NDArray[np.uint8]:
        """uint8 (C, H, W), augmented if there is a seed.

        Raises:
            ValueError: the cell holds no picture.
        """
        try:
            image = open_image(cell_bytes(cell, self.places), self.channels)
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
