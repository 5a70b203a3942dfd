"""The numbers of docs/recipes.md are those that benchmarks.recipes counts."""

from pathlib import Path

import pytest

from benchmarks.recipes import RECIPES, disk, row, table
from sit_atconv.alignment import Projector

DOCUMENT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text().splitlines()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_document_says_what_the_program_counts(recipe):
    for rows in ([row(recipe, "SiT-ATConv-B/2")], [disk(recipe)]):
        for line in table(rows).splitlines():
            assert line in DOCUMENT


def test_parameters_are_those_of_model_and_projector():
    projector = sum(p.numel() for p in Projector(768, 768).parameters())
    assert row("imagenet256_repa", "SiT-B/2")["parameters"] == 130_303_504 + projector
