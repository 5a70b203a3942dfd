"""Models, runs and converted releases of an earlier version load and compute what they did (fixtures/earlier)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from released_sources import Source, random_state
from safetensors.torch import load_file
from training_runs import NO_PREVIEW, run_tiny

from sit_atconv import SiT
from sit_atconv.convert import load_released

EARLIER = Path(__file__).parent / "fixtures" / "earlier"


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """On the machine that made the fixtures every bit was equal; others round sums in another order."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def velocity(model: SiT) -> torch.Tensor:
    """Of the batch that make_earlier_files.py used."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((2, model.in_channels, 8, 8), np.float32))
    with torch.no_grad():
        return model(x, torch.tensor([0.2, 0.7]), torch.tensor([0, 2]) if model.num_classes else None)


@pytest.mark.parametrize("name", ["attention", "atconv", "hybrid", "list", "converted-repa"])
def test_a_saved_model_opens_and_computes_the_same(name, tmp_path):
    model = SiT.from_pretrained(EARLIER / name)
    expected = load_file(EARLIER / "velocities.safetensors")[name]
    assert_same({"velocity": velocity(model)}, {"velocity": expected})
    model.save_pretrained(tmp_path)
    assert torch.equal(velocity(SiT.from_pretrained(tmp_path)), velocity(model))


@pytest.mark.parametrize("tree", ["sit", "repa"])
def test_a_release_is_converted_to_the_same_function(tree):
    source = Source(tree, ("attention", "atconv"), width=16, mlp=16, variance=tree == "sit")
    converted = load_released(random_state(source), num_heads=4)
    expected = load_file(EARLIER / "velocities.safetensors")[f"converted-{tree}"]
    assert_same({"velocity": velocity(converted)}, {"velocity": expected})


def test_a_run_goes_on_to_the_same_weights(tmp_path):
    """Three of six steps were taken then; the other three are taken now."""
    run = tmp_path / "run"
    shutil.copytree(EARLIER / "run", run)
    run_tiny(run, NO_PREVIEW)
    assert_same(
        load_file(run / "checkpoints" / "latest" / "weights.safetensors"), load_file(EARLIER / "step-6.safetensors")
    )
