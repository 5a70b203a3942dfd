"""`evaluate_fid.py --autoencoder`: what encoding and decoding alone lose."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from evaluation_fixtures import StandIn
from PIL import Image

from sit_atconv.data.prepare import __main__ as prepare
from sit_atconv.errors import InputError
from sit_atconv.evaluation import Options, command
from sit_atconv.evaluation.command import parse, run
from sit_atconv.evaluation.features.kinds import PixelFeatures
from sit_atconv.evaluation.reconstruction import score_autoencoder
from sit_atconv.evaluation.scoring.per_class import feature_distance
from sit_atconv.images import to_float, to_uint8
from sit_atconv.sampling.arguments import add_sampling_arguments

ROOT = Path(__file__).parents[2]
PIXELS = ["--features", "pixels", "--device", "cpu", "--workers", "0"]


def evaluate_fid(*arguments: str) -> None:
    """The command in this process."""
    run(parse([*arguments, *PIXELS], add_sampling_arguments), lambda options, device: None)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A random autoencoder with a wide posterior, of 2 pixels to a latent."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.3, **stages).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 6, 3), np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    np.savez(path, arr_0=images, arr_1=np.arange(30) % 3)
    return path


def test_distance_and_psnr_are_those_of_the_decoded_means(vae, pictures, tmp_path, capsys):
    report = tmp_path / "scores.json"
    evaluate_fid("--autoencoder", str(vae), "--reference", str(pictures), "--classes", "0,2", "--json", str(report))
    images = torch.from_numpy(np.load(pictures)["arr_0"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        decoded = to_uint8(AutoencoderKL.from_pretrained(vae)(to_float(images)).sample)  # from the posterior's mode
    errors = ((decoded.double() - images.double()) ** 2).mean((1, 2, 3))
    pixels = PixelFeatures()
    expected = {
        "rfd_pixels": feature_distance(pixels(decoded)["pool"], pixels(images)["pool"]),
        "psnr": np.mean([20 * math.log10(255) - 10 * math.log10(error) for error in errors]),
    }
    scores = json.loads(report.read_text())
    assert scores["metrics"] == pytest.approx(expected, rel=1e-3)  # a grey level here and there, from rounding
    assert scores["samples"]["latents"] == "posterior mean" and len(scores["samples"]["autoencoder_sha256"]) == 64
    assert scores["samples"]["count"] == scores["reference"]["count"] == 30 and set(scores["per_class"]) == {"0", "2"}
    table = capsys.readouterr().out
    assert "rFD-pixels" in table and "PSNR" in table and f"{pictures} through {vae}: 30 images of 6x8" in table


def test_published_names_and_an_autoencoder_that_loses_nothing(pictures):
    report = score_autoencoder("identity", str(pictures), StandIn(), Options(kid=True, bootstrap=2))
    assert set(report.metrics) == {"rfid", "rsfid", "ris", "rkid", "rkid_std"} == set(report.intervals) | {"rkid_std"}
    assert report.metrics["rfid"] == pytest.approx(0, abs=1e-9)
    assert "30 pictures are reproduced exactly" in report.unsupported["psnr"]
    assert "rsFID" in report.table() and "rKID std" in report.table()
    chosen = score_autoencoder("identity", str(pictures), StandIn(), Options(metrics=("fid", "recall")))
    assert set(chosen.metrics) == {"rfid", "recall"}


def test_pictures_come_from_any_source_and_never_from_statistics(vae, pictures, tmp_path):
    images = np.load(pictures)["arr_0"][:, :6]
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02d}.png")
    words = ["--resolution", "6", "--vae", "identity", "--images"]
    prepare.main([str(tmp_path / "folder"), str(tmp_path / "prepared"), *words])
    wrong = {"mu": np.full(6, 9.0), "sigma": np.eye(6), "mu_s": np.zeros(5), "sigma_s": np.eye(5)}
    np.savez(tmp_path / "both.npz", arr_0=images, **wrong)
    found = [
        score_autoencoder(str(vae), str(tmp_path / form), StandIn(), Options()).metrics
        for form in ("folder", "prepared", "both.npz")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9) and found[0] == pytest.approx(found[2], rel=1e-9)

    np.savez(tmp_path / "statistics.npz", **wrong)
    with pytest.raises(InputError, match=r"statistics\.npz holds no pictures: --autoencoder encodes"):
        score_autoencoder(str(vae), str(tmp_path / "statistics.npz"), StandIn(), Options())
    Image.fromarray(images[0][:4]).save(tmp_path / "folder" / "99.png")
    with pytest.raises(InputError, match=r"Images differ in size: .* crop or resize them first"):
        score_autoencoder(str(vae), str(tmp_path / "folder"), StandIn(), Options())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "digits@9", "--autoencoder", "{vae}"], "works on multiples of 2 pixels, not 9x9: try 8x8"),
        (["--reference", "absent", "--autoencoder", "{vae}"], "'absent' does not exist"),
        (["--reference", "digits@8", "--autoencoder", "{pictures}"], "pictures.npz"),
        (["--reference", "digits@8", "--autoencoder", "{vae}", "--steps", "3"], "--steps: only with --checkpoint"),
    ],
)
def test_what_cannot_be_done(arguments, message, vae, pictures):
    with pytest.raises(InputError, match=message):
        evaluate_fid(*(word.format(vae=vae, pictures=pictures) for word in arguments))


def test_it_takes_the_place_of_samples(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--samples", "a", "--autoencoder", "b", "--reference", "c"], lambda parser: [])
    assert "not allowed with argument --samples" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_agree_with_one(vae, pictures, tmp_path):
    words = ["--autoencoder", str(vae), "--reference", str(pictures), "--batch-size", "4", *PIXELS, "--json"]
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        result = subprocess.run(
            [sys.executable, *launcher, "evaluate_fid.py", *words, str(tmp_path / f"{processes}.json")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert two["settings"]["processes"] == 2 and two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
