"""What the studies of configs/studies would cost: ``python -m benchmarks.studies`` prints the table of docs/study.md.

Nothing is measured: operations are counted from shapes (a multiply-add as two), and divided by an assumed share of the
machine's peak. Starting programs, evaluations and scores come on top.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.output import write_json
from sit_atconv.config import load_config
from sit_atconv.models import create_model
from sit_atconv.models.flops import forward_flops, training_flops
from sit_atconv.runtime.measuring.records import table
from sit_atconv.study.commands import key_words
from sit_atconv.study.plan import Plan, read_plan

STUDIES = Path(__file__).parents[1] / "configs" / "studies"


@dataclass(frozen=True)
class Setting:
    """Latents (C, H, W) and classes of a study's data, FLOP/s that each cell is assumed to reach, and cells at once."""

    latents: tuple[int, int, int]
    classes: int
    flops: float
    parallel: int = 1


# Two cores of an EPYC 7003: 32 fp32 operations a cycle and core at about 2.8 GHz, of which half is assumed,
# or a quarter for the smallest model: `make quickstart MODEL=SiT-S/4` took 0.13 s a step there.
CPU, SMALL_ON_CPU = 2 * 32 * 2.8e9 * 0.5, 2 * 32 * 2.8e9 * 0.25
# The bf16 peak of an H200 and the shares that a model of this size is assumed to reach: S/4 not compiled, B/2 compiled
S_ON_H200, B_ON_H200 = 989e12 * 0.15, 989e12 * 0.4
SETTINGS = {
    "digits": Setting((1, 16, 16), 10, SMALL_ON_CPU),
    "hands": Setting((4, 8, 8), 10, CPU),
    "tinyimagenet": Setting((3, 64, 64), 200, CPU),
    "h200": Setting((3, 64, 64), 200, S_ON_H200),
    "eight_gpus": Setting((4, 32, 32), 1000, B_ON_H200, parallel=8),
}


def rows(study: str) -> list[dict[str, str | float]]:
    """Lines for the rows of a study: operations, and minutes of training and sampling."""
    plan, setting = read_plan(STUDIES / f"{study}.yaml"), SETTINGS[study]
    return [_row(plan, study, row, setting) for row in plan.rows]


def _row(plan: Plan, study: str, row: str, setting: Setting) -> dict[str, str | float]:
    config = load_config(plan.config, key_words(plan.keys(row)))
    given = {"hidden_size": config.model.hidden_size, "depth": config.model.depth, "num_heads": config.model.num_heads}
    channels, height, width = setting.latents
    with torch.device("meta"):
        model = create_model(
            config.model.name,
            input_size=(height, width),
            in_channels=channels,
            num_classes=setting.classes,
            pool=config.model.pool,
            **{key: value for key, value in given.items() if value is not None},
        )
    a_step = training_flops(model, setting.latents) * config.training.batch_size
    steps, limit = plan.budgets.steps, plan.budgets.seconds
    drawn = _evaluations(plan) * forward_flops(model, setting.latents) / setting.flops
    equal_steps = (steps * a_step / setting.flops + drawn) if steps else 0.0
    equal_time = (limit + drawn) if limit else 0.0
    return {
        "study": study,
        "row": row,
        "GFLOP a step": round(a_step / 1e9, 1),
        "ms a step": round(1e3 * a_step / setting.flops, 1),
        "minutes of equal steps": round(equal_steps / 60, 1),
        "minutes of equal time": round(equal_time / 60, 1),
        "hours of all seeds": round((equal_steps + equal_time) * len(plan.seeds) / setting.parallel / 3600, 2),
    }


def _evaluations(plan: Plan) -> int:
    """Network evaluations for the samples of a cell: heun takes two a step, guidance two of each."""
    if plan.sampling is None:
        return 0
    twice = 2 if plan.sampling.get("guidance", 1) != 1 else 1
    return plan.sampling["num-samples"] * plan.sampling["steps"] * 2 * twice


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, default=Path("studies.json"))
    options = parser.parse_args(argv)
    lines = [line for study in SETTINGS for line in rows(study)]
    print(table(lines))
    write_json(options.json, torch.device("cpu"), lines)


if __name__ == "__main__":
    main()
