"""What several evaluation tests share: the FID network with random weights, and the real data where there is any."""

import io
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[1] / ".." / "shared"
GOLDEN = SHARED / "golden" / "adm_evaluator.npz"
REAL_WEIGHTS = SHARED / "data" / "inception-2015-12-05_completed_fp16.pth"

needs_shared = pytest.mark.skipif(not (GOLDEN.exists() and REAL_WEIGHTS.exists()), reason="needs ../shared")


class StandIn:
    """Features with Inception's name and shapes that cost nothing: linear functions of the pixels."""

    name, title, suffix, identity = "inception", "stand-in", "", "stand-in 1"
    neighbours, neighbour_limit, fast, remarks = 3, 50_000, False, ()
    dimensions = {"pool": 6, "spatial": 5, "probabilities": 4}
    weights_path, weights_sha256 = "nowhere", "6726825d" + "0" * 56
    device = torch.device("cpu")
    remarks = ()

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(images)
        flat = images.flatten(1).float() / 255
        maps = {k: torch.sin(torch.arange(flat.shape[1] * d) * 1.7).view(-1, d) for k, d in self.dimensions.items()}
        found = {kind: (flat.double() @ matrix.double()).float() for kind, matrix in maps.items()}
        return {**found, "probabilities": found["probabilities"].softmax(1)}


def random_network(seed: int = 0) -> torch.nn.Module:
    """torch-fidelity's network as it is, with seeded random weights that keep signals of order one."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(seed)
    unloaded = type("Unloaded", (module.FeatureExtractorInceptionV3,), {"load_state_dict": lambda self, state: None})
    network = unloaded("random", ["2048", "logits_unbiased"], nothing)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.8, 1.2)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return network.eval()  # torch-fidelity 0.3 leaves it in training mode


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right network with random values."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_network().state_dict(), path)
    return path
