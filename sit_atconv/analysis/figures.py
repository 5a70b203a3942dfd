"""Figures of the analyses: maps with arrows, and curves over layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sit_atconv.figures import pyplot_without_screen, save_figure

_PANEL = 1.7  # inches


def draw_maps(pictures: Tensor, rows: Sequence[Mapping[str, Any]], titles: Sequence[str], out: Path) -> None:
    """A row for each picture: the picture, then a panel for each layer.

    Args:
        pictures: (B, H, W) or (B, H, W, 3), in [0, 1].
        rows: for each picture "maps", arrays (h, w) of the layers, and "arrows", for each layer a list of pairs of
            (row, column), from and to.
        titles: of the layers.
        out: PNG file.
    """
    pyplot = pyplot_without_screen()
    shape = len(rows), len(titles) + 1
    size = (_PANEL * shape[1], _PANEL * shape[0] + 0.3)
    figure, axes = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for picture, row, line in zip(pictures, rows, axes, strict=True):
        line[0].imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
        for axis, values, arrows in zip(line[1:], row["maps"], row["arrows"], strict=True):
            axis.imshow(np.sqrt(values), cmap="magma")  # the root shows weak influences, too
            for (r0, c0), (r1, c1) in arrows:
                axis.plot(c0, r0, "o", color="white", markersize=2)
                axis.annotate("", (c1, r1), (c0, r0), arrowprops={"arrowstyle": "->", "color": "white", "lw": 0.8})
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0, 1:], titles, strict=True):
        axis.set_title(title, fontsize=7)
    save_figure(figure, out, dpi=150)


def draw_curves(curves: Mapping[str, Sequence[float]], layers: Sequence[str], what: str, out: Path) -> None:
    """A line for each of `curves`, over the layers; `what` names the quantity."""
    pyplot = pyplot_without_screen()
    figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for title, values in curves.items():
        axis.plot(range(1, len(values) + 1), values, marker=".", label=title)
    axis.set(xlabel=f"layer ({layers[0]} … {layers[-1]})", ylabel=what)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if len(curves) > 1:
        axis.legend(fontsize=8)
    save_figure(figure, out, dpi=150)
