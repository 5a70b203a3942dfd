"""Mixers in parallel: their scaled sum, built by an entry of a pattern, saved, described and counted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sit_atconv import SiT, create_model
from sit_atconv.config import load_config
from sit_atconv.errors import InputError
from sit_atconv.models.flops import forward_flops
from sit_atconv.models.mixers import describe_pattern, expand_pattern, registry, with_atconv_options
from sit_atconv.training.session.finetune import begin_with

TINY = {"input_size": 8, "hidden_size": 32, "num_heads": 2, "depth": 2, "num_classes": 0}
QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
RASTER = {"name": "atconv", "pool": "raster"}
PAIR = {"parallel": ["attention", RASTER]}


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))


def test_the_sum_starts_as_the_mean_and_its_scales_are_learnt() -> None:
    mixer = create_model("SiT-S/2", **TINY, mixer_pattern=[PAIR]).blocks[0].mixer.double()
    attention, atconv = mixer.mixers
    assert atconv.pool == "raster" and mixer.scales.shape == (2,)
    x = torch.randn(2, 15, 32, dtype=torch.float64)
    parts = torch.stack([attention(x, (5, 3)), atconv(x, (5, 3))])
    torch.testing.assert_close(mixer(x, (5, 3)), parts.mean(0))
    nn.init.normal_(mixer.scales)
    y = mixer(x, (5, 3))
    torch.testing.assert_close(y, torch.einsum("m,mbnc->bnc", mixer.scales, parts))
    gradient = torch.autograd.grad(y.square().sum(), mixer.scales)[0]
    torch.testing.assert_close(gradient, torch.einsum("mbnc,bnc->m", parts, 2 * y))


def test_three_mixers_and_sums_of_sums() -> None:
    three = {"parallel": ["dwconv", {"parallel": ["conv", "atconv"]}, "attention"]}
    mixer = create_model("SiT-S/2", **TINY, mixer_pattern=[three]).blocks[1].mixer
    assert [len(mixer.mixers), len(mixer.mixers[1].mixers)] == [3, 2]
    torch.testing.assert_close(mixer.scales, torch.full((3,), 1 / 3))


def test_a_pattern_is_saved_described_and_compared(tmp_path: Path) -> None:
    model = create_model("SiT-S/2", **TINY, mixer_pattern=["attention", PAIR])
    assert describe_pattern(model.config.mixer_pattern) == "attention, parallel (attention, atconv (pool raster))"
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer_pattern"] == ["attention", PAIR]
    again, x, t = SiT.from_pretrained(tmp_path), torch.randn(1, 4, 8, 8), torch.rand(1)
    torch.testing.assert_close(again(x, t), model(x, t))
    spelled = {"parallel": ["attention", {**RASTER, "kernel_size": 3}]}
    begin_with(create_model("SiT-S/2", **TINY, mixer_pattern=["attention", spelled]), str(tmp_path))
    with pytest.raises(InputError, match=r"parallel \(attention, atconv \(pool raster\)\) there, attention here"):
        begin_with(create_model("SiT-S/2", **TINY), str(tmp_path))


def test_operations_are_those_of_all_mixers() -> None:
    counts = [
        forward_flops(create_model("SiT-S/2", **TINY, mixer_pattern=[entry]), (4, 8, 8))
        for entry in ("attention", "dwconv", {"parallel": ["attention", "dwconv"]})
    ]
    rest = forward_flops(create_model("SiT-S/2", **TINY, mixer_pattern="dwconv"), (4, 8, 8)) - 2 * 2 * 9 * 16 * 32
    assert counts[2] == counts[0] + counts[1] - rest


def test_options_of_atconv_reach_it() -> None:
    pattern = with_atconv_options([{"parallel": ["attention", "atconv"]}], {"pool": "raster"})
    assert pattern == [PAIR]
    assert with_atconv_options([PAIR], {"pool": "raster"}) == [PAIR]


def test_plugins_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found by SITATCONV_PLUGINS, their origin is noted, and without them the model is refused."""
    (tmp_path / "halving.py").write_text(
        "from torch import nn\n"
        "from sit_atconv.models.mixers import register_mixer\n"
        "@register_mixer('halving')\n"
        "class Halving(nn.Module):\n"
        "    def __init__(self, dim): super().__init__()\n"
        "    def forward(self, x, grid): return x / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SITATCONV_PLUGINS", "halving")
    model = create_model("SiT-S/2", **TINY, mixer_pattern=[{"parallel": ["halving", "attention"]}])
    assert model.config.mixer_origins == {"halving": "the module halving"}
    model.save_pretrained(tmp_path / "model")
    del registry._MIXERS["halving"], sys.modules["halving"]
    monkeypatch.delenv("SITATCONV_PLUGINS")
    with pytest.raises(InputError, match="'halving', which comes from the module halving"):
        SiT.from_pretrained(tmp_path / "model")


def test_attention_in_it_follows_the_chosen_backend() -> None:
    model = create_model("SiT-S/2", **TINY, mixer_pattern=[PAIR])
    model.set_attention_backend("_native_math")
    x, t = torch.randn(1, 4, 8, 8), torch.rand(1)
    torch.func.jvp(lambda x: model(x, t), (x,), (torch.ones_like(x),))


def test_configurations_and_command_lines_hold_it(tmp_path: Path) -> None:
    entry = "{parallel: [attention, {name: atconv, kernel_size: 5}]}"
    file = tmp_path / "config.yaml"
    file.write_text(f"model:\n  mixer_pattern:\n  - attention\n  - {entry}\n")
    for config in (load_config(file), load_config(QUICKSTART, ["--model.mixer_pattern", f"[attention, {entry}]"])):
        words = describe_pattern(config.model.mixer_pattern)
        assert words == "attention, parallel (attention, atconv (kernel_size 5))"


def test_entries_that_are_none_are_refused() -> None:
    for entry, message in (
        ({"parallel": ["attention"]}, "at least two"),
        ({"parallel": "hybrid"}, "at least two"),
        ({"parallel": ["attention", "atconv"], "name": "atconv"}, "nothing stands beside it"),
        ({"parallel": ["attention", 3]}, "3 is not a valid entry"),
        ({"parallel": ["attention", "atconf"]}, "did you mean 'atconv'"),
        ({"parallel": ["attention", {"name": "atconv", "pol": 1}]}, "no option 'pol'"),
    ):
        with pytest.raises(InputError, match=message):
            [each.resolve() for each in expand_pattern([entry], 1)]
            create_model("SiT-S/2", **TINY, mixer_pattern=[entry])
