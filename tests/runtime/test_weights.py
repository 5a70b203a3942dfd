"""Weights that are none: whole numbers, foreign ones, NaN. A model with them is refused, and the tensor named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling_fixtures import tiny_model

from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.errors import InputError
from sit_atconv.models.checkpoint import load_model

FILE = "diffusion_pytorch_model.safetensors"
NAME = "blocks.0.mlp.fc1.bias"


def change(folder: Path, name: str, kind: torch.dtype | float) -> None:
    tensors = load_file(folder / FILE)
    tensors[name] = tensors[name].to(kind) if isinstance(kind, torch.dtype) else tensors[name].fill_(kind)
    save_file(tensors, folder / FILE)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.int8, "holds I8 numbers: expected floating point"),
        (torch.bool, "holds BOOL numbers"),
        (torch.float8_e4m3fn, "holds F8_E4M3 numbers"),
        (float("nan"), "has 64 values that are NaN or infinite"),
        (float("inf"), "has 64 values that are NaN or infinite"),
    ],
)
def test_weights_of_a_model_that_are_none(tmp_path: Path, kind: torch.dtype | float, message: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    change(tmp_path, NAME, kind)
    with pytest.raises(InputError, match=rf"{NAME} in {tmp_path}.*{message}"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_point_numbers_are_weights(tmp_path: Path, kind: torch.dtype) -> None:
    tiny_model().save_pretrained(tmp_path)
    change(tmp_path, NAME, kind)
    assert load_model(tmp_path).state_dict()[NAME].dtype == torch.float32


@pytest.mark.parametrize(("kind", "message"), [(torch.int8, "holds I8"), (float("nan"), "8 values that are NaN")])
def test_weights_of_an_autoencoder_that_are_none(tmp_path: Path, kind: torch.dtype | float, message: str) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    change(tmp_path, "encoder.conv_in.bias", kind)
    with pytest.raises(InputError, match=rf"^encoder.conv_in.bias in {tmp_path}.*{message}"):
        load_autoencoder(str(tmp_path))
