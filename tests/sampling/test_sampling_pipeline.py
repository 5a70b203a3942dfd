"""`SiTPipeline`: what diffusers' users expect of a pipeline, and that it draws what the rest of the program draws."""

import json
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderTiny, AutoModel, DiffusionPipeline
from sampling_fixtures import tiny_model
from torch import nn

import sample
from sit_atconv import SiT, SiTPipeline, create_model
from sit_atconv.autoencoder import LatentSpec, load_autoencoder
from sit_atconv.errors import InputError
from sit_atconv.sampling import SamplerSettings
from sit_atconv.sampling.draw import Drawing

NAMES = ["tench", "great white shark, Carcharodon", "hen"]


@pytest.fixture
def pipe() -> SiTPipeline:
    pipeline = SiTPipeline(tiny_model(class_names=NAMES))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_contract_call_draws_what_the_sampler_draws(pipe: SiTPipeline) -> None:
    images = pipe(class_labels=[2, 0], guidance_scale=4.0, num_inference_steps=5, generator=generator()).images
    noise = torch.randn(2, 1, 8, 6, generator=generator())
    drawn = Drawing(pipe.transformer, SamplerSettings("heun", 5, 4.0)).integrate(noise, torch.tensor([2, 0]))
    expected = (127.5 * drawn + 128).floor().clamp(0, 255).to(torch.uint8)
    assert [image.size for image in images] == [(6, 8), (6, 8)]
    assert np.array_equal(np.stack([np.asarray(image)[..., 0] for image in images]), expected[:, 0].numpy())


def test_output_types_hold_the_same_images(pipe: SiTPipeline) -> None:
    draw = {
        kind: pipe([0, 1], 1.0, 3, generator=generator(), output_type=kind).images for kind in ("pt", "np", "latent")
    }
    assert draw["pt"].shape == (2, 3, 8, 6)
    assert np.array_equal(draw["np"], draw["pt"].permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(draw["pt"][:, :1], draw["latent"].clamp(-1, 1) / 2 + 0.5)
    assert pipe([0, 1], 1.0, 3, generator=generator(), output_type="pt", return_dict=False)[0].equal(draw["pt"])


def test_a_generator_each_makes_an_image_independent_of_its_neighbours(pipe: SiTPipeline) -> None:
    options = {"num_inference_steps": 4, "solver": "sde", "output_type": "latent"}
    together = pipe([1, 2], generator=[generator(3), generator(4)], **options).images
    alone = pipe(2, generator=[generator(4)], **options).images
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


def test_labels_are_numbers_or_names(pipe: SiTPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(2, 1, 8, 6)}
    named = pipe(["hen", NAMES[1]], **options).images
    torch.testing.assert_close(named, pipe([2, 1], **options).images)
    assert pipe("hen", num_images=3, num_inference_steps=1, output_type="pt").images.shape[0] == 3


def test_an_unconditional_model_and_other_sizes() -> None:
    pipe = SiTPipeline(tiny_model(0))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_images=3, num_inference_steps=2, output_type="pt").images.shape == (3, 3, 8, 6)
    assert pipe(height=4, width=10, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 4, 10)


@pytest.mark.parametrize("solver", ["heun", "sde"])
def test_callbacks_see_every_step_and_may_change_it(pipe: SiTPipeline, solver: str) -> None:
    seen = []

    def look(pipeline: SiTPipeline, step: int, t: float, tensors: dict) -> dict:
        seen.append((step, t))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    drawn = pipe(1, 1.0, 4, solver=solver, callback_on_step_end=look, output_type="latent").images
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert all(earlier > later for (_, earlier), (_, later) in pairwise(seen))
    assert seen[-1][1] == 0
    assert torch.count_nonzero(drawn) == 0


def test_saved_and_opened_again_it_draws_the_same(pipe: SiTPipeline, tmp_path: Path) -> None:
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(2, 1, 8, 6)}
    pipe.save_pretrained(tmp_path / "whole")
    pipe.transformer.save_pretrained(tmp_path / "run" / "checkpoints" / "step-0000100" / "model")
    (tmp_path / "run" / "config.yaml").write_text("model:\n  name: SiT-Hybrid-S/2\n")
    expected = pipe([0, 2], **options).images
    for source in ("whole", "run/checkpoints/step-0000100/model", "run/checkpoints/step-0000100"):
        opened = SiTPipeline.from_pretrained(tmp_path / source)
        torch.testing.assert_close(opened([0, 2], **options).images, expected)
        assert (opened.recipe is not None) == source.startswith("run")
    half = SiTPipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half([0, 2], **options).images, expected, rtol=0.1, atol=0.1)


def test_others_may_read_what_is_saved_as_the_umask_says(pipe: SiTPipeline, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        pipe.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {path.suffix: oct(path.stat().st_mode & 0o777) for path in files}[".safetensors"] == "0o640"


def test_an_autoencoder_decodes_and_offloaded_parts_draw_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderTiny(latent_channels=1, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                          num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()  # fmt: skip
    spec = LatentSpec("somewhere", None, 1, 2, scale=2.0, shift=0.5)
    pipe = SiTPipeline(tiny_model(latents=spec.to_dict()), vae)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "latents": torch.randn(2, 1, 8, 6)}
    latents = pipe([0, 2], output_type="latent", **options).images
    images = pipe([0, 2], output_type="pt", **options).images
    assert images.shape == (2, 3, 16, 12)
    with torch.no_grad():
        decoded = vae.decode(latents / 2.0 + 0.5).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(images, decoded)
    assert pipe([1], num_inference_steps=1, height=8, width=20, output_type="latent").images.shape == (1, 1, 4, 10)
    with pytest.raises(InputError, match="multiples of 2"):
        pipe([1], height=9)

    pipe.save_pretrained(tmp_path)
    opened = SiTPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(opened([0, 2], output_type="pt", **options).images, images)
    for part in (pipe.transformer, pipe.vae):
        cpu_offload_with_hook(part, execution_device="cpu")
    torch.testing.assert_close(pipe([0, 2], output_type="pt", **options).images, images)


def test_the_model_card_tells_recipe_metrics_and_licence(pipe: SiTPipeline, tmp_path: Path, monkeypatch) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(
        json.dumps(
            {
                "metrics": {"fid": 2.345678, "recall": 0.61},
                "samples": {"count": 50000},
                "reference": {"path": "VIRTUAL.npz", "kind": "npz"},
                "warnings": ["sorted by class"],
            }
        )
    )
    pipe.recipe = "optimizer:\n  lr: 1.0e-4\n"
    uploaded = {}

    def upload(self: SiTPipeline, folder: str, repo_id: str, **_: object) -> str:
        card = (Path(folder) / "README.md").read_text()
        uploaded.update({path.name: path for path in Path(folder).iterdir()}, card=card)
        return f"https://hub/{repo_id}"

    repository = SimpleNamespace(repo_id="me/digits")
    monkeypatch.setattr("sit_atconv.sampling.pipeline.create_repo", lambda *_, **__: repository)
    monkeypatch.setattr(SiTPipeline, "_upload_folder", upload)
    assert pipe.push_to_hub("me/digits", scores=scores) == "https://hub/me/digits"
    assert {"model_index.json", "transformer", "README.md"} <= set(uploaded)
    for words in (
        "license: mit",
        "library_name: diffusers",
        "| FID | 2.346 |",
        "50000 samples against VIRTUAL.npz",
        "sorted by class",
        "lr: 1.0e-4",
        "SiT-Hybrid, ",
        'SiTPipeline.from_pretrained("me/digits")',
    ):
        assert words in uploaded["card"]
    with pytest.raises(InputError, match="Expected the JSON that evaluate_fid"):
        pipe.save_pretrained(tmp_path / "out", scores=tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": None}, "needs class_labels"),
        ({"class_labels": 3}, "Unknown label '3'"),
        ({"class_labels": "cock"}, "Unknown label 'cock'"),
        ({"class_labels": 1, "output_type": "jpeg"}, "Unknown output type"),
        ({"class_labels": 1, "solver": "ddim"}, "Unknown solver 'ddim'"),
        ({"class_labels": 1, "num_images": 0}, "at least 1"),
        ({"class_labels": 1, "latents": torch.zeros(2, 1, 8, 6)}, "expected"),
        ({"class_labels": 1, "guidance_scale": 1.0, "interval": (0.0, 0.7)}, "would do nothing"),
        ({"class_labels": 1, "solver": "dopri5", "callback_on_step_end": lambda *_: None}, "separate steps"),
        ({"class_labels": 1, "callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["eps"]}, "latents"),
    ],
)
def test_mistakes_are_named(pipe: SiTPipeline, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**options)


def test_what_cannot_be_opened_or_decoded_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a checkpoint"):
        SiTPipeline.from_pretrained(tmp_path)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="not variant"):
        SiTPipeline.from_pretrained(tmp_path / "model", variant="fp16")
    model.register_to_config(latents=None)
    with pytest.raises(InputError, match="output_type='latent'"):
        SiTPipeline(model)(1, num_inference_steps=1)


def test_nan_names_step_and_image(pipe: SiTPipeline) -> None:
    nn.init.constant_(pipe.transformer.final.proj.bias, float("nan"))
    with pytest.raises(InputError, match=r"NaN or infinity in step 1, from t = 1, for samples 0 to 1 of the batch"):
        pipe([0, 1], num_inference_steps=2)


@pytest.fixture
def decoded(tmp_path: Path) -> SiTPipeline:
    """A pipeline of latents, with its autoencoder."""
    folder = tmp_path / "vae"
    AutoencoderTiny(in_channels=3, out_channels=3, latent_channels=4, **TINY_VAE).save_pretrained(folder)
    spec = load_autoencoder(str(folder)).spec
    model = create_model(
        "SiT-S/2", input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, latents=spec.to_dict()
    )
    model.save_pretrained(tmp_path / "model")
    pipeline = SiTPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


TINY_VAE = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def test_a_saved_pipeline_opens_in_diffusers_and_in_sample(decoded: SiTPipeline, tmp_path: Path) -> None:
    """By DiffusionPipeline, by AutoModel, by SiTPipeline without trusting the directory's code, and by sample.py."""
    saved = tmp_path / "saved"
    decoded.save_pretrained(saved)
    draw = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "pt"}
    expected = decoded(**draw, generator=generator()).images
    opened = DiffusionPipeline.from_pretrained(str(saved), trust_remote_code=True)
    assert type(opened) is SiTPipeline
    for pipeline in (opened, SiTPipeline.from_pretrained(saved)):
        pipeline.set_progress_bar_config(disable=True)
        torch.testing.assert_close(pipeline(**draw, generator=generator()).images, expected)
    assert type(AutoModel.from_pretrained(str(saved), subfolder="transformer")) is SiT
    sample.main(f"--checkpoint {saved} --out {tmp_path / 'out'} --num-samples 3 --steps 2".split())
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape[0] == 3


def test_without_a_decoder_latents_do_not_come_out_as_pictures(decoded: SiTPipeline) -> None:
    bare = SiTPipeline(decoded.transformer)
    with pytest.raises(InputError, match="has no vae, and the model's latents are those of"):
        bare([0], num_inference_steps=1)
    assert bare([0], num_inference_steps=1, output_type="latent").images.shape == (1, 4, 4, 4)


def test_labels_of_torch_and_numpy(pipe: SiTPipeline) -> None:
    options = {"num_inference_steps": 1, "output_type": "latent", "latents": torch.randn(2, 1, 8, 6)}
    expected = pipe([2, 1], **options).images
    for labels in (torch.tensor([2, 1]), np.array([2, 1]), [torch.tensor(2), np.int64(1)]):
        assert pipe(labels, **options).images.equal(expected)
    assert pipe(np.int64(2), num_images=2, **options).images.shape[0] == 2


def test_a_callback_reads_the_call_and_may_interrupt_it(pipe: SiTPipeline) -> None:
    seen = []

    def callback(pipeline: SiTPipeline, step: int, t: float, tensors: dict) -> dict:
        seen.append((pipeline.guidance_scale, pipeline.num_timesteps, tensors["latents"]))
        pipeline._interrupt = step == 1
        return {}

    drawn = pipe([0], 2.0, 4, output_type="latent", callback_on_step_end=callback).images
    assert [(scale, steps) for scale, steps, _ in seen] == [(2.0, 4)] * 2
    assert drawn.equal(seen[-1][2])
    assert pipe([0], 2.0, 4, output_type="latent").images.shape == drawn.shape and not pipe.interrupt
