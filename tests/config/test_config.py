"""Configurations: the shipped files load, round-trip, and a mistake is named with the nearest key."""

from pathlib import Path
from typing import get_args

import pytest
import timm
import yaml

import sit_atconv.zoo  # noqa: F401, registers the networks
import train
from sit_atconv.config import (
    Config,
    ImageConfig,
    Solver,
    config_differences,
    config_keys,
    load_config,
    parse_command_line,
)
from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.sampling import SOLVERS

CONFIGS = Path(__file__).parents[2] / "configs"


# 350 bytes that stand for 10^9 values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


IMAGES = CONFIGS / "attnet_t2.yaml"  # of image networks


@pytest.mark.parametrize("path", sorted({*CONFIGS.glob("*.yaml")} - {IMAGES}), ids=lambda p: p.stem)
def test_shipped_configurations_load_are_complete_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert create_model(config.model.name, input_size=8, num_classes=0, hidden_size=8, depth=2, num_heads=2)
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config
    given = yaml.safe_load(path.read_text())
    absent = tuple(f"{section}." for section, keys in given.items() if keys is None)
    named = {f"{section}.{key}" for section, keys in given.items() for key in keys or []}
    joined_later = set(config_keys()) - set(config_keys(every=False))
    assert {key for key in config_keys() if not key.startswith(absent)} - joined_later == named - joined_later
    assert path.read_text().count("#") > 5  # a comment says why


def test_the_configuration_of_image_networks_is_complete_and_round_trips(tmp_path: Path) -> None:
    config = load_config(IMAGES, kind=ImageConfig)
    assert config.model.name in timm.list_models() and IMAGES.read_text().count("#") > 20
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml", kind=ImageConfig) == config
    named = {f"{section}.{key}" for section, keys in yaml.safe_load(IMAGES.read_text()).items() for key in keys}
    assert set(config_keys(ImageConfig)) == named


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("zoo/*.yaml")), ids=lambda p: p.stem)
def test_overlays_of_image_networks_name_the_network_and_what_differs(path: Path) -> None:
    config = load_config(IMAGES, ["--config", str(path)], ImageConfig)
    assert config.model.name == path.stem in timm.list_models()
    given = yaml.safe_load(path.read_text())
    base = load_config(IMAGES, kind=ImageConfig).to_dict()
    others = {section: keys for section, keys in given.items() if section != "model"}
    assert all(base[section][key] != value for section, keys in others.items() for key, value in keys.items())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("overlays/*.yaml")), ids=lambda p: p.stem)
def test_overlays_are_a_few_lines_that_change_the_baseline(path: Path, tmp_path: Path) -> None:
    baseline = load_config(CONFIGS / "imagenet256.yaml")
    config = load_config(CONFIGS / "imagenet256.yaml", ["--config", str(path)])
    given = yaml.safe_load(path.read_text())
    changed = {line.partition(":")[0] for line in config_differences(baseline.to_dict(), config.to_dict())}
    assert {key.split(".")[0] for key in changed} == set(given)
    assert len(path.read_text().splitlines()) <= 25
    assert path.read_text().startswith("# ")
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_keys_that_joined_later_are_written_only_where_they_are_set() -> None:
    later = set(config_keys()) - set(config_keys(every=False))
    written = yaml.safe_load(Config().to_yaml())
    assert not {key for key in later if key.split(".")[1] in (written[key.split(".")[0]] or {})}


def test_training_draws_by_every_solver() -> None:
    assert get_args(Solver) == SOLVERS


def test_the_published_settings() -> None:
    repa = load_config(CONFIGS / "imagenet256_repa.yaml")
    assert (repa.training.steps, repa.training.batch_size, repa.training.precision) == (400_000, 256, "bf16")
    assert (repa.optimizer.lr, repa.optimizer.weight_decay, repa.optimizer.clip_norm) == (1e-4, 0, 1.0)
    assert repa.training.ema_decay == 0.9999
    assert (repa.alignment.coefficient, repa.alignment.block) == (0.5, 8)
    assert repa.alignment.teachers[0].name == "vit_base_patch14_dinov2.lvd142m"
    assert not repa.data.flip
    plain = load_config(CONFIGS / "imagenet256.yaml")
    assert plain.alignment is None
    ffhq = load_config(CONFIGS / "ffhq512.yaml")
    assert (ffhq.training.batch_size, ffhq.data.flip, ffhq.optimizer.clip_norm) == (128, True, None)
    assert (ffhq.model.num_classes, ffhq.alignment) == (0, None)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    config, run, _ = parse_command_line(
        f"--config {CONFIGS}/imagenet256_repa.yaml --run runs/x --training.steps 7 --alignment.coefficient 0.25 "
        "--model.mixer_pattern [atconv,attention]".split()
    )
    assert run == Path("runs/x")
    assert config.training.steps == 7
    assert config.alignment.coefficient == 0.25
    assert config.alignment.block == 8
    assert config.model.mixer_pattern == ["atconv", "attention"]
    config = load_config(CONFIGS / "imagenet256_repa.yaml", ["--alignment", "null"])
    assert config.alignment is None
    for last in (["--config", f"{CONFIGS}/quickstart.yaml"], [f"--config={CONFIGS}/quickstart.yaml"]):
        assert parse_command_line(["--training.steps", "7", *last])[0].training.steps == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.step", "3"], "Unknown key 'training.step': did you mean 'training.steps'?"),
        (["--trainig.steps", "3"], "did you mean 'training.steps'?"),
        (["--alignment.cofficient", "1"], "did you mean 'alignment.coefficient'?"),
        (["--training.steps", "many"], "training.steps"),
        (["--training.steps", "0"], "training.steps: Expected `int` >= 1"),
        (["--training.precision", "fp8"], "'no', 'bf16'"),
        (["--flow.label_dropout", "1.5"], "flow.label_dropout"),
        (["--optimizer.betas", "[0.9,1.0]"], "optimizer.betas[1]: Expected `float` < 1"),
        (["--training.seed", str(2**64)], "training.seed"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--alignment", "{teachers: " + "[" * 10_000 + "]" * 10_000 + "}"], "nested more than 30 deep"),
        (["--alignment", "{" + BOMB.strip().replace("\n", ", ") + "}"], "aliases expand this to more than"),
        (["--training.steps", "9" * 5000], "more than 40 digits"),
    ],
)
def test_mistakes_on_the_command_line_end_with_code_2(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main([*argv, "--run", "unmade"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traning: {steps: 3}", "did you mean 'training.steps'?"),
        ("training: {step: 3}", "Unknown key 'training.step': did you mean 'training.steps'?"),
        ("training: {steps: soon}", "training.steps"),
        ("training: [1, 2]", "training"),
        ("training: {steps: 3", "expected ',' or '}'"),
        ("", "the configuration is empty"),
        ("training: {steps: 3}\ndata: {}\ntraining: {seed: 3}", "'training' is given twice"),
        ("training: {steps: 3, seed: 3, steps: 4}", "'steps' is given twice"),
        ("training: {steps: 3}\ntraining.seed: 3", "'training.seed' is given twice, first as 'training'"),
        ("training.seed: 3\ntraining: {steps: 3}", "'training' is given twice, first as 'training.seed'"),
        ("alignment: {teachers: [{name: a, name: b}]}", "'name' is given twice"),
        ("? [training]\n: 3", "found unhashable key"),
        ("training: &t {steps: 3, also: *t}", "this section or list contains itself"),
        ("alignment: {teachers: &t [*t]}", "this section or list contains itself"),
        ("model: {name: null}", "model.name: Expected `str`, got `null`"),
        ("model: {mlp_ratio: .inf}", "model.mlp_ratio: Expected `float` <= 64"),
        ("model: {hidden_size: 1000000000}", "model.hidden_size: Expected `int` <= 16384"),
        ("alignment: {teachers: []}", "alignment.teachers: Expected `array` of length >= 1"),
        ("optimizer: {lr: .inf}", "optimizer.lr: Expected `float` <= 1000000"),
        ("optimizer: {eps: .inf}", "optimizer.eps: Expected `float` <= 1000000"),
        ("flow: {shift: .inf}", "flow.shift: Expected `float` <= 1000000"),
        ("flow: {shift: .nan}", "flow.shift: Expected `float` > 0"),
        ("data: {path: ''}", "data.path: Expected `str` of length >= 1"),
        ("training: {steps: 1e30}", "training.steps: Expected `int` <= 1000000000000"),
        (f"training: {{steps: {'9' * 5000}}}", "this number has more than 40 digits"),
        ("training: {steps: !!int x}", "the tag tag:yaml.org,2002:int has no meaning here"),
        ("training: {steps: 0b_}", "invalid literal"),
        ("alignment: {teachers: " + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 30 deep"),
        (BOMB, "aliases expand this to more than 100,000 values"),
        ("training:\nlog: {every: 3}", "'training' is a section of keys and cannot be nothing"),
        ("flow: {meanflow: null}", "'flow.meanflow' is a section of keys and cannot be nothing"),
        ("flow: {meanflow: {block: 1}}", "Unknown key 'flow.meanflow.block': did you mean 'flow.meanflow.blocks'?"),
        ("flow: {meanflow: {guidance: 0.5}}", "flow.meanflow.guidance: Expected `float` >= 1"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as raised:
        load_config(tmp_path / "c.yaml")
    assert message in str(raised.value)


def test_print_config_shows_the_resolved_file(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(["--config", str(CONFIGS / "quickstart.yaml"), "--training.steps", "7", "--print_config"])
    assert exit_.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["steps"] == 7
    assert shown["model"]["hidden_size"] == 128


def test_keys_and_differences() -> None:
    keys = config_keys()
    assert {"model.name", "alignment.block", "preview.every"} <= set(keys)
    assert len(keys) == len(set(keys))
    old = yaml.safe_load(Config().to_yaml())
    new = {**old, "training": {**old["training"], "steps": 3}}
    assert config_differences(old, new) == ["training.steps: 400000 -> 3"]
    assert config_differences(old, old) == []


def test_whole_numbers_may_be_written_with_an_exponent_and_values_by_alias(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {steps: &n 1e5, batch_size: 64.0}\nlog: {every: *n}")
    config = load_config(tmp_path / "c.yaml")
    assert (config.training.steps, config.training.batch_size, config.log.every) == (100_000, 64, 100_000)
    assert isinstance(config.training.steps, int)
