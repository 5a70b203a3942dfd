"""Weights from files and folders by way of timm: those of a release, of other classes or channels, and wrong ones."""

import json
from pathlib import Path

import pytest
import timm
import torch
from packaging.version import Version
from test_zoo_timm import KINDS, build, images
from timm.models import save_for_hf
from torch import nn

import sit_atconv.zoo  # noqa: F401 (registers the networks)
from benchmarks.released_attnet import ReleasedAttNet
from sit_atconv.errors import InputError
from sit_atconv.zoo.attnet import AttNet

SMALL = {"depths": (1, 1, 1, 1)}  # of attnet_xxs
SIZE = (64, 64)


def from_file(path: Path, classes_there: int | None = None, **options: object) -> nn.Module:
    """attnet_xxs with the weights in a file, as timm loads its own."""
    overlay = {"file": str(path)} | ({"num_classes": classes_there} if classes_there else {})
    return timm.create_model("attnet_xxs", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **options).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small attnet_xxs of seven classes."""
    torch.save(timm.create_model("attnet_xxs", num_classes=7, **SMALL).state_dict(), tmp_path / "seven.pth")
    return tmp_path / "seven.pth"


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.26"), reason="unpickles every file of a folder")
@pytest.mark.parametrize("name", KINDS)
def test_folders_of_the_hub(name: str, tmp_path: Path) -> None:
    """`hf-hub:` and `local-dir:` differ only in where timm finds the folder."""
    model = build(name, num_classes=7)
    save_for_hf(model, tmp_path, model_args=KINDS[name], safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 7
    x = images(1, SIZE)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert other(x[:, :1]).shape == (1, 3)
    last = list(model.stages.state_dict().items())[-1]
    torch.testing.assert_close(other.stages.state_dict()[last[0]], last[1], atol=0, rtol=0)


@pytest.mark.parametrize("key", ["model", "model_ema", None])
def test_a_file_of_the_release(key: str | None, tmp_path: Path) -> None:
    """With `checkpoint_path`, and for a network of 1000 classes."""
    reference = ReleasedAttNet((1, 1, 1, 1), (32, 64, 128, 240), norm=None, scale=False, classes=1000).eval()
    checkpoint = reference.state_dict() if key is None else {key: reference.state_dict(), "epoch": 3}
    torch.save(checkpoint, tmp_path / "released.pth")
    x = images(1, SIZE)
    for model in (
        timm.create_model("attnet_xxs", checkpoint_path=tmp_path / "released.pth", **SMALL).eval(),
        from_file(tmp_path / "released.pth"),
    ):
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-4)


def test_classes_of_a_file(saved: Path) -> None:
    """Timm takes the number of classes from its configuration: where that is wrong it would drop the last layer."""
    weight = torch.load(saved)["head.fc.weight"]
    torch.testing.assert_close(from_file(saved, 7, num_classes=7).head.fc.weight, weight, atol=0, rtol=0)
    assert from_file(saved, 7, num_classes=3).head.fc.weight.shape[0] == 3
    assert from_file(saved, num_classes=3).head.fc.weight.shape[0] == 3
    assert len(from_file(saved, features_only=True)(images(1, SIZE))) == 4
    for options in ({}, {"num_classes": 7}):
        with pytest.raises(InputError, match=r"are for 7 classes, .* says 1000\. Add num_classes=7"):
            from_file(saved, **options)
    with pytest.raises(InputError, match=r"head\.fc\.weight: \(7, 240\), not \(1000, 240\)"):
        timm.create_model("attnet_xxs", checkpoint_path=saved, **SMALL)


@pytest.mark.parametrize("classes", [1000, 10])
def test_weights_of_another_network(classes: int, tmp_path: Path) -> None:
    """With another number of classes timm would load nothing and say nothing."""
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"not for this AttNet: .* are missing .*Build the network") as error:
        from_file(tmp_path / "other.pth", num_classes=classes)
    assert len(str(error.value)) < 500
    with pytest.raises(InputError, match=r"conv1\.weight, bn1\.weight, …"):
        timm.create_model("attnet_xxs", checkpoint_path=tmp_path / "other.pth", **SMALL)


def test_weights_of_another_size(saved: Path) -> None:
    with pytest.raises(InputError, match="have another shape"):
        timm.create_model("attnet_xs", checkpoint_path=saved, **SMALL)
    with pytest.raises(InputError, match="tensors are missing"):
        timm.create_model("attnet_xxs", checkpoint_path=saved, num_classes=7, depths=(1, 2, 1, 1))


def test_a_checkpoint_that_holds_no_weights() -> None:
    model = AttNet(**SMALL, dims=(8, 8, 8, 8))
    with pytest.raises(InputError, match="as epoch, net is no tensor"):
        model.load_state_dict({"epoch": 3, "net": model.state_dict()})


def test_loading_a_part_is_as_in_torch() -> None:
    model = AttNet(**SMALL, dims=(8, 8, 8, 8))
    result = model.load_state_dict({"head.fc.bias": torch.ones(1000), "extra": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["extra"] and "head.fc.weight" in result.missing_keys
    assert model.head.fc.bias.eq(1).all()


@pytest.mark.parametrize("name", ["pvt_tiny", "san10", "atconv_pvt_tiny"])
@pytest.mark.parametrize("options", [{"features_only": True}, {"features_only": True, "feature_cls": "getter"}])
def test_backbones_name_images_that_are_too_small(name: str, options: dict) -> None:
    with pytest.raises(InputError, match="32×32 pixels or more, not 31×64"):
        build(name, **options)(images(1, (31, 64)))
