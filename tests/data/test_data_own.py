"""Every case of docs/own_data.md in small: prepare, train and sample by their commands."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image
from released_sources import Source, random_state
from safetensors.torch import load_file
from test_autoencoder import small_kl
from training_runs import TINY, fresh_accelerate

import sample as sample_command
import train as train_command
from sit_atconv.autoencoder import LatentSpec
from sit_atconv.config import AlignmentConfig, FlowConfig, TeacherConfig
from sit_atconv.convert.__main__ import main as convert
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.errors import InputError
from sit_atconv.models import SiT, create_model
from sit_atconv.models.checkpoint import load_model
from sit_atconv.sampling import open_generator
from sit_atconv.training.session.finetune import begin_with
from sit_atconv.training.session.objective import Objective
from sit_atconv.training.session.projectors import begin_projectors, copy_projectors

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """Three classes of four photographs."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(12):
        path = root / ("ant", "bee", "cat")[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(root)


def small_deep(folder: Path) -> Path:
    """An autoencoder of 32 channels, as SANA's, two pixels to a latent."""
    AutoencoderDC(
        3, 32, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 32), decoder_block_out_channels=(16, 32), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def run(photos: str, folder: Path, vae: str, prepare_words: str, train_words: str = "") -> SiT:
    """From photographs to two samples, by the three commands; the trained model."""
    prepare([photos, str(folder / "data"), "--vae", vae, "--workers", "0", *prepare_words.split()])
    fresh_accelerate()
    words = f"{TINY} --data.path {folder / 'data'} --training.steps 1 --preview.every null {train_words}".split()
    train_command.main(["--config", CONFIG, "--run", str(folder / "run"), *words])
    checkpoint = folder / "run" / "checkpoints" / "latest" / "model"
    out = ["--out", str(folder / "out"), "--num-samples", "2", "--solver", "euler", "--steps", "2"]
    sample_command.main(["--checkpoint", str(checkpoint), *out])
    return load_model(checkpoint)


@pytest.mark.parametrize(
    ("vae", "words", "channels", "latent", "classes"),
    [
        ("kl4", "--resolution 16", 4, (8, 8), 3),
        ("kl4", "--resolution 16 --unconditional", 4, (8, 8), 0),
        ("kl4", "--resolution 16x24 --flip", 4, (8, 12), 3),
        ("kl16", "--resolution 24x16", 16, (12, 8), 3),
        ("deep32", "--resolution 16", 32, (8, 8), 3),
        ("identity", "--resolution 8x12", 3, (8, 12), 3),
    ],
)
def test_own_pictures_make_a_model_of_their_own_size(photos, tmp_path, vae, words, channels, latent, classes):
    make = {
        "kl4": lambda: small_kl(tmp_path / "vae"),
        "kl16": lambda: small_kl(tmp_path / "vae", latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        "deep32": lambda: small_deep(tmp_path / "vae"),
        "identity": lambda: vae,
    }
    model = run(photos, tmp_path, str(make[vae]()), words, "--data.flip true" if "--flip" in words else "")
    config, spec = model.config, LatentSpec.from_dict(model.config.latents)
    assert (config.in_channels, tuple(config.input_size), config.num_classes) == (channels, latent, classes)
    assert config.class_names == (["ant", "bee", "cat"] if classes else None)
    assert (spec.channels, spec.scale, spec.shift) == {
        "kl4": (4, 0.18215, 0.0), "kl16": (16, 0.3611, 0.1159), "deep32": (32, 0.41407, 0.0), "identity": (3, 1.0, 0.0)
    }[vae]  # fmt: skip
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert images.shape == (2, *(side * spec.downscale for side in latent), 3)


def trained(folder: Path, names: list[str] | None, **overrides) -> SiT:
    """A model that has left its initialisation behind."""
    options = {"input_size": 8, "num_classes": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, **overrides}
    model = create_model("SiT-Hybrid-S/2", class_names=names, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def fresh(names: list[str] | None, **overrides) -> SiT:
    options = {"input_size": (6, 10), "num_classes": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, **overrides}
    return create_model("SiT-Hybrid-S/2", class_names=names, **options).eval()


@pytest.mark.parametrize(
    ("theirs", "ours", "overrides", "same"),
    [
        (["a", "b", "c"], ["c", "d", "a", "b"], {}, [2, 3, 0, 1, 3]),  # by name; d begins as the null class
        (None, ["a", "b", "c"], {"num_classes": 3}, [0, 1, 2, 3]),  # as many: by number
        (None, ["a", "b", "c", "d"], {}, [3, 3, 3, 3, 3]),  # nothing is known of them
        (["a", "b", "c"], None, {"num_classes": 2}, [3, 3, 3]),
    ],
)
def test_fine_tuning_begins_with_the_same_velocity(tmp_path, theirs, ours, overrides, same):
    """At another resolution and aspect ratio, for every class that means the same, and for the null class."""
    source, model = trained(tmp_path / "source", theirs), fresh(ours, **overrides)
    begin_with(model, str(tmp_path / "source"))
    x, t = torch.randn(len(same), 4, 6, 10), torch.rand(len(same))
    torch.testing.assert_close(model(x, t, torch.arange(len(same))), source(x, t, torch.tensor(same)))


def test_fine_tuning_to_an_unconditional_model_keeps_everything_but_labels(tmp_path):
    source, model = trained(tmp_path / "source", None), fresh(None, num_classes=0)
    begin_with(model, str(tmp_path / "source"))
    weights = model.state_dict()
    assert all(torch.equal(weights[n], v) for n, v in source.state_dict().items() if n != "label_embed.weight")


def test_fine_tuning_from_released_weights_by_command(photos, tmp_path):
    """Five classes, square, one autoencoder's name; three classes and a rectangle here."""
    torch.save({"ema": random_state(Source(width=16, heads=2, mlp=64, variance=False))}, tmp_path / "released.pt")
    convert([str(tmp_path / "released.pt"), str(tmp_path / "released"), "--num-heads", "2", "--layout", "repa"])
    vae = str(small_kl(tmp_path / "vae", stages=4))
    words = f"--model.name SiT-S/2 --model.init_from {tmp_path / 'released'} --optimizer.lr 1e-12"
    model, released = run(photos, tmp_path, vae, "--resolution 48x32", words), load_model(tmp_path / "released")
    assert (model.config.num_classes, tuple(model.config.input_size)) == (3, (6, 4))
    x, t = torch.randn(4, 4, 6, 4), torch.rand(4)
    null = torch.full((4,), released.num_classes)
    torch.testing.assert_close(model(x, t, torch.arange(4)), released(x, t, null), rtol=1e-4, atol=1e-4)

    shutil.rmtree(tmp_path / "released")  # a run that is under way no longer needs it
    fresh_accelerate()
    words = f"{TINY} --data.path {tmp_path / 'data'} --training.steps 2 --preview.every null {words}".split()
    train_command.main(["--config", CONFIG, "--run", str(tmp_path / "run"), *words])


ALIGNED = {"block": 1, "projector_width": 64, "teachers": [{"name": "test_vit", "weights": "random"}]}


def released_repa(folder: Path, widths: tuple[int, ...] = (64, 40), **arguments) -> Path:
    """REPA's layout, converted: the first projector is as wide as test_vit's tokens."""
    state = random_state(Source("repa", width=16, heads=2, mlp=64, variance=False, projector_widths=widths))
    torch.save({"ema": state, "args": argparse.Namespace(**arguments)}, folder / "released.pt")
    convert([str(folder / "released.pt"), str(folder / "released"), "--num-heads", "2"])
    return folder / "released"


def begin(path: Path, **alignment) -> Objective:
    """A fresh objective that has taken over what it can."""
    config = AlignmentConfig(**{**ALIGNED, **alignment, "teachers": [TeacherConfig(**t) for t in ALIGNED["teachers"]]})
    torch.manual_seed(1)
    objective = Objective(create_model("SiT-S/2", 8, hidden_size=16, depth=2, num_heads=2), FlowConfig(), config, (64,))
    begin_projectors(objective.projectors, config, str(path))
    return objective


def test_fine_tuning_begins_with_released_projectors(photos, tmp_path, caplog):
    caplog.set_level("INFO")
    released = released_repa(tmp_path, encoder_depth=1, enc_type="dinov2-vit-b,clip-vit-L")
    state, theirs = begin(released).projectors.state_dict(), load_file(released / "projectors.safetensors")
    assert "begins with that for dinov2-vit-b after block 1" in caplog.text
    assert state and all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())

    words = f"--model.name SiT-S/2 --model.init_from {released} --optimizer.lr 1e-12 --alignment "
    words += json.dumps(ALIGNED, separators=(",", ":"))
    run(photos, tmp_path, str(small_kl(tmp_path / "vae", stages=4)), "--resolution 64 --images", words)
    weights = load_file(tmp_path / "run" / "checkpoints" / "latest" / "weights.safetensors")
    found = {name.removeprefix("projectors."): t for name, t in weights.items() if name.startswith("projectors.")}
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-9)

    # A run of ours has them in its checkpoint.
    state = begin(tmp_path / "run" / "checkpoints" / "latest" / "model").projectors.state_dict()
    assert "begins with that for test_vit after block 1" in caplog.text
    assert all(torch.equal(tensor, found[name]) for name, tensor in state.items())

    # They go with it into another folder, with their block and teacher.
    (tmp_path / "copied").mkdir()
    copy_projectors(tmp_path / "run" / "checkpoints" / "latest" / "model", tmp_path / "copied")
    caplog.clear()
    state = begin(tmp_path / "copied").projectors.state_dict()
    assert "begins with that for test_vit after block 1" in caplog.text
    assert all(torch.equal(tensor, found[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("widths", "alignment", "message"),
    [
        ((64,), {"block": 2}, "there it follows block 1, here block 2"),
        ((40,), {}, "layers.4.bias is (40,) there, (64,) here"),
        ((64,), {"projector_width": 32}, "layers.0.bias is (64,) there, (32,) here"),
        ((64,), {"variant": "irepa"}, "conv.bias is missing there, (64,) here"),
    ],
)
def test_projectors_that_do_not_fit_begin_anew(tmp_path, caplog, widths, alignment, message):
    released = released_repa(tmp_path, widths, encoder_depth=1)
    fresh_ones = begin(tmp_path / "nothing", **alignment).projectors.state_dict()
    found = begin(released, **alignment).projectors.state_dict()
    assert f"The projector for test_vit begins anew: {message}." in caplog.text
    assert all(torch.equal(tensor, fresh_ones[name]) for name, tensor in found.items())


def test_projectors_of_an_unknown_block_and_damaged_ones(tmp_path, caplog):
    caplog.set_level("INFO")
    released = released_repa(tmp_path, (64,))
    begin(released, block=2)
    assert "that for an unnamed teacher after an unnamed block, taken for 2" in caplog.text
    path = released / "projectors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"projectors\.safetensors is damaged"):
        begin(released)


def test_networks_that_cannot_begin_with_these_weights(photos, tmp_path):
    trained(tmp_path / "source", None, latents=LatentSpec("x", "0" * 64, 4, 8, 0.18215).to_dict())
    for overrides, message in (
        ({"in_channels": 16}, r"in_channels: 4 there, 16 here.*data of the same autoencoder"),
        ({"depth": 3}, "depth: 2 there, 3 here"),
        ({"mixer_pattern": "attention"}, "mixer_pattern: attention, atconv there, attention here"),
        ({"prediction": "noise"}, "prediction: velocity there, noise here"),
        ({"position": "none"}, "position: sincos there, none here"),
        (
            {"latents": LatentSpec("y", "1" * 64, 4, 8, 0.3611).to_dict()},
            r"autoencoder x. .* .autoencoder y. differ in scale: 0.18215 ",
        ),
    ):
        with pytest.raises(InputError, match=message):
            begin_with(fresh(None, **overrides), str(tmp_path / "source"))
    for digest in ("1" * 64, None):
        begin_with(fresh(None, latents=LatentSpec("y", digest, 4, 8, 0.18215).to_dict()), str(tmp_path / "source"))
    begin_with(fresh(None, mixer_pattern=["attention", "atconv"]), str(tmp_path / "source"))
    with pytest.raises(InputError, match="is not a checkpoint"):
        begin_with(fresh(None), str(tmp_path))
    with pytest.raises(InputError, match="has 16 latent channels, not 4"):
        open_generator(tmp_path / "source", str(small_kl(tmp_path / "vae16", latent_channels=16)))


def test_a_model_with_fewer_classes_than_the_data_is_refused(photos, tmp_path, capsys):
    prepare([photos, str(tmp_path / "data"), "--vae", "identity", "--resolution", "8", "--workers", "0"])
    assert open_dataset(str(tmp_path / "data")).num_classes == 3
    words = f"{TINY} --data.path {tmp_path / 'data'} --model.num_classes 2".split()
    with pytest.raises(SystemExit) as caught:
        train_command.main(["--config", CONFIG, "--run", str(tmp_path / "run"), *words])
    assert caught.value.code == 2 and "has 3 classes, the model 2" in capsys.readouterr().err
