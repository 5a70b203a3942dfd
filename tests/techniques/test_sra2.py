"""SRA 2 (arXiv 2601.17830): the clean latents as teacher, with no network and no pictures."""

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from stopped_runs import require_same_when_stopped, terms
from torch import nn
from training_runs import ALIGNED, BY_LATENTS, NO_PREVIEW, fresh_accelerate, run_tiny, tiny_config

from sit_atconv.alignment import LatentProjector, LatentTeacher, Projector, latent_loss
from sit_atconv.autoencoder import sample_posterior
from sit_atconv.config import AlignmentConfig, FlowConfig, TeacherConfig
from sit_atconv.errors import InputError
from sit_atconv.models import SiT, create_model
from sit_atconv.training import trainer
from sit_atconv.training.session.objective import Objective, draw
from sit_atconv.training.session.session import build_session


def test_the_loss_is_quadratic_below_beta_and_linear_above() -> None:
    errors = torch.tensor([0.0, 0.01, -0.04, 0.05, 0.2, -3.0])
    expected = [e * e / 0.1 if abs(e) < 0.05 else abs(e) - 0.025 for e in errors.tolist()]
    target = torch.randn(2, 3, 1).expand(2, 3, 6)
    found = latent_loss(target + errors, target)
    torch.testing.assert_close(found, torch.tensor(2 * [sum(expected) / 6]), rtol=1e-4, atol=1e-6)
    assert latent_loss(torch.zeros(1, 1, 2).bfloat16(), torch.ones(1, 1, 2)).dtype == torch.float32


def test_the_projector_has_five_layers() -> None:
    projector = LatentProjector(16, 12)
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(16, 16)] * 4 + [(16, 12)]
    tokens = torch.randn(2, 3, 16)
    expected = tokens
    for layer in layers[:-1]:
        expected = nn.functional.silu(layer(expected))
    torch.testing.assert_close(projector(tokens), layers[-1](expected))


def test_targets_are_the_patches_that_the_model_embeds() -> None:
    latents = torch.randn(2, 3, 4, 6)
    model = create_model(
        "SiT-S/2", input_size=(4, 6), in_channels=3, num_classes=0, hidden_size=16, depth=1, num_heads=2
    )
    teacher = LatentTeacher(model.patch_size, model.in_channels)
    patches = teacher.targets({"latents": latents}, model.grid)
    assert patches.shape == (2, 6, teacher.dim) == (2, 6, 12)
    embedded = model.patch_embed(patches) + model.position_table
    torch.testing.assert_close(embedded, model.embed_patches(latents, model.grid))


def test_the_objective_compares_hidden_tokens_with_latents_beside_another_teacher() -> None:
    model = create_model("SiT-S/2", input_size=4, num_classes=2, hidden_size=16, depth=2, num_heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    flow, latents, labels = FlowConfig(label_dropout=0.0), torch.randn(3, 4, 4, 4), torch.tensor([0, 1, 1])
    teachers = [TeacherConfig("latents"), TeacherConfig()]
    alignment = AlignmentConfig(coefficient=0.7, block=1, projector_width=8, teachers=teachers)
    objective = Objective(model, flow, alignment, (16, 5))
    assert [type(p) for p in objective.projectors] == [LatentProjector, Projector]
    draws, others = draw(torch.arange(3), (4, 4, 4), flow, seed=0), torch.randn(3, 4, 5)
    patches = LatentTeacher(2, 4).targets({"latents": latents}, (2, 2))
    found = objective(latents, labels, draws, [patches, others])

    time = draws.times.view(3, 1, 1, 1)
    x_t = (1 - time) * latents + time * draws.noise
    tokens = model.forward_intermediates(x_t, draws.times, labels, [1])[1][1]
    images = rearrange(objective.projectors[0](tokens), "b (h w) (c p q) -> b c (h p) (w q)", h=2, w=2, p=2, q=2)
    by_latents = nn.functional.smooth_l1_loss(images, latents, beta=0.05)
    cosine = nn.functional.cosine_similarity(objective.projectors[1](tokens), others, dim=-1).mean()
    torch.testing.assert_close(found["alignment"], (by_latents - cosine).detach() / 2)
    torch.testing.assert_close(found["loss"].detach(), found["flow"] + 0.7 * found["alignment"])


def test_the_target_is_the_latent_that_the_flow_is_given(tmp_path: Path) -> None:
    fresh_accelerate()
    session = build_session(tiny_config(BY_LATENTS), tmp_path)
    batch = next(iter(session.loader(0)))
    latents, _, draws, targets = trainer.prepare_inputs(session, batch)
    sampled = sample_posterior(batch["moments"], batch["posterior_noise"], session.dataset.latents)
    assert torch.equal(latents, sampled)
    assert torch.equal(targets[0], rearrange(sampled, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
    assert "image" not in batch and draws.times.shape == (8,)


def test_a_stopped_run_continues_to_the_last_bit_and_the_teacher_stops(tmp_path: Path, monkeypatch) -> None:
    """Compiled, but for C++ and its minute of compiling."""

    def compiled(model: SiT) -> None:
        for block in model.blocks:
            block.compile(backend="aot_eager")

    monkeypatch.setattr(SiT, "compile_repeated_blocks", compiled)
    stopping = BY_LATENTS.replace('"block":1', '"block":1,"stop_after":3')
    lines = require_same_when_stopped(tmp_path, monkeypatch, f"{stopping} --training.compile true")
    assert all(line["alignment"] > 0 for line in lines[:3])
    assert [line["alignment"] for line in lines[3:]] == [0, 0, 0]
    assert lines[0]["loss"] == pytest.approx(lines[0]["flow"] + lines[0]["alignment"])


def test_accumulation_is_the_full_batch_and_shared_weights_begin_equal(tmp_path: Path) -> None:
    extra = f"{NO_PREVIEW} --training.steps 3"
    for name, more in {"full": BY_LATENTS, "parts": f"{BY_LATENTS} --training.accumulation 4", "plain": ""}.items():
        run_tiny(tmp_path / name, f"{extra} {more}")
    for full, parts in zip(terms(tmp_path / "full"), terms(tmp_path / "parts"), strict=True):
        for key in ("loss", "flow", "alignment", "grad_norm"):
            assert full[key] == pytest.approx(parts[key], rel=1e-4)
    assert terms(tmp_path / "plain")[0]["flow"] == terms(tmp_path / "full")[0]["flow"]


def test_bf16_beside_a_network_as_teacher_and_finetuning_with_its_projector(tmp_path: Path, caplog) -> None:
    """The random teacher sees pictures, the latents do not need them."""
    both = json.loads(ALIGNED.split(" ", 1)[1])
    both["teachers"] = [{"name": "latents"}, *both["teachers"]]
    words = f"--alignment {json.dumps(both, separators=(',', ':'))} --training.precision bf16 {NO_PREVIEW}"
    run_tiny(tmp_path / "run", f"{words} --training.steps 2")
    assert all(line["alignment"] is not None for line in terms(tmp_path / "run"))
    caplog.set_level("INFO")
    start = tmp_path / "run" / "checkpoints" / "latest" / "model"
    run_tiny(tmp_path / "tuned", f"{BY_LATENTS} {NO_PREVIEW} --training.steps 1 --model.init_from {start}")
    assert "The projector for latents begins with that for latents after block 1" in caplog.text


def teachers(*names: str, **options: object) -> str:
    listed = [{"name": name} for name in names]
    return "--alignment " + json.dumps({"block": 1, "teachers": listed, **options}, separators=(",", ":"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (teachers("latents").replace('"latents"', '"latents","weights":"random"'), "would do nothing for the teacher"),
        (teachers("latents").replace('"latents"', '"latents","cached":true'), "would do nothing for the teacher"),
        (teachers("latents", variant="irepa"), "alignment.variant would do nothing"),
        (teachers("latents", projector_width=64), "alignment.projector_width would do nothing"),
        (teachers("latents", "latents"), "names latents twice"),
        (teachers("latents").replace('"block":1', '"block":3'), "alignment.block is 3"),
    ],
)
def test_what_does_nothing_is_refused_before_anything_is_written(extra: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_tiny(tmp_path / "run", extra)
    assert not (tmp_path / "run").exists()
