"""Edges found by chance: configurations that are right or spoilt, and checkpoints damaged anywhere."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_runs import ALIGNED, NO_PREVIEW, fresh_accelerate, run_tiny, tiny_config

from sit_atconv.config import Config, config_keys, load_config
from sit_atconv.errors import InputError
from sit_atconv.training import train
from sit_atconv.training.run.integrity import read_position

FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

unit = st.floats(0, 1).map(lambda x: round(x, 4))
open_unit = st.floats(0.01, 0.99).map(lambda x: round(x, 4))
sides = st.tuples(unit, unit).map(sorted)

VALID = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["SiT-S/2", "SiT-ATConv-B/4", "SiT-Hybrid-L/8"]),
                "hidden_size": st.sampled_from([8, 16]),
                "depth": st.integers(1, 3),
                "num_heads": st.sampled_from([1, 2]),
            },
            optional={
                "mlp_ratio": st.floats(0.5, 4),
                "num_classes": st.sampled_from([None, 0, 10, 12]),
                "kernel_size": st.sampled_from([1, 3, 5]),
                "pool": st.sampled_from(["grid", "raster"]),
                "activation": st.sampled_from(["gelu", "gelu_tanh", "silu"]),
                "position": st.sampled_from(["sincos", "none"]),
            },
        ),
        "data": st.fixed_dictionaries(
            {"path": st.just("digits:train@8"), "workers": st.just(0), "flip": st.booleans()}
        ),
        "flow": st.fixed_dictionaries(
            {},
            optional={
                "interpolant": st.sampled_from(["linear", "cosine"]),
                "prediction": st.sampled_from(["velocity", "noise", "score", "data"]),
                "times": st.sampled_from(["uniform", "logit-normal"]),
                "shift": st.floats(0.1, 10),
                "label_dropout": st.floats(0.01, 1),  # with 0 a grid cannot be guided
            },
        ),
        "optimizer": st.fixed_dictionaries(
            {},
            optional={
                "lr": st.floats(1e-6, 1),
                "betas": st.tuples(open_unit, open_unit).map(list),
                "weight_decay": unit,
                "clip_norm": st.none() | st.floats(0.01, 10),
                "warmup_steps": st.integers(0, 10),
                "schedule": st.sampled_from(["constant", "linear"]),
            },
        ),
        "training": st.fixed_dictionaries(
            {"steps": st.just(1), "batch_size": st.sampled_from([4, 8]), "precision": st.sampled_from(["no", "bf16"])},
            optional={
                "accumulation": st.sampled_from([1, 2, 4]),
                "ema_decay": open_unit,
                "power_ema": st.lists(st.sampled_from([0.05, 0.1, 0.2]), unique=True, max_size=2),
                "gradient_checkpointing": st.sampled_from(["none", "blocks", "mixers"]),
                "seed": st.integers(0, 2**40),
            },
        ),
        "log": st.fixed_dictionaries(
            {}, optional={"every": st.integers(1, 5), "keep": st.none() | st.integers(1, 3), "keep_every": st.just(2)}
        ),
        "preview": st.fixed_dictionaries(
            {
                "every": st.none() | st.just(1),
                "steps": st.just(1),
                "classes": st.just(2),
                "per_class": st.integers(1, 2),
            },
            optional={"solver": st.sampled_from(["euler", "sde"]), "guidance": unit, "interval": sides},
        ),
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load(folder: Path, values: dict) -> Config:
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "config.yaml")


@MANY
@given(values=VALID)
def test_valid_configurations_load_and_round_trip(folder: Path, values: dict) -> None:
    config = load(folder, values)
    (folder / "again.yaml").write_text(config.to_yaml())
    assert load_config(folder / "again.yaml") == config
    resolved = yaml.safe_load(config.to_yaml())
    for section, keys in values.items():
        for key, value in keys.items():
            assert resolved[section][key] == value


@FEW
@given(values=VALID)
def test_valid_configurations_train_a_step(folder: Path, values: dict) -> None:
    shutil.rmtree(folder / "run", ignore_errors=True)
    fresh_accelerate()
    train(load(folder, values), folder / "run")
    assert read_position(folder / "run" / "checkpoints" / "latest")["step"] == 1
    assert load_config(folder / "run" / "config.yaml") == load_config(folder / "config.yaml")


@MANY
@given(values=VALID, data=st.data())
def test_spoilt_configurations_name_the_key(folder: Path, values: dict, data: st.DataObject) -> None:
    """A key misspelt by one letter, or a value that no key of its kind has."""
    section = data.draw(st.sampled_from([name for name, keys in values.items() if keys]))
    key = data.draw(st.sampled_from(sorted(values[section])))
    keys = dict(values[section])
    if data.draw(st.booleans()):
        letter = data.draw(st.integers(0, len(key) - 1))
        named = key[:letter] + "_q" + key[letter + 1 :]
        keys[named] = keys.pop(key)
        assert f"{section}.{named}" not in config_keys()
    else:
        named = key
        keys[key] = {"not": ["a", "value"]}
    with pytest.raises(InputError) as refusal:
        load(folder, {**values, section: keys})
    assert named in str(refusal.value)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("damage") / "run"
    run_tiny(run, f"--training.steps 2 {NO_PREVIEW} {ALIGNED} --training.more_ema_decays [0.9]")
    yield run


FILES = [
    "position.json",
    "weights.safetensors",
    "optimizer.safetensors",
    "model/config.json",
    "model/diffusion_pytorch_model.safetensors",
    "model-0.9/config.json",
    "model-0.9/diffusion_pytorch_model.safetensors",
]


@MANY
@given(name=st.sampled_from(FILES), how=st.sampled_from(["missing", "cut", "flipped", "longer"]), where=unit)
def test_damage_anywhere_is_refused_by_name(whole_run: Path, name: str, how: str, where: float) -> None:
    checkpoint = whole_run / "checkpoints" / "step-0000002"
    path = checkpoint / name
    content = path.read_bytes()
    at = int(where * (len(content) - 1))
    flipped = bytes([content[at] ^ (1 << at % 8)])
    damaged = {"cut": content[:at], "flipped": content[:at] + flipped + content[at + 1 :], "longer": content + b" "}
    path.unlink()
    if how != "missing":
        path.write_bytes(damaged[how])
    harmless = name == "position.json" and damaged.get(how, b"").strip() == content.strip()  # but for white space
    try:
        if harmless:
            assert read_position(checkpoint)["step"] == 2
        else:
            with pytest.raises(InputError, match="step-0000002 is damaged") as caught:
                read_position(checkpoint)
            assert name in str(caught.value)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", FILES[1:])
def test_training_refuses_a_damaged_checkpoint_and_changes_nothing(tmp_path: Path, whole_run: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, symlinks=True)
    path = run / "checkpoints" / "step-0000002" / name
    path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    fresh_accelerate()
    with pytest.raises(InputError, match=name):
        train(tiny_config(f"--training.steps 3 {NO_PREVIEW} {ALIGNED} --training.more_ema_decays [0.9]"), run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_position_of_right_form_and_other_content_is_refused(tmp_path: Path, whole_run: Path) -> None:
    checkpoint = tmp_path / "step-0000002"
    shutil.copytree(whole_run / "checkpoints" / "step-0000002", checkpoint)
    position = json.loads((checkpoint / "position.json").read_text())
    for changed in ({**position, "step": 3}, {**position, "files": {}}, {"step": 2}, [1], None):
        (checkpoint / "position.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=r"is damaged: position\.json"):
            read_position(checkpoint)
