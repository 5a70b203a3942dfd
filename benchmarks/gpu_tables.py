"""The results of `benchmarks.gpu` as Markdown tables, in the form of docs/performance.md."""

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.output import read_json
from sit_atconv.runtime.measuring.records import table
from sit_atconv.runtime.whole_files import write_text

Row = dict[str, str | float]
_HALVES = "forward \\| with gradients"


def write_tables(out: Path, gpu: str, parts: Mapping[str, dict]) -> None:
    """Write OUT/gpu.md from OUT/PART.json of all parts that are done, with what became of the others."""
    states = [
        {"part": name, **{key: each[key] for key in ("state", "seconds", "note")}} for name, each in parts.items()
    ]
    sections = [f"# {gpu}", "`make gpu`; every command is below.", table(states)]
    for name, part in parts.items():
        path = out / f"{name}.json"
        if part["state"] == "done" and name in TABLES and path.is_file():
            found = read_json(path)
            head = f"## {name}\n\n`{part['command']}` on {found['machine']}"
            sections.append(f"{head}: {TITLES[name]}.\n\n{table(TABLES[name](found))}")
    write_text(out / "gpu.md", "\n\n".join(sections) + "\n")


def _halves(rows: list[dict], keys: Callable[[dict], Row]) -> list[tuple[Row, dict, dict]]:
    """Rows without and with gradients that have the same keys: (keys, forward, with gradients)."""
    forward = {tuple(keys(row).items()): row for row in rows if not row["gradients"]}
    return [(keys(row), forward[tuple(keys(row).items())], row) for row in rows if row["gradients"]]


def _pair(forward: float, gradients: float) -> str:
    return f"{forward:.3g} \\| {gradients:.3g}"


def operator(found: dict) -> list[Row]:
    """A line for each size, and a column for each contender."""
    halves = _halves(found["rows"], lambda row: {"tokens": f"{row['shape'][1]}×{row['shape'][2]}"})
    return [
        keys | {name: _pair(ms, gradients["milliseconds"][name]) for name, ms in forward["milliseconds"].items()}
        for keys, forward, gradients in halves
    ]


def backends(found: dict) -> list[Row]:
    """A line for each size, eager and compiled, and a column for each backend."""

    def keys(row: dict) -> Row:
        size = " × ".join(map(str, row["shape"][1:]))
        return {"H × W × C": size, "dtype": row["dtype"], "": "compiled" if row["compiled"] else "eager"}

    return [
        each | {name: _pair(ms, gradients["milliseconds"][name]) for name, ms in forward["milliseconds"].items()}
        for each, forward, gradients in _halves(found["rows"], keys)
    ]


def block(found: dict) -> list[Row]:
    """A line for each size of blocks and of mixers: the first in milliseconds, the others over it."""

    def keys(row: dict) -> Row:
        return {"": "block" if row["block"] else "mixer", "C": str(row["dim"]), "tokens": row["tokens"]}

    lines = []
    for each, forward, gradients in _halves(found["rows"], keys):
        first, *others = forward["milliseconds"]
        times = [half["milliseconds"] for half in (forward, gradients)]
        cells = {f"{first}, ms": _pair(*(half[first] for half in times))}
        lines.append(each | cells | {name: _pair(*(half[name] / half[first] for half in times)) for name in others})
    return lines


def model(found: dict) -> list[Row]:
    """Milliseconds an image, and in brackets over attention's."""
    lines = []
    for row in found["rows"]:
        times = row["milliseconds"]
        cells = {name: f"{ms / row['batch']:.3g} ({ms / times['SiT']:.2f})" for name, ms in times.items()}
        lines.append({"": row["size"], "latent": row["latent"], **cells})
    return lines


def training(found: dict) -> list[Row]:
    """A line for each model and step."""
    columns = {"model": "model", "step": "step", "images_per_second": "images/s", "mfu": "MFU", "mebibytes": "MiB"}
    return [{title: "-" if row[key] is None else row[key] for key, title in columns.items()} for row in found["rows"]]


def sampling(found: dict) -> list[Row]:
    """A line for each program."""
    titles = {"contender": "program", "milliseconds_per_image": "ms an image", "ratio": "times as fast"}
    return [{title: row[key] for key, title in titles.items()} for row in found["rows"]]


def evaluation(found: dict) -> list[Row]:
    """Precision and recall at full size."""
    row = found["rows"][0]
    count = f"{row['samples']:,} against {row['references']:,}"
    return [{"images": count, "seconds": round(row["seconds"]["wall"], 2), "peak GiB": round(row["peak_gib"], 2)}]


def inception(found: dict) -> list[Row]:
    """Images a second of both programs."""
    row = found["rows"][0]
    return [{name: round(speed, 1) for name, speed in row["wall"]["images_per_second"].items()}]


def costs(found: dict) -> list[Row]:
    """A line for each model: milliseconds an image, and in brackets over the first."""
    lines = []
    for row in found["rows"]:
        line = {"model": row["model"], "parameters": row["parameters"], "GFLOP an image": f"{row['flops'] / 1e9:.4g}"}
        for what in ("forward", "step"):
            ms = row[f"{what}_ms"] / found["batch"]
            line |= {
                f"{what}, ms an image": f"{ms:.3g} ({row[f'{what}_ratio']:.2f})",
                f"{what}, MiB": row[f"{what}_mib"],
            }
        lines.append(line)
    return lines


TABLES = {t.__name__: t for t in (operator, backends, block, model, training, sampling, evaluation, inception, costs)}
TITLES = {
    "backends": f"milliseconds, {_HALVES}",
    "operator": f"milliseconds, {_HALVES}",
    "block": f"the first in milliseconds, the others over it, {_HALVES}",
    "model": "forward passes, milliseconds an image, over attention's",
    "training": "one training step; MiB is the peak beyond weights, moments and averages",
    "sampling": "one batch",
    "evaluation": "precision and recall",
    "inception": "images a second",
    "costs": "milliseconds an image, over the first; MiB is the peak beyond weights and optimizer state",
}
