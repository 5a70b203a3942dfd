"""Studies of image networks: their commands, what is refused before they run, and accuracies in the report."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import ROOT, fresh_accelerate

from sit_atconv.errors import InputError
from sit_atconv.study.checks import check_plan, load_base
from sit_atconv.study.collect import collect
from sit_atconv.study.commands import cell_commands, cell_folder
from sit_atconv.study.folder import begin_folder
from sit_atconv.study.plan import read_plan
from sit_atconv.study.report.contents import contents
from sit_atconv.study.report.tables import score_quantity
from sit_atconv.zoo.train.__main__ import main as train_command

STUDY = """
network: image
config: {config}
set: {{model.name: attnet_xxs, model.drop_path_rate: 0.0, data.path: {data}, data.heldout: 0.5, data.image_size: 32,
       data.workers: 0, augmentation.auto: null, augmentation.repeats: 1, training.batch_size: 2,
       training.precision: "no", log.every: 1, validation.every: 1}}
rows: {rows}
seeds: [0]
budgets: {budgets}
"""
ROWS = "{atconv: {}, dwconv: {model.options: {mixer: dwconv}}}"


@pytest.fixture
def write(tmp_path: Path):
    for label in range(2):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / str(label) / f"{number}.png")

    def study(rows: str = ROWS, budgets: str = "{steps: 1}", more: str = "") -> Path:
        path = tmp_path / "study.yaml"
        config = ROOT / "configs" / "attnet_t2.yaml"
        path.write_text(STUDY.format(config=config, data=tmp_path / "data", rows=rows, budgets=budgets) + more)
        return path

    return study


def test_a_study_of_image_networks_trains_them_and_reports_accuracies(write, tmp_path: Path) -> None:
    plan, folder = read_plan(write()), tmp_path / "out"
    needed = check_plan(plan)
    assert needed["atconv", "steps"] > needed["dwconv", "steps"] > 0
    begin_folder(plan, load_base(plan), folder)
    assert read_plan(folder / "study.yaml").network == "image"
    cells = list(plan.cells())
    for cell in cells:
        (command,) = cell_commands(plan, folder, cell)
        assert command.words[1:3] == ("-m", "sit_atconv.zoo.train") and command.module and not command.complete
        fresh_accelerate()
        train_command(command.words[3:])
        assert command.complete and (cell_folder(folder, cell) / "run").is_dir()
    study = collect(plan, folder, "the command")
    first, second = study.cells
    assert first.state == "done" and first.scores.keys() == {"top1", "top5", "top1_raw", "top5_raw"}
    assert first.heldout_loss > 0 and first.parameters > second.parameters > 2_000_000 and first.flops > second.flops
    assert all(score_quantity(name).better == "higher" for name in first.scores)
    said = dict(contents(study).definitions)
    assert any("accuracy" in text for text in said.values()) and not any("evaluate_fid" in t for t in said.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budgets": "{seconds: 5}"}, "follows its steps"),
        ({"more": "sampling: {steps: 5}"}, "has no samples"),
        ({"rows": "{a: {}, b: {}}"}, "equal in effect"),
        ({"rows": "{a: {model.options: {mixer: dwcon}}}"}, "The row a: .*dwconv"),
        ({"rows": "{a: {data.path: nowhere}}"}, "nowhere"),
        ({"rows": "{a: {flow.cosine: 1}}"}, "The configuration of the row a: .*flow.cosine"),
    ],
)
def test_what_would_fail_is_told_before_anything_runs(write, given: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_plan(read_plan(write(**given)))
