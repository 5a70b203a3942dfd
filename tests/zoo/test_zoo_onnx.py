"""Networks in ONNX, for any batch and image size, against torch. The exporter is torch's default from 2.9 on."""

import pytest
import torch
from packaging.version import Version
from test_zoo_timm import build, images
from torch import nn

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


def session(model: nn.Module, x: torch.Tensor, free: dict[int, str]) -> object:
    """A session of onnxruntime for `model`, exported at x with the axes `free`, without slow simplifications."""
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(free,), optimize=False, verbose=False)
    quiet = runtime.SessionOptions()
    quiet.log_severity_level = 3  # it warns of constants that it does not fold
    return runtime.InferenceSession(program.model_proto.SerializeToString(), quiet, ["CPUExecutionProvider"])


def assert_equal(exported: object, model: nn.Module, x: torch.Tensor) -> None:
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
