"""From a file's content to an image."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from fixup_core.errors import UserError

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"})


class CorruptImageError(UserError):
    """A file that is not an image, or only part of one."""


def read_image(name: str, content: bytes) -> Image.Image:
    """The RGB image in a file's content, turned upright as its EXIF data say.

    Raises:
        CorruptImageError: The content is not an image; the message has ``name``.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("ignore")  # of EXIF data that cannot be read
            return _as_bytes(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # decoders raise what they like: a hostile header, a struct.error
        raise CorruptImageError(
            f"{name} is not an image that can be read: remove it, or leave such files out with "
            "--data.skip_corrupt true"
        ) from error


def _as_bytes(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits become 8: Pillow would clip them, and most images turn white."""
    if image.mode == "F":
        raise ValueError("floating-point values have no brightness of their own")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64) / 65535
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
