"""Formats of picture files: by which names they are looked for, which contents are read, which ones lose detail."""

import importlib.util
import os

from PIL import features

if importlib.util.find_spec("pillow_heif"):  # teaches Pillow the pictures of Apple's phones
    import pillow_heif

    pillow_heif.register_heif_opener()
    _READ = {"heif", *features.get_supported()}
else:
    _READ = set(features.get_supported())

# What Pillow reads in some installations only: suffix -> (name of the format, what to install).
_OPTIONAL = {
    ".webp": ("webp", "a Pillow with WebP"),
    ".avif": ("avif", "pillow>=11.3"),
    ".heic": ("heif", "pillow-heif"),
    ".heif": ("heif", "pillow-heif"),
}
_THERE = {suffix: name for suffix, (name, _) in _OPTIONAL.items() if name in _READ}

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", *_THERE)
)
LOSSY_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", *_OPTIONAL))
LOSSY_FORMATS = frozenset(("JPEG", "MPO", "WEBP", "AVIF", "HEIF"))
# A file may hold another format than its name says; formats not listed here (PDF, …) would count as lossless.
FORMATS = (
    "PNG", "JPEG", "BMP", "DIB", "PPM", "TIFF", "GIF", *sorted({name.upper() for name in _THERE.values()})
)  # fmt: skip
UNREADABLE = {suffix: advice for suffix, (name, advice) in _OPTIONAL.items() if name not in _READ}


def suffix_of(name: str) -> str:
    """The ending of a file's name, in small letters: ".jpg". There may be millions, for which pathlib is slow."""
    return os.path.splitext(name)[1].lower()
