"""Parameters and operations of the image networks: those of the papers and releases (spec/zoo.md), to the last one."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import sit_atconv.zoo

PARAMETERS = {
    "attnet_xxs": 2_853_556,
    "attnet_xs": 5_554_902,
    "attnet_s": 7_681_316,
    "attnet_t1": 13_714_900,
    "attnet_t2": 27_010_782,
    "attnet_t3": 49_175_682,
    "attnet_t4": 87_320_214,
    "pvt_tiny": 13_229_288,
    "pvt_small": 24_485_864,
    "pvt_medium": 44_208_104,
    "pvt_large": 61_369_320,
    "atconv_pvt_tiny": 10_199_224,
    "atconv_pvt_small": 18_318_280,
    "atconv_pvt_medium": 31_886_080,
    "atconv_pvt_large": 43_316_178,
    "atconv_swin_tiny": 28_042_240,
    "atconv_swin_small": 47_567_416,
    "atconv_swin_base": 84_164_312,
    "acmix_resnet26": 10_487_816,
    "acmix_resnet38": 14_410_896,
    "acmix_resnet50": 18_333_976,
    "acmix_swin_tiny": 28_649_908,
    "acmix_swin_small": 50_345_080,
    "san10": 11_841_124,
    "san15": 16_181_310,
    "san19": 20_518_470,
    "acmix_san10": 11_994_612,
    "acmix_san15": 16_414_134,
    "acmix_san19": 20_829_278,
    "acmix_pvt_tiny": 13_396_056,
    "acmix_pvt_small": 24_824_611,
}
# Table IX of arXiv 2510.20092, on AttNet-T2: b, then c from a depthwise convolution to ATConv
INLINE = {"mixer": "inline", "num_heads": (2, 4, 8, 16)}
STATIC = {"name": "atconv", "kernels": "static", "inhibition": "none"}
GENERATED = {"name": "atconv", "inhibition": "none"}
TABLE_IX = [
    ({"mixer": "conv"}, 40_038_228),
    ({"mixer": "dwconv"}, 20_523_924),
    ({"mixer": {"name": "dwconv", "kernel_size": 5}}, 20_631_444),
    ({"mixer": {"name": "dwconv", "kernel_size": 7}}, 20_792_724),
    ({"mixer": "hydra"}, 29_183_508),
    (INLINE, 31_632_468),
    ({"mixer": "rankaug", "num_heads": (1, 2, 6, 8)}, 31_539_924),
    ({"mixer": {**STATIC, "value": False, "out": False}}, 20_523_924),
    ({"mixer": {**GENERATED, "value": False, "out": False}}, 22_640_670),
    ({"mixer": {**GENERATED, "value": False}}, 24_822_366),
    ({"mixer": GENERATED}, 27_004_062),
    ({"mixer": {"name": "atconv", "inhibition": "softmax"}}, 27_004_062),
    ({"mixer": {"name": "atconv", "inhibition": "difference"}}, 27_004_062),
    ({"kernel_sizes": 5}, 27_024_782),
    ({"kernel_sizes": 7}, 27_069_782),
    ({"kernel_sizes": (7, 5, 3, 3)}, 27_019_542),
    ({"kernel_sizes": (7, 5, 5, 3)}, 27_028_502),
    ({"kernel_sizes": (7, 7, 5, 3)}, 27_033_902),
]
# Multiply-adds in millions at 224 px where the kernels' context is pooled before it is projected
MULTIPLY_ADDS = {
    "attnet_xxs": 501.1,
    "attnet_t1": 2255.4,
    "attnet_t2": 4733.3,
    "pvt_tiny": 1932.9,
    "atconv_pvt_tiny": 1697.3,  # 1807.6 as published, − ΣNC² + 9 ΣC²
    "atconv_swin_tiny": 3906.2,  # 4233.6 as published, in the same way
}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_network_of_the_package_is_here() -> None:
    rooms = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert {name for name, room in rooms.items() if room.startswith(sit_atconv.zoo.__name__)} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name: str) -> None:
    assert parameters(timm.create_model(name, device="meta")) == PARAMETERS[name]


@pytest.mark.parametrize(("size", "expected"), [("tiny", 26_109_568), ("small", 45_634_744), ("base", 80_727_256)])
def test_the_plain_drop_in_into_swin(size: str, expected: int) -> None:
    assert parameters(timm.create_model(f"atconv_swin_{size}", downsample="merge", device="meta")) == expected


@pytest.mark.parametrize(("options", "expected"), TABLE_IX, ids=lambda value: str(value)[:60])
def test_table_ix(options: dict, expected: int) -> None:
    assert parameters(timm.create_model("attnet_t2", device="meta", **options)) == expected


@pytest.mark.parametrize(("name", "expected"), MULTIPLY_ADDS.items())
def test_operations(name: str, expected: float) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        timm.create_model(name, device="meta").eval()(torch.empty(1, 3, 224, 224, device="meta"))
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, 0)
    assert (counter.get_total_flops() - attention) / 2e6 == pytest.approx(expected, rel=2e-3)
