"""`sample.py --weights`: which of a checkpoint's weights are drawn from, and who knows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling_fixtures import images_of, tiny_model
from training_runs import NO_PREVIEW, run_tiny

import sample
from evaluate_fid import open_stream
from sit_atconv import SiT, SiTPipeline
from sit_atconv.errors import InputError
from sit_atconv.evaluation.command import parse, run
from sit_atconv.models.checkpoint import find_weights, load_model
from sit_atconv.sampling import SamplerSettings
from sit_atconv.sampling.arguments import add_sampling_arguments

WORDS = ["--num-samples", "4", "--steps", "1", "--solver", "euler"]
FOLDERS = {"0.9999": "model", "0.5": "model-0.5", "power-0.1": "model-power-0.1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a run of 6 steps that keeps three averages, the first of them nearly its random weights."""
    folder = tmp_path_factory.mktemp("weights")
    averages = "--training.ema_decay 0.9999 --training.more_ema_decays [0.5] --training.power_ema [0.1]"
    run_tiny(folder / "run", f"{averages} {NO_PREVIEW} --optimizer.lr 0.05")
    return folder / "run" / "checkpoints" / "latest"


def drawn(checkpoint: Path, out: Path, *words: str) -> np.ndarray:
    sample.main(["--checkpoint", str(checkpoint), "--out", str(out), *WORDS, *words])
    return np.load(out / "samples.npz")["arr_0"].transpose(0, 3, 1, 2)


def in_training(checkpoint: Path) -> SiT:
    model = SiT.from_pretrained(checkpoint / "model")
    tensors = load_file(checkpoint / "weights.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    return model.eval()


@pytest.mark.parametrize("name", ["raw", *FOLDERS])
def test_any_weights_of_a_checkpoint_are_drawn_by_name(checkpoint, tmp_path, name, caplog):
    model = in_training(checkpoint) if name == "raw" else load_model(checkpoint / FOLDERS[name])
    expected = images_of(model, range(4), SamplerSettings("euler", 1))
    images = drawn(checkpoint / "model", tmp_path / "out", "--weights", name)
    assert np.array_equal(images, expected)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["weights"] == name
    assert ("99.9 % of which are the weights that training began with" in caplog.text) == (name == "0.9999")
    if name != "0.9999":  # the default
        assert not np.array_equal(images, drawn(checkpoint / "model", tmp_path / "other"))


def test_every_path_into_a_checkpoint_finds_its_weights(checkpoint):
    for path in (checkpoint, checkpoint / "model", checkpoint.resolve() / "model-0.5"):
        assert find_weights(path, "raw").file.resolve() == checkpoint.resolve() / "weights.safetensors"
    assert [find_weights(path).name for path in (checkpoint, checkpoint / "model-0.5")] == ["0.9999", "0.5"]
    assert str(find_weights(checkpoint, "raw")) == "the weights in training of step 6"


def test_a_name_that_is_not_there_is_refused(checkpoint, tmp_path, capsys):
    for path, name, message in (
        (checkpoint / "model", "0.999", "holds no weights '0.999'; it holds 0.9999, 0.5, power-0.1, raw."),
        (checkpoint, "power", "it holds 0.9999, 0.5, power-0.1, raw."),
    ):
        with pytest.raises(SystemExit) as ended:
            drawn(path, tmp_path / "out", "--weights", name)
        assert ended.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()
    tiny_model().save_pretrained(tmp_path / "alone")
    with pytest.raises(SystemExit):
        drawn(tmp_path / "alone", tmp_path / "out", "--weights", "raw")
    assert "is a model by itself and not in a checkpoint" in capsys.readouterr().err
    with pytest.raises(InputError, match="a model by itself"):
        SiTPipeline.from_pretrained(tmp_path / "alone", weights="0.5")


def test_a_directory_is_continued_with_the_weights_it_was_begun_with(checkpoint, tmp_path, capsys):
    first = drawn(checkpoint / "model", tmp_path / "out")
    assert np.array_equal(first, drawn(checkpoint / "model", tmp_path / "out", "--weights", "0.9999"))  # the same
    with pytest.raises(SystemExit):
        drawn(checkpoint / "model", tmp_path / "out", "--weights", "raw")
    assert "other settings (weights: 0.9999 -> raw)" in capsys.readouterr().err
    settings = tmp_path / "out" / "settings.json"
    earlier = {key: value for key, value in json.loads(settings.read_text()).items() if key != "weights"}
    settings.write_text(json.dumps(earlier))  # as an earlier version wrote it
    assert np.array_equal(first, drawn(checkpoint / "model", tmp_path / "out"))
    with pytest.raises(SystemExit):
        drawn(checkpoint / "model", tmp_path / "out", "--weights", "0.5")
    assert "is not the one that the samples" in capsys.readouterr().err


def test_damaged_weights_and_checkpoints_of_earlier_versions(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.resolve(), copy)
    tensors = load_file(copy / "weights.safetensors")
    for damage, message in (
        ({**tensors, "model.extra": torch.zeros(1)}, "cannot be loaded"),
        ({**tensors, next(iter(tensors)): torch.full((3,), torch.nan)}, "cannot be loaded"),
    ):
        save_file(damage, copy / "weights.safetensors")
        with pytest.raises(InputError, match=message):
            load_model(copy, "raw")
    (copy / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(copy, "raw")
    position = json.loads((copy / "position.json").read_text())
    (copy / "position.json").write_text(json.dumps({key: v for key, v in position.items() if key != "weights"}))
    assert find_weights(copy).name is None and find_weights(copy, "0.5").folder == copy / "model-0.5"
    with pytest.raises(InputError, match=r"it holds 0\.5, power-0\.1, raw\."):
        load_model(copy, "0.9999")
    (copy / "position.json").write_text('{"step": "six"}')
    with pytest.raises(InputError, match=r"position\.json: step: Expected `int`"):
        load_model(copy, "raw")


def test_the_model_card_names_the_weights(checkpoint, tmp_path):
    scores = {"metrics": {"fid": 1.0}, "samples": {"count": 4, "weights": "raw"}, "warnings": []}
    (tmp_path / "scores.json").write_text(json.dumps({**scores, "reference": {"path": "x", "kind": "npz"}}))
    pipeline = SiTPipeline.from_pretrained(checkpoint, weights="raw")
    assert torch.equal(pipeline.transformer.patch_embed.weight, in_training(checkpoint).patch_embed.weight)
    pipeline.save_pretrained(tmp_path / "card", scores=tmp_path / "scores.json")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "The weights are the weights in training of step 6." in card
    assert "4 samples drawn from the weights raw against x" in card
    SiTPipeline.from_pretrained(checkpoint / "model").save_pretrained(tmp_path / "average")
    card = (tmp_path / "average" / "README.md").read_text()
    assert "the average 0.9999 of step 6, 99.9 % of which are the weights that training began with." in card


def test_evaluation_draws_the_weights_asked_for(checkpoint, tmp_path):
    words = ["--checkpoint", str(checkpoint / "model"), "--reference", "digits:heldout@8", "--features", "pixels"]
    words += ["--device", "cpu", *WORDS, "--metrics", "fd_pixels", "--json"]
    digests = []
    for name in ("raw", "0.5"):
        run(
            parse([*words, str(tmp_path / "s.json"), "--checkpoint-weights", name], add_sampling_arguments), open_stream
        )
        samples = json.loads((tmp_path / "s.json").read_text())["samples"]
        assert samples["weights"] == name
        digests.append(samples["images_sha256"])
    assert digests[0] != digests[1]
    with pytest.raises(InputError, match="To choose among the checkpoint's weights, give --checkpoint-weights"):
        run(parse([*words, str(tmp_path / "s.json"), "--weights", "raw"], add_sampling_arguments), open_stream)
