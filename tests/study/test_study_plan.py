"""Study files: what they mean, what is wrong with others, and the commands of the cells."""

import shlex
from pathlib import Path

import pytest

from sit_atconv.config import parse_command_line
from sit_atconv.errors import InputError
from sit_atconv.evaluation.command import parse as parse_evaluation
from sit_atconv.sampling.arguments import add_sampling_arguments, sample_parser
from sit_atconv.study.checks import load_base
from sit_atconv.study.commands import CONFIG, ENDLESS, cell_commands, key_words, option_words
from sit_atconv.study.folder import begin_folder, require_same_study
from sit_atconv.study.plan import CellName, Plan, absolute, read_plan

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FILE = f"""
title: Digits
config: {QUICKSTART}
set: {{data.heldout: 'digits:heldout@16', evaluation.loss: true}}
rows:
  attention: {{model.name: SiT-S/4}}
  atconv: {{model.name: SiT-ATConv-S/4, model.mixer_pattern: [atconv, {{name: conv, kernel_size: 3}}]}}
seeds: [0, 3]
budgets: {{steps: 40, seconds: 1.5}}
sampling: {{num-samples: 20, guidance: 1.5, interval: [0, 0.7], png: true}}
scores: [{{reference: 'digits:heldout@16', features: pixels, metrics: [fd_pixels]}}]
agreement: {{reference: 'digits:train@16', features: pixels}}
"""


def plan_of(folder: Path, text: str = FILE) -> Plan:
    (folder / "study.yaml").write_text(text)
    return read_plan(folder / "study.yaml")


def changed(old: str, new: str) -> str:
    assert old in FILE
    return FILE.replace(old, new)


def test_one_seed_of_everything_comes_before_the_next(tmp_path: Path) -> None:
    cells = [str(cell) for cell in plan_of(tmp_path).cells()]
    assert cells[:4] == ["attention/steps-0", "atconv/steps-0", "attention/seconds-0", "atconv/seconds-0"]
    assert cells[4:] == [name.replace("-0", "-3") for name in cells[:4]]


def test_the_base_configuration_is_relative_to_the_file_and_other_paths_to_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    text = changed(str(QUICKSTART), "base.yaml").replace("data.heldout: 'digits:heldout@16'", "data.path: data")
    plan = plan_of(tmp_path, text.replace("'digits:train@16'", "data"))
    assert (plan.config, plan.set["data.path"]) == (f"{tmp_path}/base.yaml", f"{tmp_path}/data")
    assert plan.agreement["reference"] == f"{tmp_path}/data"
    assert absolute({"path": "data:part", "name": "data"}) == {"path": f"{tmp_path}/data:part", "name": "data"}
    assert absolute({"data.path": "elsewhere"}) == {"data.path": "elsewhere"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed("seeds: [0, 3]", "seed: [0, 3]"), "unknown key 'seed': did you mean 'seeds'?"),
        (changed("seconds: 1.5", "second: 1.5"), "budgets: unknown key 'second': did you mean 'seconds'?"),
        (changed("seeds: [0, 3]", "seeds: [0, 3, 0]"), "the seed 0 is given twice"),
        (changed("seeds: [0, 3]", "seeds: [-1]"), "seeds"),
        (changed("seeds: [0, 3]", f"seeds: [{2**64}]"), "too large"),
        (changed("budgets: {steps: 40, seconds: 1.5}", "budgets: {}"), "budgets is empty"),
        (changed("steps: 40", "steps: 0"), "budgets.steps"),
        (changed("rows:", "rows: {}\nrest:"), "unknown key 'rest'"),
        ("config: x\nrows: {}\nseeds: [0]\nbudgets: {steps: 1}", "rows"),
        (changed("attention:", "../attention:"), "'../attention' cannot be the name of a row"),
        (changed("  atconv:", "  Attention:"), "one folder on some systems"),
        (changed("evaluation.loss: true", "training.steps: 9"), "set has training.steps, which the study sets itself"),
        (changed("model.name: SiT-S/4", "training.seed: 9"), "rows: attention has training.seed"),
        (FILE.replace("sampling:", "# "), "scores and agreement need samples"),
        ("- a list", "holds no keys"),
        ("a: b: c", "is not YAML"),
        ("rows: {a: {}, a: {}}", "given twice"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, text)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot read the study"):
        read_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("budget", ["steps", "seconds"])
def test_commands_are_understood_by_the_programs(tmp_path: Path, budget: str) -> None:
    plan = plan_of(tmp_path)
    (tmp_path / CONFIG).write_text(QUICKSTART.read_text())
    commands = cell_commands(plan, tmp_path, CellName("atconv", budget, 3))
    assert [command.name for command in commands] == ["training", "sampling", "scores-0", "agreement"]
    train, sample, score, agreement = (shlex.split(command.line) for command in commands)
    at = tmp_path / "cells" / "atconv" / f"{budget}-3"

    config, run, _ = parse_command_line(train[2:])
    assert (run, config.training.seed, config.model.name) == (at / "run", 3, "SiT-ATConv-S/4")
    assert config.model.mixer_pattern == ["atconv", {"name": "conv", "kernel_size": 3}]
    assert (config.evaluation.loss, config.data.heldout) == (True, "digits:heldout@16")
    length = (config.training.steps, config.training.max_seconds)
    assert length == ((40, None) if budget == "steps" else (ENDLESS, 1.5))

    drawn = sample_parser().parse_args(sample[2:])
    assert (drawn.checkpoint, drawn.out) == (at / "run" / "checkpoints" / "latest" / "model", at / "samples")
    assert (drawn.num_samples, drawn.interval, drawn.png, drawn.seed) == (20, [0, 0.7], True, 3)

    scored = parse_evaluation(score[2:], add_sampling_arguments)
    assert (scored.samples, scored.json) == (str(at / "samples" / "samples.npz"), at / "scores-0.json")
    assert (scored.features, scored.metrics) == (["pixels"], ["fd_pixels"])
    assert agreement[0] == "cd" and agreement[4:6] == ["-m", "sit_atconv.evaluation.agreement"]


def test_words_of_keys_and_options() -> None:
    assert key_words({"data.flip": True, "log.keep": None, "a": [1], "training.precision": "no"}) == (
        ["--data.flip", "true", "--log.keep", "null", "--a", "[1]", "--training.precision", "no"]
    )
    assert option_words({"kid": True, "fast": False, "vae": None, "steps": 3}) == ["--kid", "--steps", "3"]


def test_the_seed_of_the_samples_may_be_chosen(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, changed("num-samples: 20", "num-samples: 20, seed: 7"))
    assert "--seed 7" in cell_commands(plan, tmp_path, CellName("atconv", "steps", 3))[1].line


@pytest.mark.parametrize(
    ("options", "cache"),
    [("pixels", None), ("inception", "features"), ("inception, cache: null", None), ("inception, cache: here", "here")],
)
def test_features_are_computed_once_for_all_cells(tmp_path: Path, options: str, cache: str | None) -> None:
    text = changed("features: pixels", f"features: {options}").replace(", metrics: [fd_pixels]", "")
    for command in cell_commands(plan_of(tmp_path, text), tmp_path, CellName("atconv", "steps", 3))[2:]:
        words = shlex.split(command.line)
        given = words[words.index("--cache") + 1] if "--cache" in words else None
        assert given == (str(tmp_path / "features") if cache == "features" else cache)


def test_programs_that_open_a_model_are_told_of_its_plugins(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, changed("attention: {", "attention: {model.plugins: [mine, yours], "))
    train, sample, *_ = (command.line for command in cell_commands(plan, tmp_path, CellName("attention", "steps", 0)))
    assert """--model.plugins '["mine", "yours"]'""" in train
    assert sample.startswith("SITATCONV_PLUGINS=mine,yours ")


def test_the_folder_holds_a_study_that_can_be_read_and_extended(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    base = load_base(plan)
    require_same_study(plan, base, out)
    begin_folder(plan, base, out)
    again = read_plan(out / "study.yaml")
    assert load_base(again) == base
    assert {**vars(again), "config": None} == {**vars(plan), "config": None}
    require_same_study(again, base, out)

    more = changed("seeds: [0, 3]", "seeds: [3, 1, 0]").replace("title: Digits", "title: More")
    more = more.replace("seeds:", "  dwconv: {model.name: SiT-DWConv-S/4}\nseeds:")
    require_same_study(plan_of(tmp_path, more), base, out)
    for text, difference in [
        (changed("SiT-S/4", "SiT-S/2"), "rows.attention.model.name: SiT-S/4 -> SiT-S/2"),
        (changed("seeds: [0, 3]", "seeds: [0]"), "seeds.3: 3 -> None"),
        (changed("steps: 40", "steps: 50"), "budgets.steps: 40 -> 50"),
        (changed("evaluation.loss: true", "evaluation.every: 5"), "set.evaluation.loss: True -> None"),
        (changed("guidance: 1.5", "guidance: 1.4"), "sampling.guidance: 1.5 -> 1.4"),
        (changed("metrics: [fd_pixels]", "kid: true"), "scores.0.metrics"),
        (changed("agreement:", "# "), "agreement"),
        (changed("  attention:", "  first: {model.name: SiT-S/2}\n  attention:"), "the first row"),
    ]:
        with pytest.raises(InputError, match="holds another study") as caught:
            require_same_study(plan_of(tmp_path, text), base, out)
        assert difference in str(caught.value)

    (tmp_path / "base.yaml").write_text(QUICKSTART.read_text().replace("lr: 2.5e-3", "lr: 2.0e-3"))
    other = plan_of(tmp_path, changed(str(QUICKSTART), "base.yaml"))
    with pytest.raises(InputError, match=r"config: optimizer.lr: 0.0025 -> 0.002"):
        require_same_study(other, load_base(other), out)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    plan, other = plan_of(tmp_path), tmp_path / "other"
    other.mkdir()
    (other / "picture.png").touch()
    for folder in (other, tmp_path):  # the latter has the study's file itself
        with pytest.raises(InputError, match="holds no study"):
            require_same_study(plan, load_base(plan), folder)
