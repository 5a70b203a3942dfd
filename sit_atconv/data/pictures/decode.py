"""Encoded picture -> uint8 RGB pixels: the only place that looks at PIL modes."""

import io
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from sit_atconv.errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
LOSSY_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".webp"})
LOSSY_FORMATS = frozenset({"JPEG", "WEBP", "MPO"})
# A file may hold another format than its name says; formats not listed here (AVIF, PDF, …) would count as lossless.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF")
# Errors from decoding bytes that are damaged, or made to exhaust memory.
UNDECODABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, RuntimeError)


def decode_image(data: bytes | BinaryIO, name: str, convert: bool) -> np.ndarray:
    """Decode a picture to uint8 (H, W, 3).

    With `convert`, greyscale, palette, CMYK, alpha and 16-bit pictures become RGB; without it they are refused. EXIF
    orientation is not applied, as in ADM; an animation gives its first frame. Raises `InputError` naming the picture
    when it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as picture:
            picture.load()
            return to_rgb(picture, name, convert)
    except UNDECODABLE as error:
        if isinstance(error, InputError):
            raise
        # Pillow's message contains a memory address, which differs in every run.
        unknown = "it is empty" if data == b"" else f"it is not a picture in one of the formats {', '.join(FORMATS)}"
        reason = unknown if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".")
        raise InputError(f"Cannot decode {name}: {reason}. Replace or remove the file.") from error


def to_rgb(picture: Image.Image, name: str, convert: bool) -> np.ndarray:
    """Pixels of a loaded PIL picture as uint8 (H, W, 3); `convert` as in `decode_image`. Alpha is dropped (as ADM)."""
    if picture.mode == "RGB":
        return np.array(picture)
    if not convert:
        raise InputError(
            f"{name} is not an RGB picture with 8 bits a channel (PIL mode '{picture.mode}'). "
            "Metrics compare RGB pictures only: convert the file, or build the set with sit_atconv.data.prepare."
        )
    if picture.mode == "F":
        raise InputError(f"{name} holds floating-point pixels, whose range is unknown: save it with 8 or 16 bits.")
    if picture.mode.startswith("I"):
        return np.repeat(_high_byte(np.asarray(picture))[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def _high_byte(grey: np.ndarray) -> np.ndarray:
    """16-bit greyscale to 8 bits: v/257, rounded. PIL's own conversion would clip everything above 255 to white."""
    return np.round(np.clip(grey, 0, 65535) / 257.0).astype(np.uint8)
