"""Mixers by name: registration, options, patterns, plugins, and the checks that every mixer passes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sit_atconv import SiT, create_model
from sit_atconv.errors import InputError
from sit_atconv.models.check.__main__ import main as check_command
from sit_atconv.models.check.checks import CHECKS, Subject, failure
from sit_atconv.models.mixers import (
    ATConv,
    create_mixer,
    describe_pattern,
    expand_pattern,
    import_plugins,
    list_mixers,
    mixer_flops,
    register_mixer,
    registry,
)

TINY = {"input_size": 8, "hidden_size": 32, "num_heads": 2, "depth": 4, "num_classes": 0}
PLUGIN = """
from torch import nn
from sit_atconv.models.mixers import register_mixer

@register_mixer("smooth")
class Smooth(nn.Module):
    def __init__(self, dim: int, num_heads: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x, grid):
        return self.conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's that registers the mixer "smooth"."""
    (tmp_path / "smooth_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "smooth_plugin", raising=False)
    return "smooth_plugin"


class Faulty(nn.Module):
    """A mixer with a fault for each check."""

    def __init__(self, dim: int, num_heads: int, fault: str = "none") -> None:
        super().__init__()
        self.fault, self.out = fault, nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(())) if fault == "no axes" else 1.0

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x.unflatten(1, grid).flatten(1, 2)
        if self.fault == "square grids only":
            x = x.unflatten(1, (grid[0], grid[0])).flatten(1, 2)
        if self.fault == "mixes samples":
            x = x - x.mean(0)
        if self.fault == "random":
            x = x + torch.randn_like(x)
        if self.fault == "no gradient":
            x = x.detach()
        if self.fault == "breaks the graph" and x.sum().item() > 1e9:
            return x
        return self.out(x) * self.scale

    def flops(self, grid: tuple[int, int]) -> int:
        N, C = grid[0] * grid[1], self.out.in_features
        return (1 if self.fault == "counts half" else 2) * N * C**2


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("square grids only", "shapes on every grid"),
        ("mixes samples", "samples kept apart"),
        ("random", "samples kept apart"),
        ("no gradient", "gradients in fp64"),
        ("breaks the graph", "torch.compile"),
        ("no axes", "save and load"),
        ("counts half", "operations counted"),
    ],
)
def test_the_checks_find_faults(fault: str, check: str) -> None:
    register_mixer("faulty")(Faulty)
    if check != "torch.compile":
        assert failure(CHECKS[check], Subject("faulty", {}, dim=16, num_heads=2)) is None
    assert failure(CHECKS[check], Subject("faulty", {"fault": fault}, dim=16, num_heads=2)) is not None


def test_the_command_reports_and_exits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = "sit_atconv.models.check.__main__"
    monkeypatch.setattr(f"{command}.CHECKS", {"shapes on every grid": CHECKS["shapes on every grid"]})
    monkeypatch.setattr(f"{command}.costs", lambda _: "nothing")
    for fault, code, words in (("none", 0, "passed"), ("square grids only", 1, "FAILED: RuntimeError")):
        with pytest.raises(SystemExit) as caught:
            check_command([f"{__name__}:Faulty", "--options", json.dumps({"fault": fault})])
        assert caught.value.code == code and words in capsys.readouterr().out
    for words, message in (
        (["smoth"], "Unknown mixer 'smoth'"),
        (["nowhere:Mixer"], "The plugin nowhere cannot be imported"),
        (["json:JSONDecoder"], "has no class JSONDecoder that is a torch.nn.Module"),
        (["atconv", "--options", '{"kernelsize": 3}'], "did you mean 'kernel_size'"),
        (["hydra", "--options", '{"kernel_size": 3}'], "no option 'kernel_size': it has none"),
        (["attention", "--dim", "63"], "multiple of 4"),
        (["atconv", "--options", "[" * 100_000], "is not JSON"),
    ):
        with pytest.raises(SystemExit) as caught:
            check_command(words)
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_name_is_given_once_and_the_same_class_may_come_again() -> None:
    register_mixer("faulty")(Faulty)
    register_mixer("faulty")(Faulty)
    for name in ("faulty", "attention"):
        with pytest.raises(InputError, match=f"The mixer name '{name}' is taken by"):
            register_mixer(name)(nn.Identity)


def test_options_are_typed() -> None:
    assert create_mixer("atconv", 8, 2, kernel_size=5).kernel_size == 5
    for options, message in (
        ({"kernel_size": "5"}, "does not accept kernel_size = '5': Expected `int`, got `str`"),
        ({"kernel_size": 2.5}, "does not accept kernel_size = 2.5"),
        ({"pool": None}, "does not accept pool = None"),
        ({"kernl_size": 5}, "no option 'kernl_size': did you mean 'kernel_size'"),
    ):
        with pytest.raises(InputError, match=message):
            create_mixer("atconv", 8, **options)


def test_patterns() -> None:
    raster = {"name": "atconv", "pool": "raster"}
    for pattern, names in (
        ("atconv", ["atconv"] * 4),
        ("hybrid", ["attention", "atconv"] * 2),
        (["attention", "atconv"], ["attention", "atconv"] * 2),
        (["attention", raster, "atconv"], ["attention", "atconv", "atconv", "attention"]),
        ([raster], ["atconv"] * 4),
    ):
        assert [entry.name for entry in expand_pattern(pattern, 4)] == names
        model = create_model("SiT-S/2", **TINY, mixer_pattern=pattern)
        assert [isinstance(block.mixer, ATConv) for block in model.blocks] == [name == "atconv" for name in names]
    assert expand_pattern([raster], 1)[0].resolve() == (
        "atconv",
        {
            "kernel_size": 3,
            "pool": "raster",
            "activation": "gelu",
            "kernels": "generated",
            "value": True,
            "out": True,
            "inhibition": "dkm",
        },
    )
    assert describe_pattern(["attention", raster]) == "attention, atconv (pool raster)"
    for pattern, message in (
        (["atconv"] * 5, "names 5 mixers for 4 blocks"),
        ([], "names 0 mixers for 4 blocks"),
        ([{"pool": "raster"}], "is not a valid entry of mixer_pattern"),
        ([3], "3 is not a valid entry"),
        ([{"name": "atconv", "pol": "raster"}], "no option 'pol'"),
        (["atconf"], "Unknown mixer 'atconf': did you mean 'atconv'"),
    ):
        with pytest.raises(InputError, match=message):
            create_model("SiT-S/2", **TINY, mixer_pattern=pattern)


def test_options_of_atconv_beside_the_name_go_to_the_entries_that_say_nothing_else() -> None:
    model = create_model("SiT-Hybrid-S/2", **TINY, pool="raster", kernel_size=3)
    assert model.config.mixer_pattern == ["attention", {"name": "atconv", "pool": "raster"}]
    own = [{"name": "atconv", "kernel_size": 5}, "attention"]
    model = create_model("SiT-S/2", **TINY, mixer_pattern=own, kernel_size=7, activation="silu")
    assert model.config.mixer_pattern == [{"name": "atconv", "kernel_size": 5, "activation": "silu"}, "attention"]
    assert create_model("SiT-ATConv-S/2", **TINY, pool="grid").config.mixer_pattern == "atconv"
    assert create_model("SiT-S/2", **TINY, pool="raster").config.mixer_pattern == "attention"
    with pytest.raises(InputError, match=r"is for ATConv.*For 'dwconv' .*: \[\{name: dwconv, kernel_size: 7\}\]"):
        create_model("SiT-DWConv-S/2", **TINY, kernel_size=7)


def test_a_mixer_that_does_not_count_itself_is_counted_by_torch(plugin: str) -> None:
    import_plugins([plugin])
    assert mixer_flops(create_mixer("smooth", 8), (3, 4), 8) == 2 * 12 * 8 * 9


def test_no_config_makes_anything_be_imported(plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model opens where its mixer is registered; elsewhere it is refused, and the refusal says what is missing."""
    import_plugins([plugin])
    model = create_model("SiT-S/2", **TINY, mixer_pattern=["attention", {"name": "smooth", "kernel_size": 5}])
    model.save_pretrained(tmp_path / "model")
    assert SiT.from_pretrained(tmp_path / "model").blocks[1].mixer.conv.kernel_size == (5, 5)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["mixer_origins"] == {
        "smooth": f"the module {plugin}"
    }

    del registry._MIXERS["smooth"], sys.modules[plugin]
    with pytest.raises(
        InputError, match=f"'smooth', which comes from the module {plugin}, and no mixer .* SITATCONV_PLUGINS"
    ):
        SiT.from_pretrained(tmp_path / "model")
    assert plugin not in sys.modules
    monkeypatch.setenv("SITATCONV_PLUGINS", f" {plugin},")
    assert SiT.from_pretrained(tmp_path / "model").config.mixer_pattern[1]["kernel_size"] == 5


def test_an_installed_package_offers_a_mixer(plugin: str, tmp_path: Path) -> None:
    """By an entry point: whoever builds a model of that name imports it, whoever opens a file does not."""
    metadata = tmp_path / "smooth_package-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: smooth-package\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(f"[sit_atconv.mixers]\nsmooth = {plugin}:Smooth\nbroken = nowhere:X\n")
    (metadata / "top_level.txt").write_text(f"{plugin}\n")
    assert "smooth" not in list_mixers()
    model = create_model("SiT-S/2", **TINY, mixer_pattern=["smooth"])
    assert model.config.mixer_origins == {"smooth": "smooth-package 1.2"}
    with pytest.raises(InputError, match="The plugin broken cannot be imported"):
        create_model("SiT-S/2", **TINY, mixer_pattern=["broken"])
    model.save_pretrained(tmp_path / "model")
    del registry._MIXERS["smooth"], sys.modules[plugin]
    with pytest.raises(InputError, match=r"which comes from smooth-package 1\.2"):
        SiT.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("entry", ["zeros", {"parallel": ["attention", "zeros"]}])
def test_mixers_initialise_themselves_last_and_refuse_grids(entry: str | dict) -> None:
    @register_mixer("zeros")
    class Zeros(nn.Module):
        def __init__(self, dim: int, num_heads: int) -> None:
            super().__init__()
            self.out = nn.Linear(dim, dim, bias=False)

        def initialise(self) -> None:
            nn.init.zeros_(self.out.weight)

        def check_grid(self, grid: tuple[int, int]) -> None:
            if grid[0] != grid[1]:
                raise InputError("zeros mixes squares only.")

        def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
            return self.out(x)

    mixers = create_model("SiT-S/2", **TINY, mixer_pattern=[entry]).blocks[0].mixer.modules()
    assert [mixer.out.weight.any().item() for mixer in mixers if isinstance(mixer, Zeros)] == [False]
    with pytest.raises(InputError, match="squares only"):
        create_model("SiT-S/2", **{**TINY, "input_size": (8, 4)}, mixer_pattern=[entry])
