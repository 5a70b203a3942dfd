"""A study such as the digits': five rows, five seeds, two budgets, one run that failed. Its numbers are made up."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from sit_atconv.study.results import Cell, Point, Study

# parameters, operations, seconds a step, memory, loss after many steps, FD-pixels, label agreement
ROWS = {
    "attention": (3_296_272, 103_219_200, 0.135, 0.945, 0.1502, 21.0, 0.941),
    "hybrid": (3_196_372, 98_304_000, 0.181, 0.958, 0.1478, 19.6, 0.953),
    "atconv-grid": (3_096_472, 93_388_800, 0.186, 0.962, 0.1489, 20.4, 0.947),
    "atconv-raster": (3_096_472, 93_388_800, 0.186, 0.963, 0.1503, 21.2, 0.940),
    "dwconv": (2_801_104, 84_410_368, 0.122, 0.931, 0.1561, 26.3, 0.902),
}
SEEDS = [0, 1, 2, 3, 4]
BUDGETS = {"steps": 2400, "seconds": 240}
FAILED = ("atconv-raster", "seconds", 3)
ERROR = (
    "train.py ended with code 1.\nRuntimeError: [enforce fail at alloc_cpu.cpp:124] not enough memory: 1073741824 bytes"
)


def example_study(folder: Path | None = None) -> Study:
    """The study; with a `folder`, the sample grids of its first seed are drawn there."""
    random = np.random.default_rng(0)
    luck = dict(zip(SEEDS, random.normal(0, 0.0012, len(SEEDS)), strict=True))  # of a seed, the same for every row
    cells = [
        _cell(row, budget, seed, luck[seed], random, folder) for seed in SEEDS for budget in BUDGETS for row in ROWS
    ]
    return Study(
        "Handwritten digits at 16 px",
        list(ROWS),
        SEEDS,
        BUDGETS,
        "AMD EPYC 7B13, 2 cores, Linux 6.1, torch 2.11.0",
        "python -m sit_atconv.study configs/studies/digits.yaml --out runs/study-digits",
        cells,
    )


def _cell(row: str, budget: str, seed: int, luck: float, random: np.random.Generator, folder: Path | None) -> Cell:
    parameters, flops, pace, memory, final, distance, agreement = ROWS[row]
    place = f"cells/{row}/{budget}-{seed}"
    commands = [
        f"python train.py --config configs/quickstart.yaml --run {place}/run --training.seed {seed}",
        f"python sample.py --checkpoint {place}/run/checkpoints/latest/model --out {place}/samples --num-samples 890",
        f"python evaluate_fid.py --samples {place}/samples/samples.npz --reference digits:heldout@16 --features pixels",
    ]
    if (row, budget, seed) == FAILED:
        nothing = [None] * 7
        return Cell(row, budget, seed, "failed", ERROR, commands, *nothing, {}, None, [], None)
    pace *= 1 + random.normal(0, 0.01)
    steps = 2400 if budget == "steps" else int(BUDGETS["seconds"] / pace)
    floor = final + luck + random.normal(0, 0.0006)
    curve = [
        Point(step, step * pace, floor + 0.3 * (step / 60) ** -1.1, floor - 0.004 + 0.3 * (step / 60) ** -1.1)
        for step in [*range(100, steps, 100), steps]
    ]
    scores = {"fd_pixels": distance + random.normal(0, 0.5), "fid": 3.1 * distance + random.normal(0, 1.5)}
    grid = _grid(folder, place, noise=20 + 4 * list(ROWS).index(row)) if folder and seed == 0 else None
    return Cell(
        *(row, budget, seed, "done", None, commands, parameters, flops, steps, steps * pace, pace),
        *(memory + random.normal(0, 0.002), curve[-1].heldout_loss, scores, agreement + random.normal(0, 0.006)),
        *(curve, grid),
    )


def _grid(folder: Path, place: str, noise: float) -> str:
    """Ten digits of each class with noise, as a PNG."""
    digits = load_digits()  # 8 px, 0 to 16
    chosen = np.concatenate([digits.images[digits.target == label][:10] for label in range(10)]) * 15.9
    noisy = np.clip(chosen + np.random.default_rng(0).normal(0, noise, chosen.shape), 0, 255).astype(np.uint8)
    framed = np.pad(noisy, ((0, 0), (1, 1), (1, 1)), constant_values=128)
    sheet = framed.reshape(10, 10, 10, 10).swapaxes(1, 2).reshape(100, 100)
    path = folder / place / "samples" / "grid.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
    return str(path.relative_to(folder))
