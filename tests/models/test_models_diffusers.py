"""What diffusers, peft and counters of operations expect of a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from ptflops import get_model_complexity_info
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sit_atconv import SiT, create_model
from sit_atconv.errors import InputError
from sit_atconv.models.flops import forward_flops
from sit_atconv.sampling import SamplerSettings
from sit_atconv.sampling.draw import Drawing

FAMILIES = ["SiT-S/2", "SiT-ATConv-S/2", "SiT-Hybrid-S/2"]


def small(name: str = "SiT-Hybrid-S/2", **options: object) -> SiT:
    model = create_model(name, **{"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return model


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8), torch.rand(batch), torch.arange(batch) % 3


def test_forward_returns_a_tensor_or_what_diffusers_models_return() -> None:
    model, given = small(), inputs()
    velocity = model(*given)
    assert isinstance(velocity, Tensor)
    output = model(*given, return_dict=True)
    assert isinstance(output, Transformer2DModelOutput) and output.sample.equal(velocity)
    assert model(*given, return_dict=False)[0].equal(velocity)


def test_attention_runs_on_the_backend_that_is_set() -> None:
    model, given = small("SiT-S/2").double(), [tensor.double() for tensor in inputs()[:2]]
    labels = torch.tensor([0, 1])

    def slope() -> Tensor:
        return torch.func.jvp(lambda x: model(x, given[1], labels), (given[0],), (given[0],))[1]

    expected = model(*given, labels)
    with pytest.raises(NotImplementedError, match="forward AD"):
        slope()
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(model(*given, labels), expected)
    assert slope().isfinite().all()  # attention without fusion has forward-mode derivatives
    model.reset_attention_backend()
    with pytest.raises(NotImplementedError, match="forward AD"):
        slope()
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("flsh")


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", FAMILIES)
def test_offloading_by_groups_changes_nothing(name: str, kind: str) -> None:
    """A CPU stands in for the accelerator; sampling computes nothing with weights that are away."""
    model, labels, noise = small(name), torch.tensor([1, 2]), torch.randn(2, 4, 8, 8)
    settings = SamplerSettings("heun", 2, guidance=2.0)
    with torch.inference_mode():
        expected = Drawing(model, settings).integrate(noise, labels)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **blocks)
    with torch.inference_mode():
        torch.testing.assert_close(Drawing(model, settings).integrate(noise, labels), expected)


class EightBit(nn.Linear):
    """A layer with integer weights, which are nobody's dtype to compute in, as bitsandbytes and torchao make them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.scale = layer.weight.abs().max().item() / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def replace_linears(module: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, replacement(child))
        else:
            replace_linears(child, replacement)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_layers_are_called_and_activations_decide_the_dtype(name: str) -> None:
    model, given = small(name), inputs()
    expected = model(*given)
    replace_linears(model, EightBit)
    assert not any(type(module) is nn.Linear for module in model.modules())
    error = (model(*given) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_counters_by_module_see_the_operations(name: str) -> None:
    """Within a per cent: ptflops also counts activations and norms."""
    model = small(name, num_classes=0, hidden_size=384, num_heads=6)

    def given(_: object) -> dict[str, Tensor]:
        return {"x": torch.randn(1, 4, 8, 8), "t": torch.rand(1)}

    found, _ = get_model_complexity_info(
        model, (1,), print_per_layer_stat=False, as_strings=False, input_constructor=given, backend="pytorch"
    )
    assert 2 * found == pytest.approx(forward_flops(model, (4, 8, 8)), rel=0.01)


def test_a_model_directory_opens_by_auto_model(tmp_path: Path) -> None:
    model, given = small(), inputs()
    model.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(opened) is SiT and opened(*given).equal(model(*given))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(str(tmp_path))


def test_compiled_for_any_size_atconv_is_not_compiled_anew_for_each() -> None:
    """One program where the first grid's height and width are alike, and one for all grids."""
    model, grids = small("SiT-ATConv-S/2", num_classes=0), [(8, 8), (12, 8), (6, 10), (16, 16), (10, 10), (4, 14)]
    expected = [model(torch.ones(2, 4, *grid), torch.rand(2) * 0) for grid in grids]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter, dynamic=True)
    for grid, velocity in zip(grids, expected, strict=True):
        torch.testing.assert_close(model(torch.ones(2, 4, *grid), torch.rand(2) * 0), velocity, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


def test_five_kinds_of_mixer_have_room_for_their_programs() -> None:
    kinds = ["attention", "atconv", *({"name": "atconv", "kernel_size": size} for size in (1, 5, 7))]
    model = small(mixer_pattern=kinds, depth=5, num_classes=0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        model(torch.randn(batch, 4, 8, 8), torch.rand(batch))
    assert counter.frame_count == 2 * len(kinds)  # for the first batch size, and for any


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    model, given = small(), inputs()
    expected = model(*given)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "value_proj", "out_proj"], init_lora_weights=False))
    assert not torch.allclose(model(*given), expected)
    model.disable_adapters()
    torch.testing.assert_close(model(*given), expected)


def test_bad_labels_are_named_whatever_the_form() -> None:
    with pytest.raises(InputError, match="needs labels"):
        small()(*inputs()[:2], return_dict=True)


@pytest.mark.parametrize("options", [{"variant": "ema"}, {"max_shard_size": "40KB"}], ids=["variant", "shards"])
def test_variants_and_shards_of_weights(options: dict, tmp_path: Path) -> None:
    model, given = small(), inputs()
    model.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > ("max_shard_size" in options)
    chosen = {key: value for key, value in options.items() if key == "variant"}
    assert SiT.from_pretrained(tmp_path, **chosen)(*given).equal(model(*given))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_computes_in_its_dtype(name: str, tmp_path: Path) -> None:
    small(name).save_pretrained(tmp_path)
    exact = SiT.from_pretrained(tmp_path)
    short = SiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    x, t, y = inputs()
    velocity = short(x.bfloat16(), t, y)
    assert velocity.dtype == short.dtype == torch.bfloat16
    expected = exact(x, t, y)
    assert (velocity.float() - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_determinism_and_batches_of_one_and_many(name: str) -> None:
    model, (x, t, y) = small(name), inputs(5)
    velocity = model(x, t, y)
    assert model.train()(x, t, y).equal(velocity)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, velocity)
