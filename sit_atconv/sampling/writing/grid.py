"""Grids of many samples in one image."""

from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from torchvision.utils import make_grid

from sit_atconv.runtime.whole_files import whole_file

_SMALLEST_CELL = 48  # pixels: smaller images are enlarged by an integer factor


def save_grid(images: Tensor, columns: int, path: Path, caption: str | None = None) -> None:
    """Write images (n, 3, H, W) uint8 row by row to a PNG, `columns` per row; small ones are enlarged (bicubic).

    A caption is written below them.
    """
    factor = -(-_SMALLEST_CELL // min(images.shape[-2:]))
    if factor > 1:
        images = resize(images, [factor * side for side in images.shape[-2:]], InterpolationMode.BICUBIC)
    sheet = Image.fromarray(make_grid(images, nrow=columns, padding=2, pad_value=128).permute(1, 2, 0).numpy())
    if caption is not None:
        sheet = _with_caption(sheet, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        sheet.save(file, "PNG")


def _with_caption(sheet: Image.Image, caption: str) -> Image.Image:
    """The sheet with black text on white below it, in as many lines as its width asks for."""
    font = ImageFont.load_default()
    lines = wrap(caption, max(1, int((sheet.width - 4) / font.getlength("n"))))
    height = int(font.getbbox("Ag")[3]) + 3
    whole = Image.new("RGB", (sheet.width, sheet.height + height * len(lines) + 4), "white")
    whole.paste(sheet)
    draw = ImageDraw.Draw(whole)
    for i, line in enumerate(lines):
        draw.text((2, sheet.height + 2 + height * i), line, "black", font=font)
    return whole


def pick_for_grid(labels: Tensor | None, count: int, rows: int = 10, columns: int = 10) -> list[int]:
    """Numbers of the samples for a grid: row r holds the first samples of the r-th class that is present.

    `labels` is (count,), or None for unlabelled samples, which are taken in order. A class with fewer than `columns`
    samples shortens all rows.
    """
    if labels is None:
        return list(range(min(count, rows * columns)))
    classes = labels.unique()[:rows]
    members = [(labels == c).nonzero().flatten().tolist() for c in classes]
    columns = min(columns, min(map(len, members)))
    return [index for row in members for index in row[:columns]]
