"""Files become upright images of eight bits, or are named as corrupt."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vision.data.pictures import CorruptImageError, read_image


def _saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_grey_values_of_16_bits_keep_their_brightness(kind: str) -> None:
    values = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    pixels = np.asarray(read_image("x", _saved(Image.fromarray(values), kind)))
    assert pixels.shape == (4, 4, 3)
    assert np.abs(pixels[..., 0].astype(float) - values / 257).max() <= 0.5


def test_an_image_is_turned_upright() -> None:
    values = np.arange(32, dtype=np.uint8).reshape(4, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    plain = np.asarray(read_image("x", _saved(Image.fromarray(values))))
    turned = np.asarray(read_image("x", _saved(Image.fromarray(values), exif=exif)))
    assert np.array_equal(turned, np.rot90(plain, -1))


def _chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def _png(header: bytes, *chunks: bytes) -> bytes:
    end = _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(chunks) + end


HEADER = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
GIANT = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
INFLATES = b"key\0\0" + zlib.compress(bytes(200_000_000), 9)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        _png(GIANT),
        _png(HEADER[:5]),
        _png(HEADER, _chunk(b"zTXt", INFLATES), _chunk(b"IDAT", zlib.compress(b"\0\0"))),
        _saved(Image.new("RGB", (64, 64)))[:50],
    ],
    ids=["empty", "text", "giant", "short header", "inflating text", "cut"],
)
def test_a_hostile_file_is_corrupt(content: bytes) -> None:
    with pytest.raises(CorruptImageError, match=r"^bad\.png is not an image"):
        read_image("bad.png", content)
