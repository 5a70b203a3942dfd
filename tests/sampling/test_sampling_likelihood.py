"""Likelihood and inversion of data under a checkpoint: closed forms, independence of the batch, the two commands."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sit_atconv import SiT, create_model
from sit_atconv.autoencoder import LatentSpec
from sit_atconv.data.dataset import open_dataset
from sit_atconv.errors import InputError
from sit_atconv.sampling import SamplerSettings, inversion, likelihood
from sit_atconv.sampling.inversion import invert_latents
from sit_atconv.sampling.likelihood import score_likelihood

DATA = "digits:heldout@8"
TINY = {"hidden_size": 16, "depth": 2, "num_heads": 2, "input_size": 8, "in_channels": 1}


def digit_model(std: float, **options: object) -> SiT:
    """A model of the digits; std 0 leaves it fresh, which is a velocity of zero."""
    torch.manual_seed(1)
    latents = LatentSpec("identity", None, 1, 1).to_dict()
    model = create_model("SiT-Hybrid-S/2", **{**TINY, "num_classes": 10, "latents": latents, **options})
    for parameter in model.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return model.eval()


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_without_a_flow_the_likelihood_is_the_normal_distributions(solver: str) -> None:
    dataset, rows = open_dataset(DATA), range(6)
    bits = torch.cat(list(score_likelihood(digit_model(0), dataset, SamplerSettings(solver, 2), rows=rows)))
    x = dataset.read(rows, [False] * 6)["moments"][:, 0].flatten(1)
    nats = (x.square() / 2).mean(1) + math.log(2 * math.pi) / 2
    # Of 8-bit pixels: a grey level is 1/127.5. Dequantisation moves x by half of one at most.
    torch.testing.assert_close(bits, (nats / math.log(2) + math.log2(127.5)).double(), rtol=0, atol=3e-3)


def test_the_model_stays_trainable() -> None:
    model = digit_model(0.1)
    model.patch_embed.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    bits = score_likelihood(model, open_dataset(DATA), SamplerSettings("heun", 1), rows=range(2), batch_size=1)
    next(bits)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_likelihood_depends_on_seed_and_row_alone() -> None:
    model, dataset, settings = digit_model(0.1), open_dataset(DATA), SamplerSettings("heun", 4)
    together = torch.cat(list(score_likelihood(model, dataset, settings, rows=range(5), batch_size=5)))
    apart = torch.cat(list(score_likelihood(model, dataset, settings, rows=[4, 1], batch_size=1)))
    torch.testing.assert_close(apart, together[[4, 1]], rtol=1e-5, atol=1e-5)
    other = torch.cat(list(score_likelihood(model, dataset, settings, rows=range(5), seed=1)))
    assert (other - together).abs().min() > 1e-5


@pytest.mark.parametrize("solver", ["midpoint", "dopri5"])
def test_noise_leads_back_to_the_image(solver: str) -> None:
    latents, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 7, 7])
    inverted = invert_latents(digit_model(0.2), latents, labels, SamplerSettings(solver, 100))
    torch.testing.assert_close(inverted.returned, latents, rtol=0, atol=1e-2)
    assert (inverted.noise - latents).abs().max() > 0.5


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (SamplerSettings("heun", 2, guidance=2.0), {}, "without guidance|no guidance"),
        (SamplerSettings("sde", 2), {}, "follows the ODE"),
        (SamplerSettings("heun", 2), {"num_classes": 9}, "10 classes, the model 9"),
        (SamplerSettings("heun", 2), {"latents": None, "in_channels": 3}, "1 channels, the model 3"),
        (SamplerSettings("heun", 2), {"latents": LatentSpec("identity", None, 1, 1, 0.5).to_dict()}, "scale"),
    ],
)
def test_what_has_no_likelihood_is_refused_before_any_call(settings, options, message) -> None:
    model = digit_model(0, **options)
    model.forward = None
    with pytest.raises(InputError, match=message):
        next(score_likelihood(model, open_dataset(DATA), settings, rows=range(2)))


def test_the_commands(tmp_path: Path, capsys) -> None:
    digit_model(0.1).save_pretrained(tmp_path / "model")
    words = ["--checkpoint", str(tmp_path / "model"), "--data", DATA, "--num-images", "4", "--steps", "3"]
    likelihood.main([*words, "--json", str(tmp_path / "bits.json")])
    report = json.loads((tmp_path / "bits.json").read_text())
    assert report["count"] == 4
    assert report["of"] == "8-bit pixels"
    assert report["bits_per_dimension"] > 1

    inversion.main([*words, "--out", str(tmp_path / "out")])
    with np.load(tmp_path / "out" / "inversion.npz") as file:
        assert file["noise"].shape == (4, 1, 8, 8)
        assert file["before"].shape == file["after"].shape == (4, 8, 8, 3)
    assert (tmp_path / "out" / "grid.png").stat().st_size > 100

    for command, extra in ((likelihood, []), (inversion, ["--out", str(tmp_path / "no")])):
        with pytest.raises(SystemExit) as exit_:
            command.main([*words, *extra, "--num-images", "9999"])
        assert exit_.value.code == 2
    assert "the data set has 896" in capsys.readouterr().err
