"""The command: every analysis of a network and of a checkpoint, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sit_atconv.analysis.__main__ import main
from sit_atconv.analysis.layers import layers, operators, without_inhibition
from sit_atconv.analysis.subjects import open_model
from sit_atconv.errors import InputError
from sit_atconv.models import create_model


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = create_model(
        "SiT-Hybrid-S/4", input_size=16, in_channels=1, num_classes=10, hidden_size=32, depth=3, num_heads=2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(what: str, model: str, out: Path, *words: str) -> dict:
    main([what, model, "--out", str(out), "--count", "2", "--channels", "2", *words])
    assert list(out.glob(f"{what}*.png"))
    return json.loads((out / f"{what}.json").read_text())


@pytest.mark.parametrize("what", ["routing", "inhibition"])
def test_maps_of_a_network(what: str, pictures: str, tmp_path: Path) -> None:
    shares = run(what, "attnet_xxs", tmp_path / "out", "--images", pictures, "--layers", "3")["attnet_xxs"]
    assert len(shares) == 3 and all(0 < share < 1 for share in shares.values())


@pytest.mark.parametrize("what", ["contrast", "rank"])
def test_curves_of_a_checkpoint_for_each_time(what: str, checkpoint: str, tmp_path: Path) -> None:
    found = run(what, checkpoint, tmp_path / "out", "--images", "digits:train@16", "--times", "0.1", "0.9")
    assert found["layers"] == ["block 1", "block 2", "block 3"]
    for t in ("0.1", "0.9"):
        trained, off = found[f"t = {t} as trained"], found[f"t = {t} λ = 0"]
        assert trained[0] == off[0] and trained[1] != off[1]  # only block 2 is ATConv


def test_paths_of_acmix(tmp_path: Path) -> None:
    found = run("paths", "acmix_resnet26", tmp_path / "out")
    assert found["|α|"] == found["|β|"] == [0.5] * 8


def test_a_layers_operator_is_what_the_network_computes(checkpoint: str) -> None:
    model = open_model(checkpoint, None, 0)
    x, y = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])
    seen = []
    handles = [
        module.register_forward_hook(lambda _, inputs, output: seen.append(output))
        for module in operators(model).values()
    ]
    found = layers(model, lambda: model(x, torch.tensor([0.5, 0.5]), y))
    for handle in handles:
        handle.remove()
    for layer, output in zip(found, seen, strict=True):
        torch.testing.assert_close(layer.output().flatten(2).mT, output)
        torch.testing.assert_close(layer.operator(1)(layer.maps[1:2]), layer.output()[1:2])


def test_inhibition_comes_back(checkpoint: str) -> None:
    model = open_model(checkpoint, None, 0)
    with without_inhibition(model):
        assert model.blocks[1].mixer.inhibited_by == "none"
    assert model.blocks[1].mixer.inhibited_by == "dkm"
    with pytest.raises(InputError, match="nothing to switch off"), without_inhibition(torch.nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rank attnet_xxs", "give --images"),
        ("rank attnet_xxx --images {}", "did you mean 'attnet_xxs'"),
        ("rank resnet18 --images {}", "neither a SiT nor a network of sit_atconv.zoo"),
        ("rank attnet_xxs --images {} --count 3", "3 images were asked for; there are 2"),
        ("paths attnet_xxs", "no ACmix with two learnt weights"),
        ("routing attnet_xxs --images {} --without attnet_xs", "--without is for contrast and rank"),
        ("routing attnet_xxs --images {} --radius -1", "--radius must not be negative"),
        ("rank attnet_xxs --images {} --times 2", "between 0 (data) and 1 (noise)"),
    ],
)
def test_mistakes_end_with_a_paragraph(words: str, message: str, pictures: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words.format(pictures).split(), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
