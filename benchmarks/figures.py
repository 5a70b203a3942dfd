"""Draws figures of measurements: `python -m benchmarks.figures operator.json model.json --out docs/figures`.

The JSON of `benchmarks.operator` gives time and peak memory of token mixers against the side of the image (as in Fig. 4
of the ATConv paper, arXiv 2510.20092); that of `benchmarks.model` gives throughput against the side of the latent (as
in its Fig. 6).
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.output import read_json
from sit_atconv.runtime.whole_files import whole_file

STYLES = {  # distinguishable even where lines coincide
    "linear": ("#ff7f0e", "s-"),
    "window": ("#1f77b4", "^-"),
    "grid": ("#17becf", "v--"),
    "pooled keys": ("#2ca02c", "D-"),
    "attention": ("#222222", "o-"),
    "ATConv, released": ("#d62728", "x:"),
    "ATConv": ("#d62728", "o-"),
}
MODELS = {  # label, colour, style
    "SiT": ("attention", "#222222", "o-"),
    "SiT-Hybrid": ("hybrid", "#9467bd", "o-"),
    "SiT-ATConv": ("ATConv", "#d62728", "o-"),
    "SiT, released": ("attention, released", "#222222", "x:"),
    "SiT-ATConv, released": ("ATConv, released", "#d62728", "x:"),
}


def draw_operator(measured: dict, out: Path) -> None:
    """Time in the upper row, peak memory in the lower; forward passes on the left, with gradients on the right."""
    quantities = {"milliseconds": "time, ms", "mebibytes": "peak memory, MiB"}
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey="row", layout="constrained")
    for column, gradients in enumerate((False, True)):
        rows = [row for row in measured["rows"] if row["gradients"] == gradients]
        for axis, (quantity, label) in zip(axes[:, column], quantities.items(), strict=True):
            for name, (colour, style) in STYLES.items():
                points = [(row["shape"][1], row[quantity][name]) for row in rows if row[quantity][name]]
                axis.plot(*zip(*points, strict=True), style, color=colour, label=name, **emphasis(name == "ATConv"))
            logarithmic(axis, [row["shape"][1] for row in rows])
            axis.set_ylabel(label if column == 0 else "")
        axes[0, column].set_title("forward and gradients" if gradients else "forward")
        axes[1, column].set_xlabel("side of the image in tokens")
    axes[0, 0].legend(frameon=False)
    B, *_, C = measured["rows"][0]["shape"]
    title(figure, f"Token mixing alone, {C} channels, batch {B}", measured)
    save(figure, out / "operator.png")


def draw_model(measured: dict, out: Path) -> None:
    """One panel per size; each point of ATConv is labelled with its throughput relative to attention."""
    sizes = list(dict.fromkeys(row["size"] for row in measured["rows"]))
    width = max(6, 4.2 * len(sizes))
    figure, axes = plt.subplots(1, len(sizes), figsize=(width, 4.4), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        rows = [row for row in measured["rows"] if row["size"] == size]
        sides = [row["latent"] for row in rows]
        for model, (label, colour, style) in MODELS.items():
            throughput = [1000 * row["batch"] / row["milliseconds"][model] for row in rows]
            axis.plot(sides, throughput, style, color=colour, label=label, **emphasis(label == "ATConv"))
        for row, side in zip(rows, sides, strict=True):
            ms = row["milliseconds"]
            where = (side, 1000 * row["batch"] / min(ms.values()))
            text = f"{ms['SiT'] / ms['SiT-ATConv']:.2f}×"
            colour = MODELS["SiT-ATConv"][1]
            axis.annotate(text, where, (0, 9), textcoords="offset points", ha="center", color=colour)
        axis.margins(x=0.1, y=0.14)
        logarithmic(axis, sides)
        axis.set(title=size, xlabel="side of the latent", ylabel="images/s" if axis is axes[0, 0] else "")
    axes[0, 0].legend(frameon=False, loc="lower left")
    batch = measured["rows"][0]["batch"]
    title(figure, f"Forward passes, batch {batch}; × is ATConv's throughput over attention's", measured)
    save(figure, out / "model.png")


DRAWN = {"shape": draw_operator, "size": draw_model}  # by a key that only their rows have


def save(figure: plt.Figure, path: Path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, format="png")


def emphasis(ours: bool) -> dict[str, float]:
    return {"linewidth": 2.4 if ours else 1.3, "markersize": 5 if ours else 3.5, "zorder": 3 if ours else 2}


def logarithmic(axis: Axes, sides: list[int]) -> None:
    """Logarithmic axes with plain numbers, and the measured sides along x."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sides, map(str, sides))
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(which="major", alpha=0.3)


def title(figure: plt.Figure, what: str, measured: dict) -> None:
    figure.suptitle(f"{what}\n{measured['machine']}", fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("measurements", type=Path, nargs="+", help="JSON of benchmarks.operator or benchmarks.model")
    parser.add_argument("--out", type=Path, required=True, help="folder for operator.png and model.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.measurements:
        measured = read_json(path)
        draw = next((function for key, function in DRAWN.items() if key in measured["rows"][0]), None)
        if draw is None or "operations" in measured["rows"][0]:
            given = f"{path} was written by {measured['command']}"
            parser.error(f"{given}: give the JSON of benchmarks.operator or benchmarks.model without --mixers.")
        draw(measured, options.out)


if __name__ == "__main__":
    main()
