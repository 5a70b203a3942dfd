"""What grafting refuses, in one paragraph and before anything is written."""

import json
from pathlib import Path

import pytest
from test_graft import graft, stopped, trained

from sit_atconv.graft.fitting import Fitting
from sit_atconv.graft.run import next_command


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    trained().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mixer-pattern attention", "nothing to graft: choose another --mixer-pattern, or --self"),
        ('--mixer-pattern ["attention"]', "nothing to graft"),
        ('--mixer-pattern ["attention","atconv","conv","conv"]', "names 4 mixers for 3 blocks"),
        ("--mixer-pattern atconf", "Unknown mixer 'atconf'"),
        ('--mixer-pattern [{"name":"atconv","kernel":3}]', "no option 'kernel'"),
        ("--mixer-pattern [attention", "this is not YAML"),
        ("--mixer-pattern 7", "--mixer-pattern: Expected"),
        ("--mixer-pattern hybrid --self", "not allowed with argument"),
        ("--self --loss l3", "invalid choice: 'l3'"),
        ("--self --lr 0", "must be positive and finite, not 0.0"),
        ("--self --steps 0", "'0' is not a whole number from 1"),
        ("--self --data digits:train@16", "latents of 16x16, the network was trained on 8x8"),
        ("--self --data nowhere", "'nowhere' is not a prepared data set"),
        ("--self --weights raw", "is a model by itself and not in a checkpoint"),
        ("--self --plugins no_such_module", "The plugin no_such_module cannot be imported"),
    ],
)
def test_words_that_cannot_be_used(teacher: Path, tmp_path: Path, capsys, words: str, message: str) -> None:
    require_refusal(capsys, teacher, tmp_path / "out", words, message)
    assert not (tmp_path / "out").exists()


def require_refusal(capsys: pytest.CaptureFixture, checkpoint: Path, out: Path, words: str, message: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        graft(checkpoint, out, words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error, error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, "has 10 classes, the model 7"),
        ({"in_channels": 4, "latents": None}, "has latents of 1 channels, the model 4"),
        ({"class_names": [f"class {number}" for number in range(10)]}, "classes that the model does not have"),
    ],
)
def test_a_network_that_the_data_are_not_for(tmp_path: Path, capsys, options: dict, message: str) -> None:
    trained(**options).save_pretrained(tmp_path / "teacher")
    require_refusal(capsys, tmp_path / "teacher", tmp_path / "out", "--mixer-pattern hybrid", message)
    assert not (tmp_path / "out").exists()


def test_what_is_no_network_and_places_that_are_taken(teacher: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    require_refusal(capsys, tmp_path / "empty", tmp_path / "out", "--self", "is not a checkpoint")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    require_refusal(capsys, tmp_path / "other", tmp_path / "out", "--self", "holds a UNet2DModel, not a SiT")
    require_refusal(capsys, teacher, tmp_path / "other", "--self", "exists and is not a graft: choose another OUT")
    require_refusal(capsys, teacher, teacher / "config.json", "--self", "exists and is not a graft")
    graft(teacher, tmp_path / "out")
    for words, key in [("--self", "self: False -> True"), ("--seed 1", "seed: 0 -> 1"), ("--steps 7", "steps: 6 -> 7")]:
        pattern = "" if words == "--self" else "--mixer-pattern hybrid "
        require_refusal(capsys, teacher, tmp_path / "out", pattern + words, key)
    trained("conv").save_pretrained(teacher)
    require_refusal(capsys, teacher, tmp_path / "out", "--mixer-pattern hybrid", "belongs to another graft")
    state = tmp_path / "begun" / "unfinished.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Fitting, "step", Fitting.step)
        stopped(4)
        with pytest.raises(SystemExit):
            graft(teacher, tmp_path / "begun")
    state.write_bytes(state.read_bytes()[:-5])
    require_refusal(capsys, teacher, tmp_path / "begun", "--mixer-pattern hybrid", "unfinished.safetensors is damaged")


def test_what_the_launcher_must_not_ask_for(teacher: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    with monkeypatch.context() as told:
        told.setenv("ACCELERATE_USE_FSDP", "true")
        require_refusal(capsys, teacher, tmp_path / "out", "--self", "asks for FSDP or DeepSpeed")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    require_refusal(capsys, teacher, tmp_path / "out", "--self", "--mixed_precision bf16")
    assert not (tmp_path / "out").exists()


def test_losses_that_are_not_finite_end_the_fit(teacher: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        graft(teacher, tmp_path / "out", "--mixer-pattern hybrid --lr 1e30 --loss mse")
    assert "was not finite" in str(end.value.code) or "was not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


def test_the_next_command_turns_off_keys_that_no_new_mixer_has(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000001"
    checkpoint.joinpath("model").mkdir(parents=True)
    (checkpoint / "model" / "config.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text("model: {name: SiT-S/4, qk_norm: true}\n")
    command = next_command(checkpoint, tmp_path / "new", "digits", "atconv")
    assert "--model.mixer_pattern 'atconv' --model.qk_norm false --model.init_from" in command
