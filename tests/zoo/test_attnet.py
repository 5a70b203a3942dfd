"""AttNet: equal to a literal transcription of its release, from the release's own names."""

import pytest
import timm
import torch

from benchmarks.released_attnet import ReleasedAttNet
from sit_atconv.errors import InputError
from sit_atconv.models.mixers.acmix.shifts import shift_kernels
from sit_atconv.zoo.attnet import AttNet, checkpoint_filter_fn
from sit_atconv.zoo.layers import ChannelNorm

TINY = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 40)}
SIZE = (75, 53)


def released(seed: int, **options: object) -> ReleasedAttNet:
    """A release with weights, statistics and scales that are all different from their start."""
    torch.manual_seed(seed)
    model = ReleasedAttNet(**TINY, **options, classes=7).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(0.3 * torch.rand_like(tensor))
    return model


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"norm": "std"}, {"glu_norm": "std"}),
        ({"norm": None, "scale": False}, {"glu_norm": None, "layer_scale": None}),
        ({"sizes": (7, 5, 3, 1)}, {"kernel_sizes": (7, 5, 3, 1)}),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("key", ["model", "model_ema", None])
def test_released_weights_give_the_released_outputs(theirs: dict, ours: dict, key: str | None) -> None:
    reference = released(0, **theirs)
    model = AttNet(**TINY, **ours, num_classes=7).eval()
    checkpoint = reference.state_dict() if key is None else {key: reference.state_dict(), "epoch": 3}
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model))
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-4)


def test_our_own_names_are_left_as_they_are() -> None:
    model = AttNet(**TINY, num_classes=7)
    state = checkpoint_filter_fn(model.state_dict(), model)
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)


def test_the_papers_pooling_is_another_function() -> None:
    models = [AttNet(**TINY, num_classes=7, pool=pool).eval() for pool in ("raster", "grid")]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(1, 3, 64, 64)
    first, second = (model.forward_features(x) for model in models)
    assert (first - second).abs().max() > 0


@pytest.mark.parametrize("size", [(1, 1), (33, 32), (75, 53)])
def test_any_size_and_any_number_of_channels(size: tuple[int, int]) -> None:
    model = AttNet(**TINY, num_classes=7, in_chans=5).eval()
    assert model(torch.randn(2, 5, *size)).shape == (2, 7)


def test_training_starts_near_the_identity_and_drops_paths() -> None:
    torch.manual_seed(0)
    model = AttNet(**TINY, drop_path_rate=0.5, num_classes=7)
    rates = [b.drop_path.drop_prob if hasattr(b.drop_path, "drop_prob") else 0 for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert all(block.scale1.gamma.eq(1e-6).all() for stage in model.stages for block in stage.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "atconf"}, "atconv"),
        ({"mixer": {"name": "hydra", "window": 3}}, "no option 'window'"),
        ({"mixer": "inline", "num_heads": 5}, "not a multiple of the 5"),
        ({"kernel_sizes": 4}, "odd"),
        ({"pool": "max"}, "pool"),
        ({"depths": (1, 1, 1)}, "four stages: give depths and dims for each"),
        ({"mixer": "dwconv", "kernel_sizes": 5}, "give the options of 'dwconv' in mixer"),
        ({"mixer": {"name": "hydra"}, "pool": "grid"}, "give the options of 'hydra' in mixer"),
    ],
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttNet(**{**TINY, **options})


def test_the_entry_points_take_classes_and_weights(tmp_path) -> None:
    reference = timm.create_model("attnet_xxs")
    torch.save({"model": reference.state_dict()}, tmp_path / "weights.pth")
    model = timm.create_model("attnet_xxs", checkpoint_path=tmp_path / "weights.pth")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


def test_mixers_keep_their_own_initialisation() -> None:
    model = AttNet(**TINY, mixer={"name": "acmix", "window": 3}, num_heads=2)
    for stage in model.stages:
        for block in stage.blocks:
            kernels = block.mixer.convolution.shift.weight
            torch.testing.assert_close(kernels, shift_kernels(kernels), atol=0, rtol=0)


def test_the_norm_of_channel_mixers_stays_within_fp16() -> None:
    x = torch.full((1, 1, 1, 1024), 20.0)
    torch.testing.assert_close(ChannelNorm(1024).half()(x.half()).float(), x / 20, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_the_compiled_head_has_the_gradient_of_the_head() -> None:
    torch.manual_seed(0)
    model = AttNet(**TINY, num_classes=7)
    maps = torch.randn(2, 3, 4, TINY["dims"][-1]).permute(0, 3, 1, 2)  # in memory as the last stage leaves them
    gradients = []
    for head in (model.forward_head, torch.compile(model.forward_head)):
        x = maps.clone(memory_format=torch.preserve_format).requires_grad_()
        head(x).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0.001
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)
