"""What timm's own test_models.py asks of a network, asked of every kind of ours."""

import copy

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import sit_atconv.zoo  # noqa: F401 (registers the networks)
from sit_atconv.errors import InputError

# One of each kind, in its smallest size, with fewer blocks where that is an option
KINDS = {
    "attnet_xxs": {},
    "attnet_t1": {"depths": (1, 1, 1, 1)},
    "pvt_tiny": {"depths": (1, 1, 1, 1)},
    "atconv_pvt_tiny": {"depths": (1, 1, 1, 1)},
    "atconv_swin_tiny": {"depths": (1, 1, 1, 1)},
    "acmix_swin_tiny": {"depths": (2, 1, 1, 1)},
    "acmix_resnet26": {"depths": (1, 1, 1, 1)},
    "san10": {"depths": (1, 1, 1, 1, 1)},
    "acmix_san10": {"depths": (1, 1, 1, 1, 1)},
    "acmix_pvt_tiny": {"depths": (1, 1, 1, 1)},
}
ODD = (75, 53)


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**KINDS[name], **options}).eval()


def images(batch: int = 2, size: tuple[int, int] = ODD, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=list(KINDS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_any_size_and_checkpointing(name: str) -> None:
    model, x = build(name), images()
    expected = model(x)
    assert expected.shape == (2, 1000) and expected.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)


def test_every_parameter_has_a_gradient(name: str) -> None:
    model = build(name, num_classes=42).train()
    model(images(size=(64, 64))).mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_heads_and_default_configuration(name: str) -> None:
    model, x = build(name), images(1, (64, 64))
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7) and model.num_classes == 7
    model.reset_classifier(0, "")
    assert model(x).shape == (1, model.num_features, 2, 2)
    assert build(name, num_classes=0, global_pool="")(x).shape == (1, model.num_features, 2, 2)


def test_features_and_intermediates(name: str) -> None:
    x = images()
    backbone = build(name, features_only=True)
    maps, model = backbone(x), build(name)
    assert [each.shape[1] for each in maps] == backbone.feature_info.channels()
    for each, reduction in zip(maps, backbone.feature_info.reduction(), strict=True):
        assert abs(each.shape[2] * reduction - ODD[0]) < reduction
    last, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(intermediates, maps)
    torch.testing.assert_close(last, model.forward_features(x))
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(pruned.forward_features(x), maps[1])
    assert not [key for key, _ in pruned.named_parameters() if key.startswith(("head", "norm"))]


def test_groups_of_parameters_by_depth(name: str) -> None:
    from timm.models import group_parameters

    model = build(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(map(len, groups.values())) == len(list(model.parameters()))
        assert len(groups) > 4


def test_weights_for_another_number_of_channels_and_classes(name: str, tmp_path) -> None:
    torch.save(build(name).state_dict(), tmp_path / "weights.pth")
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    model = build(name, in_chans=1, num_classes=5, **overlay)
    assert model(images(1, (64, 64), 1)).shape == (1, 5)
    reference = build(name)
    ours = dict(model.named_parameters())
    first, head = reference.default_cfg["first_conv"], reference.default_cfg["classifier"]
    for key, parameter in reference.named_parameters():
        if not key.startswith((first, head)):
            torch.testing.assert_close(ours[key], parameter)


def test_torchscript(name: str) -> None:
    with timm.layers.set_scriptable(True):
        model = build(name)
    x = images(1, (64, 64))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_fx(name: str, train: bool) -> None:
    model, x = build(name), images(2, (64, 64))
    keys = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    last = [nodes[-1] for nodes in get_graph_node_names(model, tracer_kwargs=keys)]
    traced = create_feature_extractor(
        model, train_return_nodes=last[:1], eval_return_nodes=last[1:], tracer_kwargs=keys
    ).train(train)
    torch.manual_seed(2)
    (output,) = traced(x).values()
    torch.manual_seed(2)
    torch.testing.assert_close(output, build(name).train(train)(x), atol=0, rtol=0)


def test_export_with_any_batch(name: str) -> None:
    model, x = build(name), images(2, (64, 64))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    for count in (1, 3):
        each = images(count, (64, 64))
        torch.testing.assert_close(program(each), model(each), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [key for key in KINDS if key.startswith(("pvt", "san", "atconv_pvt", "acmix_san"))])
def test_images_that_are_too_small(name: str) -> None:
    with pytest.raises(InputError, match="32×32 pixels or more, not 31×64"):
        build(name)(images(1, (31, 64)))
