"""Networks in ONNX, for any batch and image size, against torch. The exporter is torch's default from 2.9 on."""

import pytest
import torch
from packaging.version import Version
from test_zoo_timm import build, images
from torch import Tensor, nn

from sit_atconv.ops import per_sample_depthwise_conv2d
from sit_atconv.ops.selection import RULES, choose_backend

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="another exporter")

SIZE = (64, 64)
# Exporting takes seconds for each block: one in the first stage, two where windows alternate, and one in the last
FAMILIES = {
    "attnet_xxs": (1, 0, 0, 1),
    "pvt_tiny": (1, 0, 0, 1),
    "atconv_pvt_tiny": (1, 0, 0, 1),
    "atconv_swin_tiny": (1, 0, 0, 1),
    "acmix_swin_tiny": (2, 0, 0, 1),
    "acmix_resnet26": (1, 1, 1, 1),
    "san10": (1, 0, 0, 0, 1),
    "acmix_san10": (1, 0, 0, 0, 1),
    "acmix_pvt_tiny": (1, 0, 0, 1),
}


def session(model: nn.Module, x: Tensor, free: dict[int, str]) -> object:
    """A session of onnxruntime for `model`, exported at x with the axes `free`, without slow simplifications."""
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(free,), optimize=False, verbose=False)
    quiet = runtime.SessionOptions()
    quiet.log_severity_level = 3  # it warns of constants that it does not fold
    return runtime.InferenceSession(program.model_proto.SerializeToString(), quiet, ["CPUExecutionProvider"])


def assert_equal(exported: object, model: nn.Module, x: Tensor) -> None:
    (y,) = exported.run(None, {exported.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_any_batch(name: str) -> None:
    model = build(name, depths=FAMILIES[name])
    exported = session(model, images(2, SIZE), {0: "batch"})
    assert exported.get_inputs()[0].shape == ["batch", 3, *SIZE]
    for count in (1, 2, 5):
        assert_equal(exported, model, images(count, SIZE))


@pytest.mark.slow
def test_any_height_and_width() -> None:
    """Pooling is a product with bins that are computed from the shape."""
    model = build("attnet_xxs", depths=FAMILIES["attnet_xxs"])
    exported = session(model, images(2, (64, 96)), {0: "batch", 2: "height", 3: "width"})
    for count, size in ((1, (64, 96)), (2, (75, 53)), (3, (128, 96))):
        assert_equal(exported, model, images(count, size))


def test_exported_convolutions_need_no_operator_of_ours_at_any_size() -> None:
    """Compiled and eager programs of this size hold one, or a convolution with a group for every sample."""

    class Convolve(nn.Module):
        def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
            return per_sample_depthwise_conv2d(x, kernels)

    x, kernels = torch.randn(2, 56, 56, 32), torch.randn(2, 32, 3, 3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Convolve(), (x, kernels), dynamic_shapes=({0: batch}, {0: batch}))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in targets if "sit_atconv" in target or "conv" in target]
    torch.testing.assert_close(program.module()(x[:1], kernels[:1]), Convolve()(x[:1], kernels[:1]))


def test_programs_that_are_not_exported_keep_their_backend() -> None:
    for (device, dtype, compiled, gradients), rules in RULES.items():
        if device == "cpu" and not compiled:
            for numbers, backend in rules:
                x = torch.empty(1, 1, 1, numbers, dtype=dtype, requires_grad=gradients)
                assert choose_backend(x, x) == backend
