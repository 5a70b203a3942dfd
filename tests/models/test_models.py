"""SiT and its registry: parameter counts, shapes, initialisation, saving, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sit_atconv import SiT, create_model, list_models
from sit_atconv.errors import InputError
from sit_atconv.models.checkpoint import load_model
from sit_atconv.models.embeddings import sincos_position, time_features
from sit_atconv.models.mixers import expand_pattern, list_mixers, mixer_names

TINY = {"hidden_size": 16, "depth": 3, "num_heads": 2}

# 1000 classes and null, patch 2, 4 channels (specification, "Parameter counts to meet")
PARAMETERS = {
    "SiT-S/2": 32_858_896,
    "SiT-Hybrid-S/2": 31_974_700,
    "SiT-ATConv-S/2": 31_090_504,
    "SiT-B/2": 130_303_504,
    "SiT-Hybrid-B/2": 126_765_100,
    "SiT-ATConv-B/2": 123_226_696,
    "SiT-L/2": 457_824_272,
    "SiT-Hybrid-L/2": 445_242_440,
    "SiT-ATConv-L/2": 432_660_608,
    "SiT-XL/2": 674_816_272,
    "SiT-Hybrid-XL/2": 656_238_076,
    "SiT-ATConv-XL/2": 637_659_880,
}


def tiny(name: str = "SiT-Hybrid-S/2", random: bool = True, **overrides: object) -> SiT:
    """A small model, by default with random weights everywhere (a fresh SiT outputs zero)."""
    model = create_model(name, **{"input_size": 8, "num_classes": 5, **TINY, **overrides})
    if random:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_registry_names_every_family_size_and_patch() -> None:
    names = list_models()
    assert len(names) == len(set(names)) == (len(list_mixers()) + 1) * 4 * 4  # and Hybrid
    assert list_models("SiT-ATConv-*/8") == [f"SiT-ATConv-{size}/8" for size in ("S", "B", "L", "XL")]


def test_every_mixer_names_models() -> None:
    """SiT-<Mixer>-<size>/<patch>; shifted and unshifted windows alternate."""
    assert {"SiT-DiCo-B/2", "SiT-DWConv-B/2", "SiT-Strided-B/2", "SiT-Window-B/2"} <= set(list_models("SiT-*-B/2"))
    used = set()
    for family in {name.rpartition("-")[0] for name in list_models()}:
        used |= mixer_names(expand_pattern(create_model(f"{family}-S/2", **{**TINY, "depth": 2}).config.mixer_pattern, 2))
    assert used == set(list_mixers())
    assert [block.mixer.shift for block in tiny("SiT-Window-S/2", depth=4).blocks] == [0, 4, 0, 4]


@pytest.mark.parametrize("name", list_models())
def test_every_registered_model_maps_a_latent_to_its_shape(name: str) -> None:
    model = tiny(name, input_size=16)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 5])
    velocity, tokens = model.forward_intermediates(x, t, y, blocks=[2])
    patch = int(name.split("/")[1])
    assert velocity.shape == x.shape
    assert tokens[2].shape == (2, (16 // patch) ** 2, 16)
    assert velocity.std() > 0


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), patch=st.sampled_from([1, 2, 4]), channels=st.integers(1, 5))
def test_any_height_and_width(height: int, width: int, patch: int, channels: int) -> None:
    model = tiny(f"SiT-Hybrid-S/{patch}", in_channels=channels, input_size=4 * patch, num_classes=0)
    x = torch.randn(2, channels, height * patch, width * patch)
    assert model(x, torch.rand(2)).shape == x.shape


def test_intermediates_are_the_tokens_between_blocks_and_leave_the_velocity_alone() -> None:
    model = tiny()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    velocity, tokens = model.forward_intermediates(x, t, y, blocks=[1, 3])
    assert torch.equal(velocity, model(x, t, y))
    assert sorted(tokens) == [1, 3]
    c = nn.functional.silu(model.condition(t, y))
    assert torch.equal(model.unpatchify(model.final(tokens[3], c), (4, 4)), velocity)
    assert torch.equal(model.blocks[2](model.blocks[1](tokens[1], c, (4, 4)), c, (4, 4)), tokens[3])


@pytest.mark.parametrize("scalar_time", [True, False])
def test_shared_conditions_give_what_a_condition_a_sample_gives(scalar_time: bool) -> None:
    model = tiny().double()
    x, rows = torch.randn(5, 4, 8, 8).double(), torch.tensor([1, 0, 1, 2, 0])
    labels, t = torch.tensor([3, 5, 0]), torch.tensor([0.3, 0.7, 0.9]).double()
    t = t[0] if scalar_time else t
    plain = model(x, t if scalar_time else t[rows], labels[rows])
    torch.testing.assert_close(model(x, t, labels, rows=rows), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x, t.reshape(-1, 1), labels, rows=rows), plain, rtol=1e-12, atol=1e-12)


def test_an_unconditional_model_computes_the_modulation_of_one_time_once() -> None:
    model = tiny(num_classes=0).double()
    seen = []
    model.blocks[0].modulation.register_forward_hook(lambda *call: seen.append(len(call[2])))
    x, t = torch.randn(5, 4, 8, 8).double(), torch.tensor(0.4).double()
    torch.testing.assert_close(model(x, t), model(x, t.expand(5)), rtol=1e-12, atol=1e-12)
    assert seen == [1, 5]


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = tiny(random=False)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    velocity, tokens = model.forward_intermediates(x, t, y, blocks=[1, 2, 3])
    assert torch.count_nonzero(velocity) == 0
    assert torch.equal(tokens[1], tokens[3])
    assert 0.01 < model.label_embed.weight.std() < 0.03
    assert torch.count_nonzero(model.blocks[1].mixer.inhibition) == 0


def test_train_mode_computes_what_eval_mode_computes() -> None:
    model = tiny()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, y))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = tiny().train()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    model(x, t, y).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(x, t, y).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_compiled_blocks_compute_the_same() -> None:
    model = tiny()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    expected = model(x, t, y)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(model(x, t, y), expected, atol=1e-5, rtol=1e-5)


def test_the_position_table_is_used_at_its_own_size_and_computed_at_others() -> None:
    model = tiny(position="sincos", num_classes=0)
    x = torch.randn(1, 4, 8, 8)
    at_home = model.embed_patches(x, (4, 4))
    model.grid = (0, 0)  # now every size is a foreign one
    assert torch.equal(model.embed_patches(x, (4, 4)), at_home)
    without = tiny(position="none", num_classes=0)
    without.load_state_dict(model.state_dict())
    assert not torch.equal(without.embed_patches(x, (4, 4)), at_home)


def test_position_embedding_against_its_definition() -> None:
    table = sincos_position(8, (2, 3))
    for row in range(2):
        for column in range(3):
            for k, frequency in enumerate([1.0, 10000 ** (-2 / 4)]):
                token = table[row * 3 + column]
                for offset, position in ((0, column), (4, row)):
                    angle = torch.tensor(position * frequency, dtype=torch.float64)
                    torch.testing.assert_close(token[offset + k], angle.sin().float())
                    torch.testing.assert_close(token[offset + 2 + k], angle.cos().float())


def test_time_features_against_their_definition() -> None:
    t = torch.tensor([0.0, 0.3], dtype=torch.float64)
    features = time_features(t, 6)
    for k in range(3):
        angle = t * 10000 ** (-k / 3)
        torch.testing.assert_close(features[:, k], angle.cos())
        torch.testing.assert_close(features[:, 3 + k], angle.sin())


def test_hybrid_counts_blocks_from_one_and_a_list_says_it_itself() -> None:
    kinds = [type(block.mixer).__name__ for block in tiny("SiT-Hybrid-S/2").blocks]
    assert kinds == ["Attention", "ATConv", "Attention"]
    kinds = [type(b.mixer).__name__ for b in tiny(mixer_pattern=["atconv", "atconv", "attention"]).blocks]
    assert kinds == ["ATConv", "ATConv", "Attention"]


@pytest.mark.parametrize("num_classes", [0, 5])
def test_saving_and_loading_changes_nothing(tmp_path, num_classes: int) -> None:
    model = tiny(num_classes=num_classes, input_size=(8, 4), mixer_pattern=["atconv", "attention", "atconv"])
    model.save_pretrained(tmp_path)
    x, t = torch.randn(2, 4, 8, 4), torch.rand(2)
    y = torch.tensor([0, 5]) if num_classes else None
    for loaded in (SiT.from_pretrained(tmp_path), load_model(tmp_path)):
        assert torch.equal(loaded(x, t, y), model(x, t, y))
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "sit_atconv.py",
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("SiT-ATconv-XL/2"), "did you mean 'SiT-ATConv-XL/2'"),
        (lambda: create_model("SiT-S/2", widht=3), "no argument widht"),
        (lambda: tiny(input_size=7), "7×7 cannot be cut into patches of 2×2"),
        (lambda: tiny(mixer_pattern=["atconv"] * 4), "4 mixers for 3 blocks"),
        (lambda: tiny(mixer_pattern="mamba"), "Unknown mixer 'mamba'"),
        (lambda: tiny(num_heads=3), "not a multiple of the 3 attention heads"),
        (lambda: tiny(kernel_size=4), "kernel_size must be odd"),
        (lambda: tiny(position="learnt"), "Unknown position"),
        (lambda: tiny()(torch.randn(1, 4, 8, 6), torch.rand(1)), "needs labels in [0, 5)"),
        (lambda: tiny()(torch.randn(1, 4, 8, 5), torch.rand(1), torch.zeros(1).long()), "8×5 cannot be cut"),
        (lambda: tiny(num_classes=0)(torch.randn(1, 4, 8, 8), torch.rand(1), torch.zeros(1).long()), "takes no labels"),
        (
            lambda: tiny().forward_intermediates(torch.randn(1, 4, 8, 8), torch.rand(1), torch.zeros(1).long(), [4]),
            "blocks 1 to 3",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def test_what_is_not_a_checkpoint_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="is not a checkpoint"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="holds a UNet2DModel, not a SiT"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "lacking"])
def test_damaged_weights_are_named(tmp_path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        state = load_file(weights)
        state.pop("blocks.1.mixer.inhibition")
        save_file(state, weights)
    with pytest.raises(InputError, match=str(tmp_path)):
        load_model(tmp_path)


def test_a_model_made_without_memory_computes_the_same_once_loaded() -> None:
    model = tiny()
    with torch.device("meta"):
        hollow = tiny(random=False), tiny(random=False)
    hollow[0].to_empty(device="cpu").load_state_dict(model.state_dict())
    hollow[1].load_state_dict(model.state_dict(), assign=True)
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 5, 2])
    for each in hollow:
        torch.testing.assert_close(each(x, t, y), model(x, t, y))


@pytest.mark.parametrize("name", ["SiT-ATConv-S/2", "SiT-Hybrid-S/2"])
def test_an_exported_program_takes_any_batch(name: str) -> None:
    model = tiny(name)

    def inputs(B: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(B, 4, 8, 8), torch.rand(B), torch.arange(B) % 5

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, inputs(4), dynamic_shapes=[{0: batch}] * 3)
    for B in (2, 7):
        given = inputs(B)
        torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-4, atol=1e-5)


def test_a_batch_of_nothing() -> None:
    assert tiny()(torch.empty(0, 4, 8, 8), torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0, 4, 8, 8)


def test_weights_are_stored_in_eight_bits_but_for_the_time_embedding() -> None:
    model, x, t, y = tiny(), torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 4])
    expected = model(x, t, y)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.time_embed[0].weight.dtype == torch.float32
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
    error = (model(x, t, y) - expected).norm() / expected.norm()
    assert 0 < error < 0.2
