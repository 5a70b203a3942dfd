"""The folded, regrouped Inception gives what torch-fidelity's own network gives, and refuses other weights."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from evaluation_fixtures import random_network, random_weights  # noqa: F401

from sit_atconv.errors import InputError
from sit_atconv.evaluation import create_features
from sit_atconv.evaluation.features import inception
from sit_atconv.evaluation.features.inception import InceptionFeatures, resize_tf1
from sit_atconv.runtime.files import sha256_of_file


def images(count: int, height: int = 40, width: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def features(random_weights) -> InceptionFeatures:  # noqa: F811
    return InceptionFeatures(random_weights)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_same_features_as_the_unfolded_network(features):
    network = random_network()
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    x = images(3)
    with torch.no_grad():
        pool, logits = network(x)
    result = features(x)
    expected = spatial[0][:, :7].permute(0, 2, 3, 1).reshape(3, 2023)
    assert relative(result["pool"], pool) < 1e-5
    assert relative(result["spatial"], expected) < 1e-5
    assert relative(result["probabilities"], logits.softmax(1)) < 1e-5
    assert {key: value.shape[1] for key, value in result.items()} == InceptionFeatures.dimensions
    assert all(value.dtype == torch.float32 for value in result.values())


def test_batch_size_does_not_matter(features):
    x = images(9)
    whole, parts = features(x), [features(part) for part in x.split([2, 7])]
    for key, value in whole.items():
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), value, rtol=0, atol=0)


def test_surrounding_settings_neither_matter_nor_change(features):
    x = images(1)
    expected = features(x)["pool"]
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(features(x)["pool"], expected, rtol=0, atol=0)
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_fast_is_close_but_says_that_it_is_something_else(features, random_weights):  # noqa: F811
    fast = InceptionFeatures(random_weights, fast=True)
    fast._grouped._group = 1  # bfloat16 is slow where the processor has none
    x = images(1)
    pool = fast(x)["pool"]
    assert 1e-5 < relative(pool, features(x)["pool"]) < 0.1
    assert pool.dtype == torch.float32
    assert fast.identity != features.identity


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 48), (299, 299), (400, 310), (1, 7)])
def test_resize_is_torch_fidelitys(height, width):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = images(2, height, width).float()
    expected = module.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    torch.testing.assert_close(resize_tf1(x, 299), expected, rtol=0, atol=2e-4)  # of 255


@pytest.mark.parametrize(
    "bad", [images(2).float(), images(2)[:, :1], images(2).permute(0, 2, 3, 1), images(2)[0], images(0)]
)
def test_refuses_images_that_are_not_uint8_rgb_batches(features, bad):
    with pytest.raises(InputError, match=r"uint8 images \(B, 3, H, W\)"):
        features(bad)


# --- weights


def test_missing_file_and_missing_network(monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"no weights file.*weights-inception-2015-12-05-6726825d\.pth.*--weights"):
        InceptionFeatures(tmp_path / "absent.pth")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match=r"no route to host.*--weights.*--features pixels"):
        InceptionFeatures()


def test_the_hubs_copy_is_found_without_a_download(monkeypatch, tmp_path, random_weights):  # noqa: F811
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    copy = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    copy.symlink_to(random_weights)
    assert inception._find_weights(None) == copy
    assert sha256_of_file(copy) == sha256_of_file(random_weights)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_pickled_code_in_a_weights_file_never_runs(tmp_path, protocol):
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Malicious(target), protocol=2))
    else:
        torch.save({"weight": Malicious(target)}, path)
    with pytest.raises(InputError, match=r"(could run code|no weights file).*--weights"):
        InceptionFeatures(path)
    with pytest.raises(InputError, match=r"could run code|no weights file"):
        create_features("timm:resnet10t", path)
    assert not target.exists()


def test_files_that_are_not_the_network(tmp_path, random_weights):  # noqa: F811
    def refused(content: object, message: str) -> None:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            InceptionFeatures(path)

    refused({"some.weight": torch.zeros(3)}, "holds 1 tensors that are not those of the FID Inception")
    refused([torch.zeros(3)], "holds 0 tensors")
    state = torch.load(random_weights, weights_only=True)
    refused({**state, "fc.weight": torch.zeros(1000, 2048)}, r"size mismatch for fc\.weight")
    refused({key: value for key, value in state.items() if key != "fc.bias"}, "fc.bias")
    for content in (b"", b"not weights", random_weights.read_bytes()[:100_000]):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(InputError, match="is damaged, or no weights file"):
            InceptionFeatures(tmp_path / "broken.pth")
