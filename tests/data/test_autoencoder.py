"""Autoencoders: the normalisation their configs ask for, the round trip, and refusal of foreign latents."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st

from sit_atconv.autoencoder import LatentSpec, load_autoencoder, sample_posterior
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError
from sit_atconv.images import to_float, to_uint8

finite = st.floats(0.01, 10)


def small_kl(folder: Path, seed: int = 0, stages: int = 2, **config) -> Path:
    """A random autoencoder with 2^(stages - 1) pixels to a latent."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    AutoencoderKL(block_out_channels=(8,) * stages, norm_num_groups=4, **blocks, **config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kl(tmp_path_factory) -> Path:
    return small_kl(tmp_path_factory.mktemp("kl"))


def images(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@given(scale=st.one_of(finite, st.tuples(finite, finite)), shift=st.one_of(finite, st.tuples(finite, finite)))
def test_specification_survives_json_and_undoes_itself(scale, shift):
    spec = LatentSpec("x", "hash", 2, 8, scale, shift)
    assert LatentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    z = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(spec.denormalise(spec.normalise(z)), z)
    first = [value if isinstance(value, float) else value[0] for value in (scale, shift)]
    torch.testing.assert_close(spec.normalise(z)[:, 0], (z[:, 0] - first[1]) * first[0])


def test_specification_names_bad_keys():
    spec = LatentSpec("x", None, 2, 8).to_dict()
    for change, message in (
        ({"zoom": 1}, "unknown key 'zoom'"),
        ({"channels": "2"}, "channels: Expected `int`, got `str`"),
        ({"scale": 0.0}, "scale: Expected `float` > 0"),
        ({"shift": [1.0, 2.0, 3.0]}, "shift: 3 numbers for 2 channels"),
    ):
        with pytest.raises(InputError, match=message):
            LatentSpec.from_dict({**spec, **change})
    with pytest.raises(InputError, match="missing required field `weights_hash`"):
        LatentSpec.from_dict({"autoencoder": "x"})


def test_identity_keeps_every_grey_level_through_half_precision():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for channels in (1, 3):
        autoencoder = load_autoencoder("identity", channels=channels)
        moments = autoencoder.encode(to_float(levels)).half()
        assert moments.shape == (1, 2 * channels, 16, 16) and (moments[:, channels:] == 0).all()
        z = sample_posterior(moments, torch.randn(1, channels, 16, 16), autoencoder.spec)
        assert torch.equal(to_uint8(autoencoder.decode(z)), levels)


def test_identity_of_other_channel_counts():
    with pytest.raises(InputError, match=r"3 channels .* or 1"):
        load_autoencoder("identity", channels=4)


def test_kl_moments_are_mean_and_standard_deviation(kl):
    autoencoder = load_autoencoder(str(kl))
    posterior = AutoencoderKL.from_pretrained(kl).encode(images()).latent_dist
    moments = autoencoder.encode(images())
    assert moments.shape == (2, 8, 8, 8)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], 1))
    assert (autoencoder.spec.scale, autoencoder.spec.shift, autoencoder.spec.downscale) == (0.18215, 0.0, 2)
    noise = torch.randn(2, 4, 8, 8)
    z = sample_posterior(moments.half(), noise, autoencoder.spec)
    torch.testing.assert_close(z, 0.18215 * (posterior.mean + posterior.std * noise), rtol=2e-3, atol=2e-3)


def test_decode_undoes_the_normalisation_and_chunks_agree(kl):
    autoencoder = load_autoencoder(str(kl))
    z = torch.randn(5, 4, 8, 8)
    expected = AutoencoderKL.from_pretrained(kl).decode(z / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(autoencoder.decode(z), expected)
    torch.testing.assert_close(autoencoder.decode(z, chunk=2), expected)


@pytest.mark.parametrize(
    ("config", "scale", "shift"),
    [
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16}, 0.3611, 0.1159),
        ({"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [4.0, 5.0], "latent_channels": 2},
         (0.125, 0.1), (1.0, 2.0)),
    ],
)  # fmt: skip
def test_normalisation_comes_from_the_config(tmp_path, config, scale, shift):
    spec = load_autoencoder(str(small_kl(tmp_path, **config))).spec
    assert (spec.channels, spec.scale, spec.shift) == (config["latent_channels"], scale, shift)


def test_tiny_and_deep_compression_autoencoders(tmp_path):
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    AutoencoderDC(
        3, 8, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    ).save_pretrained(tmp_path / "deep")  # fmt: skip
    for name, channels, scale in (("tiny", 4, 1.0), ("deep", 8, 0.4)):
        autoencoder = load_autoencoder(str(tmp_path / name))
        moments = autoencoder.encode(images())
        assert moments.shape == (2, 2 * channels, 8, 8) and (moments[:, channels:] == 0).all()
        assert (autoencoder.spec.scale, autoencoder.spec.downscale) == (scale, 2)
        assert autoencoder.decode(autoencoder.spec.normalise(moments[:, :channels])).shape == (2, 3, 16, 16)


def test_other_weights_are_refused_and_other_paths_are_not(kl, tmp_path):
    spec = load_autoencoder(str(kl)).spec
    other = small_kl(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"differ in weights_hash: [0-9a-f]{64} against [0-9a-f]{64}"):
        load_autoencoder(spec, location=str(other))
    same = small_kl(tmp_path / "same", seed=0)
    assert load_autoencoder(spec, location=str(same)).spec == spec
    unknown = LatentSpec("stabilityai/sd-vae-ft-mse", None, 4, 2, 0.18215, 0.0)
    assert load_autoencoder(unknown, location=str(same)).spec == unknown
    with pytest.raises(InputError, match="autoencoder: identity against"):
        LatentSpec("identity", None, 4, 2, 0.18215).require_same(spec, "the data", "the model")


def test_sizes_and_channels_that_do_not_fit(kl):
    autoencoder = load_autoencoder(str(kl))
    with pytest.raises(InputError, match=r"multiples of 2 pixels, not 15x16: try 16x16"):
        autoencoder.encode(images()[:, :, :15])
    with pytest.raises(InputError, match=r"latents of 4 channels.*another autoencoder"):
        autoencoder.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="has 4 latent channels, not 16"):
        load_autoencoder(str(kl), channels=16)


def test_folders_that_are_no_autoencoder(kl, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"expected config\.json"):
        load_autoencoder(str(tmp_path))
    UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    with pytest.raises(InputError, match="is a UNet2DModel, not one of the supported image autoencoders"):
        load_autoencoder(str(tmp_path / "unet"))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((kl / "config.json").read_bytes())
    (tmp_path / "cut" / weights).write_bytes((kl / weights).read_bytes()[:-100])
    with pytest.raises(InputError, match="Cannot load autoencoder"):
        load_autoencoder(str(tmp_path / "cut"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no-such-owner/no-such-model", "missing/folder/of/mine", "..."):
        with pytest.raises(InputError, match="neither a folder here nor available"):
            load_autoencoder(name)


@pytest.mark.shared
def test_taesd_reconstructs_photographs(shared):
    autoencoder = load_autoencoder(str(shared / "data" / "taesd"))
    signs = open_source(shared / "data" / "sign-language-digits_10x206_100px.zip")
    x = torch.stack([torch.from_numpy(signs[i].image[2:98, 2:98]).permute(2, 0, 1) for i in (0, 700)])
    moments = autoencoder.encode(to_float(x)).half()
    z = sample_posterior(moments, torch.randn(2, 4, 12, 12), autoencoder.spec)
    error = (to_uint8(autoencoder.decode(z)).float() - x).square().mean()
    assert 10 * torch.log10(255**2 / error) > 24
