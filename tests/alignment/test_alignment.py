"""Teachers: the input they see, the tokens they give, and the weights they accept."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sit_atconv.alignment import ConvProjector, Projector, Teacher, normalise_spatially
from sit_atconv.errors import InputError
from sit_atconv.flow import alignment_loss

IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def pictures(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


@pytest.fixture(scope="module")
def registers() -> Teacher:
    """A small DINOv2 with a class token and four registers, patch 14."""
    return Teacher("vit_small_patch14_reg4_dinov2.lvd142m", "random")


@pytest.mark.parametrize(
    ("name", "resolution", "size", "grid"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", (256, 256), (224, 224), (16, 16)),
        ("vit_small_patch14_reg4_dinov2.lvd142m", (512, 256), (448, 224), (32, 16)),
        ("test_vit", (256, 256), (256, 256), (16, 16)),
    ],
)
def test_input_size_is_a_patch_for_every_16_pixels(name, resolution, size, grid):
    teacher = Teacher(name, "random")
    assert teacher.input_size(*resolution) == size
    assert tuple(side // teacher._patch for side in size) == grid


def test_dinov2_sees_normalised_then_resized_pictures(registers):
    images = pictures(256, 256)
    expected = F.interpolate((images / 255 - IMAGENET[0]) / IMAGENET[1], (224, 224), mode="bicubic")
    torch.testing.assert_close(registers.preprocess(images), expected)


def test_patch_16_is_not_resized_and_brings_its_own_statistics():
    images, teacher = pictures(48, 64), Teacher("vit_base_patch16_clip_224.openai", "random")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(teacher.preprocess(images), (images / 255 - mean) / std)


def test_tokens_are_patches_after_the_final_norm(registers):
    """Class and register tokens come first in timm and are dropped: five for this teacher."""
    images = pictures()
    features = registers._model.forward_features(registers.preprocess(images))
    assert features.shape == (2, 5 + 16, 384)
    tokens = registers.tokens(images, (4, 4))
    torch.testing.assert_close(tokens, features[:, 5:])
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)


def test_models_that_pool_before_their_norm_are_normalised_too():
    teacher = Teacher("test_vit2", "random")
    assert isinstance(teacher._model.norm, torch.nn.Identity)
    tokens = teacher.tokens(pictures(), (4, 4))
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("grid", "size"), [((8, 8), (64, 64)), ((2, 2), (64, 64)), ((4, 6), (64, 96)), ((3, 7), (64, 96))]
)
def test_other_grids_are_resampled_bilinearly(grid, size):
    """Patch 1 and 4, rectangular pictures, and grids that do not divide one another."""
    teacher, images = Teacher("test_vit", "random"), pictures(*size)
    own = (size[0] // 16, size[1] // 16)
    maps = teacher.tokens(images, own).transpose(1, 2).reshape(2, 64, *own)
    expected = F.interpolate(maps, grid, mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher.tokens(images, grid), expected)


def test_tokens_follow_raster_order():
    """Painting one patch black moves its own token most, wherever it is."""
    torch.manual_seed(3)
    teacher, images = Teacher("test_vit", "random"), pictures(48, 80)[:1]
    before = teacher.tokens(images, (3, 5))
    for row, column in ((0, 4), (2, 0), (1, 3)):
        painted = images.clone()
        painted[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 0
        change = (teacher.tokens(painted, (3, 5)) - before).norm(dim=-1)[0]
        assert int(change.argmax()) == 5 * row + column


def test_teachers_are_frozen_and_leave_the_callers_randomness_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    teacher = Teacher("test_vit", "random")
    assert torch.equal(torch.rand(3), expected)
    assert not teacher._model.training and not any(p.requires_grad for p in teacher._model.parameters())
    tokens = teacher.tokens(pictures(), (4, 4))
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    again = Teacher("test_vit", "random")
    torch.testing.assert_close(again._model.state_dict(), teacher._model.state_dict(), rtol=0, atol=0)


def test_training_in_bf16_does_not_reach_the_teacher():
    """On a CPU cached tokens and the live teacher's are the same because of it; on a GPU it chooses bf16 by itself."""
    teacher, images = Teacher("test_vit", "random"), pictures()
    expected = teacher.tokens(images, (4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher.tokens(images, (4, 4))
    assert torch.equal(found, expected) and found.grad_fn is None


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_local_weights(tmp_path, suffix):
    torch.manual_seed(11)
    model = timm.create_model("test_vit", num_classes=10)
    path = tmp_path / f"weights.{suffix}"
    state = model.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
    teacher = Teacher("test_vit", str(path))
    images = pictures(160, 160)
    expected = model.eval().forward_features(teacher.preprocess(images))[:, 1:]
    torch.testing.assert_close(teacher.tokens(images, (10, 10)), expected)


def test_weights_that_do_not_fit(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    files = {
        "partial.pth": {k: v for k, v in state.items() if not k.startswith("blocks.1.")},
        "wider.pth": timm.create_model("test_vit4", num_classes=0).state_dict(),
        "code.pth": {"model": pytest.raises},
        "list.pth": [1, 2],
        "settings.pth": {"model": {"depth": 2}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    for name, message in {
        "partial.pth": r"lacks \d+ of the model's tensors .blocks.1",
        "wider.pth": "another model's weights|lacks",
        "code.pth": "could run code",
        "list.pth": "holds no weights",
        "settings.pth": "holds no weights",
        "cut.safetensors": "is damaged, or no weights file",
        "missing.pth": "are not a file",
    }.items():
        with pytest.raises(InputError, match=message):
            Teacher("test_vit", str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch14_dinov22", r"has no model .*did you mean 'vit_base_patch14_dinov2'"),
        ("resnet18", "not a vision transformer"),
        ("swin_tiny_patch4_window7_224", "no patch tokens"),
    ],
)
def test_names_that_are_no_teacher(name, message):
    with pytest.raises(InputError, match=message):
        Teacher(name, "random")


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be loaded from the hub"):
        Teacher("test_vit", "hub")


def test_float_pictures_are_refused():
    with pytest.raises(InputError, match=r"uint8 \(B, 3, H, W\), not torch.float32"):
        Teacher("test_vit", "random").tokens(torch.rand(1, 3, 32, 32), (2, 2))


def test_spatial_normalisation_removes_what_all_tokens_share():
    tokens = torch.randn(3, 20, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + torch.randn(3, 1, 5) * 100
    normalised = normalise_spatially(tokens)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(3, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.var(1, correction=0), torch.ones(3, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalise_spatially(tokens * 7 + 3), normalised, atol=1e-4, rtol=0)
    assert torch.equal(normalise_spatially(torch.full((1, 4, 2), 3.0)), torch.zeros(1, 4, 2))


def test_convolutional_projector_sees_a_token_and_its_eight_neighbours():
    projector, tokens = ConvProjector(6, 4, (4, 5)), torch.randn(1, 20, 6, requires_grad=True)
    projector(tokens)[0, 5 * 1 + 3].sum().backward()
    touched = {divmod(int(n), 5) for n in tokens.grad[0].abs().sum(1).nonzero()}
    assert touched == {(row, column) for row in (0, 1, 2) for column in (2, 3, 4)}


def test_projector_reaches_the_teacher_and_learns():
    torch.manual_seed(0)
    projector, hidden, target = Projector(24, 64, hidden=32), torch.randn(2, 16, 24), torch.randn(2, 16, 64)
    assert sum(p.numel() for p in projector.parameters()) == 25 * 32 + 33 * 32 + 33 * 64
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = alignment_loss(projector(hidden), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert -1 <= losses[-1] < losses[0] - 0.3
