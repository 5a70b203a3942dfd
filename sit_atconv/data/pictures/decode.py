"""Encoded picture -> uint8 RGB pixels: the only place that looks at PIL modes."""

import io
import re
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sit_atconv.data.pictures.formats import FORMATS
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.errors import InputError

# Errors from decoding bytes that are damaged, or made to exhaust memory.
UNDECODABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, RuntimeError)


_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_LIMIT = re.compile("data too large|text chunks", re.IGNORECASE)  # in Pillow's errors
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that Pillow limits, and pixels do not need


def decode_image(
    data: bytes | BinaryIO, where: str, options: SourceOptions, label: int | None = None, name: str | None = None
) -> SourceImage:
    """Decode a picture to uint8 (H, W, 3), as `options` say; an animation gives its first frame.

    `where` names it in errors, `name` in the result. Raises `InputError` when it cannot be decoded.
    """
    try:
        try:
            return _decode(data, where, options, label, name or where)
        except ValueError as error:  # an intact picture may hold more text than Pillow reads
            if not (isinstance(data, bytes) and data.startswith(_PNG) and _TEXT_LIMIT.search(str(error))):
                raise
            return _decode(_without_text(data), where, options, label, name or where)
    except UNDECODABLE as error:
        if isinstance(error, InputError):
            raise
        # Pillow's message contains a memory address, which differs in every run.
        unknown = "it is empty" if data == b"" else f"it is not a picture in one of the formats {', '.join(FORMATS)}"
        reason = unknown if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".")
        raise InputError(f"Cannot decode {where}: {reason}. Replace or remove the file.") from error


def _decode(data: bytes | BinaryIO, where: str, options: SourceOptions, label: int | None, name: str) -> SourceImage:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as picture:
        picture.load()
        turned, bits = _is_turned(picture), _used_bits(picture, data)
        if options.bits is not None and bits is not None and picture.mode == "RGB":
            raise InputError(
                f"{where} has 16-bit colours, of which Pillow reads the high byte only: save it with 8 bits."
            )
        upright = ImageOps.exif_transpose(picture) if turned and options.exif else picture
        return SourceImage(to_rgb(upright, where, options), label, name, turned, bits)


def to_rgb(picture: Image.Image, name: str, options: SourceOptions) -> np.ndarray:
    """Pixels of a loaded PIL picture as uint8 (H, W, 3). Alpha is dropped, as in ADM."""
    if picture.mode == "RGB":
        return np.array(picture)
    if not options.convert:
        raise InputError(
            f"{name} is not an RGB picture with 8 bits a channel (PIL mode '{picture.mode}'). "
            "Metrics compare RGB pictures only: convert the file, or build the set with sit_atconv.data.prepare."
        )
    if picture.mode == "F":
        raise InputError(f"{name} holds floating-point pixels, whose range is unknown: save it with 8 or 16 bits.")
    if picture.mode.startswith("I"):
        return np.repeat(_to_8_bits(np.asarray(picture), options.bits or 16, name)[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def _to_8_bits(grey: np.ndarray, bits: int, name: str) -> np.ndarray:
    """Greyscale of `bits` bits to 8, rounded. PIL's own conversion would clip everything above 255 to white."""
    white = 2**bits - 1
    if bits < 16 and grey.max() > white:
        raise InputError(f"{name} has grey values up to {grey.max()}, more than {bits} bits: leave out --bits.")
    return np.round(np.clip(grey, 0, white) * (255.0 / white)).astype(np.uint8)


def _used_bits(picture: Image.Image, data: bytes | BinaryIO) -> int | None:
    """How many bits the brightest pixel of a 16-bit picture needs; None for pictures of 8 bits."""
    if picture.mode.startswith("I"):
        return int(np.asarray(picture).max(initial=0)).bit_length()
    if isinstance(data, bytes) and data.startswith(_PNG) and data[24:25] == b"\x10" and picture.mode == "RGB":
        return int(np.asarray(picture).max(initial=0)).bit_length() + 8  # Pillow keeps the high byte
    return None


def _is_turned(picture: Image.Image) -> bool:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # damaged EXIF says nothing about the pixels
        return False


def _without_text(png: bytes) -> bytes:
    """A PNG without its texts and colour profile."""
    kept, start = [png[:8]], 8
    while start < len(png):
        stop = start + 12 + int.from_bytes(png[start : start + 4], "big")  # length, kind, data, checksum
        if png[start + 4 : start + 8] not in _PNG_TEXT:
            kept.append(png[start:stop])
        start = stop
    return b"".join(kept)
