"""The numbers of docs/recipes.md are those that benchmarks.recipes counts."""

from pathlib import Path

import pytest
from fake_gpu import needs_fake_gpu
from training_runs import ALIGNED, checkpoint_tensors, run_tiny

from benchmarks.recipes import RECIPES, checkpoint_bytes, disk, row, table
from sit_atconv.alignment import Projector

DOCUMENT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text().splitlines()


@needs_fake_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_document_says_what_the_program_counts(recipe):
    for rows in ([row(recipe, "SiT-ATConv-B/2")], [disk(recipe)]):
        for line in table(rows).splitlines():
            assert line in DOCUMENT


@needs_fake_gpu
def test_parameters_are_those_of_model_and_projector():
    projector = sum(p.numel() for p in Projector(768, 768).parameters())
    assert row("imagenet256_repa", "SiT-B/2")["parameters"] == 130_303_504 + projector


def test_a_checkpoint_is_as_large_as_counted(tmp_path):
    run_tiny(tmp_path, f"{ALIGNED} --training.steps 1 --preview.every null")
    tensors = checkpoint_tensors(tmp_path / "checkpoints" / "latest")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items() if not name.endswith("/step")}
    trained, averaged = (
        sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(part))
        for part in ("weights.safetensors:", "model/")
    )
    assert sum(sizes.values()) == checkpoint_bytes(trained, averaged) and 0 < averaged < trained
