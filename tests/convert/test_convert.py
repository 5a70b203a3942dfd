"""Released checkpoints: converted models compute what the released definitions do, from every kind of file."""

import argparse
import os
import pickle
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released_sources import Source, random_state, released_forward
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sample
from sit_atconv import SiT
from sit_atconv.alignment import Projector
from sit_atconv.convert import load_released
from sit_atconv.convert.__main__ import main
from sit_atconv.convert.checkpoint import read_released
from sit_atconv.convert.structure import SD_LATENTS, mlp_ratio
from sit_atconv.errors import InputError

PLAIN, BOTH = ("attention", "attention"), ("attention", "atconv", "attention", "atconv")
SIT = Source()
REPA = Source("repa", variance=False, projector_widths=(24, 40))
FFHQ = Source("sit", ("atconv",) * 3, position=False, label_rows=1)
SOURCES = {
    "sit": SIT,
    "sit-patch-4": replace(SIT, patch=4, side=16, channels=3, mixers=("attention",) * 3),
    "sit-patch-1": replace(SIT, patch=1, side=5, width=24, heads=3, mlp=40),
    "repa": REPA,
    "repa-two-classes": replace(REPA, label_rows=3, heads=2, projector_widths=(24,)),
    "atconv-sit": replace(FFHQ, label_rows=4),
    "atconv-sit-one-label": FFHQ,
    "atconv-sit-hybrid": replace(SIT, mixers=BOTH),
    "atconv-sit-few-tokens": replace(FFHQ, side=4),
    "atconv-repa-hybrid": replace(REPA, mixers=BOTH),
    "atconv-repa-only-attention": replace(REPA, mixers=("attention",) * 3),
    "atconv-repa-uneven": replace(REPA, mixers=("atconv", "atconv", "attention"), side=12),
}


def require_equal(model: SiT, source: Source, state: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """The model's velocity is the released one, in our direction of time, to `rtol` of its largest value."""
    x = torch.randn(5, source.channels, source.side, source.side)
    t, y = torch.tensor([0.0, 0.31, 0.5, 0.97, 1.0]), torch.arange(5) % source.label_rows
    with torch.no_grad():
        theirs = -released_forward(source, state, x, 1 - t, y)
        if source.tree == "repa":
            theirs = released_forward(source, state, x, t, y)
        ours = model(x, t, y if model.num_classes else None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * float(theirs.abs().max()))


@pytest.mark.parametrize("name", SOURCES)
def test_a_converted_model_computes_what_the_released_one_does(name: str) -> None:
    source = SOURCES[name]
    state = random_state(source)
    model = load_released(state, num_heads=source.heads)
    assert not model.training and model.config.input_size == (source.side if source.position else 16 * source.patch)
    assert model.num_classes == source.label_rows - 1
    require_equal(model, source, state)


def test_the_configuration_says_what_was_read() -> None:
    def config(name: str) -> dict:
        source = SOURCES[name]
        return load_released(random_state(source), num_heads=source.heads).config

    hybrid, ffhq, uneven = config("atconv-repa-hybrid"), config("atconv-sit"), config("atconv-repa-uneven")
    silu, gelu = ({"name": "atconv", "pool": "raster", "activation": name} for name in ("silu", "gelu_tanh"))
    assert (hybrid.mixer_pattern, hybrid.position) == (["attention", silu], "sincos")
    assert (ffhq.mixer_pattern, ffhq.position) == ([gelu], "none")
    assert list(uneven.mixer_pattern) == [silu, silu, "attention"]
    assert hybrid.latents == SD_LATENTS.to_dict() and config("sit-patch-4").latents is None


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_named_sizes_are_known(width: int, heads: int) -> None:
    state = random_state(replace(SIT, width=width, mixers=("attention",), mlp=8))
    assert load_released(state).config.num_heads == heads


@given(hidden=st.integers(1, 9000), width=st.integers(1, 2304))
def test_any_mlp_width_is_met(hidden: int, width: int) -> None:
    assert int(width * mlp_ratio(hidden, width)) == hidden


# Files


def wrapped(state: dict[str, Tensor], how: str) -> dict:
    other = {key: torch.randn_like(tensor) for key, tensor in state.items() if key != "pos_embed"}
    other |= {key: tensor for key, tensor in state.items() if key == "pos_embed"}
    arguments = argparse.Namespace(model="SiT-S/2", num_classes=5, lr=1e-4, path=None)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    return {
        "bare": state,
        "train.py": OrderedDict(model=other, ema=OrderedDict(state), opt=optimizer, args=arguments, steps=400),
        "model alone": {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
        "lightning": {"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}},
        "compiled": {"ema": {f"_orig_mod.module.{key}": tensor for key, tensor in state.items()}},
        "blocks compiled": {key.replace("attn", "_orig_mod.attn"): tensor for key, tensor in state.items()},
        "parameters": {key: nn.Parameter(tensor) for key, tensor in state.items()},
    }[how]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "how", ["bare", "train.py", "model alone", "lightning", "compiled", "blocks compiled", "parameters"]
)
def test_every_wrapping_gives_the_averaged_weights(tmp_path: Path, how: str, zipped: bool) -> None:
    state = random_state(REPA)
    torch.save(wrapped(state, how), tmp_path / "0400000.pt", _use_new_zipfile_serialization=zipped)
    require_equal(load_released(tmp_path / "0400000.pt", 4), REPA, state)


def test_the_unaveraged_weights_on_demand() -> None:
    state, average = random_state(SIT), random_state(SIT, seed=1)
    checkpoint = {"model": state, "ema": average}
    require_equal(load_released(checkpoint, 4, weights="model"), SIT, state)
    require_equal(load_released(checkpoint, 4, weights="ema"), SIT, average)


def test_safetensors(tmp_path: Path) -> None:
    state = random_state(SOURCES["atconv-sit-hybrid"])
    for name in ("sit.safetensors", "misnamed.pt"):
        save_file(state, tmp_path / name)
        require_equal(load_released(str(tmp_path / name), num_heads=4), SOURCES["atconv-sit-hybrid"], state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_taken_for_what_they_hold(dtype: torch.dtype) -> None:
    rounded = {key: tensor.to(dtype) for key, tensor in random_state(SIT).items()}
    model = load_released(rounded, num_heads=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    require_equal(model, SIT, {key: tensor.float() for key, tensor in rounded.items()})


def test_weights_in_channels_last_memory() -> None:
    state = random_state(SOURCES["atconv-repa-hybrid"])
    last = {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    require_equal(load_released(last, num_heads=4), SOURCES["atconv-repa-hybrid"], state)


def test_first_checkpoints_of_repa_count_their_blocks_twice() -> None:
    source = replace(REPA, mixers=("attention",) * 5)
    state = random_state(source)
    late = re.compile(r"^blocks\.([2-4])\.")
    legacy = {late.sub(lambda n: f"decoder_blocks.{int(n[1]) - 2}.", key): state[key] for key in state}
    assert sum(key.startswith("decoder_blocks.2.") for key in legacy) == 10
    require_equal(load_released(legacy, num_heads=4), source, state)
    assert (read_released(legacy).aligned_block, read_released(state).aligned_block) == (2, None)


def test_the_model_shares_nothing_with_the_source_and_can_be_trained() -> None:
    state = random_state(SIT)
    before = {key: tensor.clone() for key, tensor in state.items()}
    model = load_released(state, num_heads=4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)


# What only the arguments or the user can say


def test_the_training_arguments_are_used() -> None:
    state = random_state(replace(FFHQ, label_rows=7))
    arguments = argparse.Namespace(num_classes=7, image_size=512, path_type="GVP", prediction="velocity")
    config = load_released({"ema": state, "args": arguments}).config
    assert (config.num_classes, config.input_size, config.interpolant) == (7, 64, "cosine")
    config = load_released({"ema": state, "args": arguments}, num_classes=6, input_size=12, interpolant="vp").config
    assert (config.num_classes, config.input_size, config.interpolant) == (6, 12, "vp")


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_noise_and_score_keep_their_sign_when_time_turns(prediction: str) -> None:
    state = random_state(SIT)
    model = load_released({"ema": state, "args": argparse.Namespace(prediction=prediction)}, num_heads=4)
    assert model.config.prediction == prediction
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.8]), torch.tensor([0, 2, 5])
    torch.testing.assert_close(model(x, t, y), released_forward(SIT, state, x, 1 - t, y), rtol=0, atol=3e-5)


def test_a_table_without_a_null_row_gets_the_mean_of_its_classes() -> None:
    state = random_state(SIT)
    model = load_released(state, num_heads=4, num_classes=6)
    table = state["y_embedder.embedding_table.weight"]
    torch.testing.assert_close(model.label_embed.weight, torch.cat([table, table.mean(0, keepdim=True)]))
    require_equal(model, SIT, state)


def test_without_variance_and_projectors_time_is_taken_for_repas(caplog: pytest.LogCaptureFixture) -> None:
    source = replace(REPA, projector_widths=())
    state = random_state(source)
    require_equal(load_released(state, 4, layout="sit"), replace(source, tree="sit"), state)
    assert not caplog.records
    require_equal(load_released(state, 4), source, state)
    assert "t = 1 is noise" in caplog.text


def test_options_of_atconv_can_be_overridden() -> None:
    state = random_state(FFHQ)
    model = load_released(state, pool="grid", activation="gelu", input_size=8)
    assert (model.blocks[0].mixer.pool, model.blocks[0].mixer.activation) == ("grid", "gelu")
    assert not torch.equal(model(torch.ones(1, 4, 8, 8), torch.zeros(1)), load_released(state)(
        torch.ones(1, 4, 8, 8), torch.zeros(1)))  # fmt: skip


@pytest.mark.parametrize("change", [1.6e-4, 1.0])
def test_a_position_table_that_is_not_ours_is_kept(change: float, tmp_path: Path) -> None:
    state = random_state(SIT)
    moved = state | {"pos_embed": state["pos_embed"] + change * torch.randn_like(state["pos_embed"])}
    model = load_released(moved, num_heads=4)
    require_equal(model, SIT, moved)
    model.save_pretrained(tmp_path)
    require_equal(SiT.from_pretrained(tmp_path), SIT, moved)
    with pytest.raises(InputError, match="does not work with"):
        model(torch.ones(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    if change < 1e-3:  # close enough to be replaced on request, for any size
        assert load_released(moved, num_heads=4, position="sincos").config.position == "sincos"


# Bad input


class Evil:
    """Makes a directory when it is unpickled by anything that runs what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def changed(source: Source = SIT, drop: str | None = None, **tensors: Tensor) -> dict[str, Tensor]:
    """A state dict without `drop`, and with `tensors`, whose names have __ for dots."""
    state = random_state(source) | {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in state.items() if key != drop}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (lambda: {}, {}, "it is empty"),
        (lambda: {"epoch": 3, "loss": 0.1}, {}, "'epoch' in it is a int"),
        (lambda: {"ema": {"a": None}}, {}, "'a' in it is a NoneType"),
        (lambda: {"conv.weight": torch.ones(3)}, {}, "is not a SiT: x_embedder.proj.weight"),
        (lambda: {"model": random_state(SIT)}, {"weights": "ema"}, "no 'ema' weights; it has model"),
        (lambda: {"steps": torch.tensor(3)}, {}, "is not a SiT: x_embedder.proj.weight"),
        (lambda: changed(drop="blocks.1.mlp.fc2.bias"), {}, "lacks blocks.1.mlp.fc2.bias."),
        (lambda: changed(drop="final_layer.linear.bias"), {}, "lacks final_layer.linear.bias."),
        (lambda: changed(drop="t_embedder.mlp.2.bias"), {}, "lacks t_embedder.mlp.2.bias."),
        (lambda: changed(drop="pos_embed"), {}, "pos_embed is missing"),
        (lambda: changed(blocks__1__attn__bias=torch.ones(2)), {}, "no such network has: blocks.1.attn.bias."),
        (lambda: changed(blocks__0__attn__q_norm__weight=torch.ones(8)), {}, "normalises queries and keys"),
        (lambda: changed(blocks__1__mlp__fc1__weight=torch.ones(95, 32)), {}, "fc1.weight (95, 32), expected (96, 32)"),
        (lambda: changed(final_layer__linear__weight=torch.ones(33, 32)), {}, "has 33 rows: expected the 16 values"),
        (lambda: changed(final_layer__linear__bias=torch.ones(16)), {}, "bias (16,), expected (32,)"),
        (lambda: changed(y_embedder__embedding_table__weight=torch.tensor(1.0)), {}, "(), expected (32,)"),
        (lambda: changed(x_embedder__proj__weight=torch.ones(32, 16)), {}, "expected 4 dimensions"),
        (lambda: changed(t_embedder__mlp__0__weight=torch.ones(32, 128)), {}, "(32, 128), expected (32, 256)"),
        (lambda: changed(blocks__0__mlp__fc1__bias=torch.full((96,), torch.nan)), {}, "has 96 values that are NaN"),
        (lambda: changed(blocks__0__mlp__fc1__bias=torch.ones(96, dtype=torch.int8)), {}, "is torch.int8"),
        (lambda: changed(pos_embed=torch.randn(1, 16, 32)), {"position": "sincos"}, "not the sine-cosine embedding"),
        (lambda: changed(drop="pos_embed"), {"position": "table", "input_size": 8}, "It lacks pos_embed"),
        (lambda: changed(pos_embed=torch.zeros(1, 12, 32)), {}, "expected (1, a square number of tokens, width)"),
        (lambda: changed(pos_embed=torch.zeros(16)), {}, "expected (1, a square number of tokens, width)"),
        (lambda: changed(**{"module.pos_embed": torch.ones(1)}), {}, "some tensors twice"),
        (lambda: random_state(SIT), {"num_heads": None}, "width 32 is none of 384, 768, 1024, 1152"),
        (lambda: random_state(SIT), {"num_heads": 5}, "width 32 is not a multiple of the 5 attention heads"),
        (lambda: random_state(SIT), {"num_classes": 9}, "6 rows, which does not fit num_classes = 9"),
        (lambda: random_state(SIT), {"num_classes": 0}, "6 rows, which does not fit num_classes = 0"),
        (lambda: random_state(SIT), {"position": "none"}, "but the checkpoint has a position embedding"),
        (lambda: random_state(SIT), {"input_size": 32}, "pos_embed (1, 16, 32), expected (1, 256, 32)"),
        (lambda: random_state(SIT), {"depth": 3}, "lacks blocks.2.attn.qkv.weight, blocks.2"),
        (lambda: random_state(SIT), {"size": 3}, "no argument size"),
        (lambda: random_state(SIT), {"layout": "dit"}, "Unknown layout 'dit'"),
        (lambda: random_state(FFHQ), {"pool": "square"}, "Unknown pool 'square'"),
        (lambda: random_state(replace(REPA, variance=True)), {}, "like REPA (projectors"),
        (lambda: random_state(SIT), {"prediction": "epsilon"}, "Unknown prediction 'epsilon'"),
        (lambda: random_state(SIT), {"interpolant": "edm"}, "Unknown interpolant 'edm'"),
        (lambda: {"ema": random_state(SIT), "args": {"prediction": "x0"}}, {}, "Unknown prediction in the checkpoint"),
        (lambda: {"ema": random_state(SIT), "args": {"path_type": "edm"}}, {}, "Unknown path_type"),
    ],
)
def test_what_cannot_be_converted_is_named(source, options: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_released(source(), **{"num_heads": 4, **options})
    assert message in str(error.value)


def test_a_file_with_another_class_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name, content in (("zip.pt", Evil(trace)), ("inside.pt", {"ema": random_state(SIT), "args": Evil(trace)})):
        torch.save(content, tmp_path / name)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(trace), protocol=2))
    for name in ("zip.pt", "inside.pt", "plain.pt"):
        with pytest.raises(InputError, match=r"pickled with \w+\.mkdir|plain\.pt is damaged"):
            load_released(tmp_path / name, num_heads=4)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("kind", ["zip.pt", "old.pt", "a.safetensors"])
def test_truncated_files_are_named(tmp_path: Path, kind: str, share: float) -> None:
    state, path = random_state(SIT), tmp_path / kind
    if kind.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=str(path)):
        load_released(path, num_heads=4)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello world", b"\x80\x02}q\x00.", bytes(range(256)) * 9])
def test_files_of_something_else_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pt"):
        load_released(tmp_path / "weights.pt")


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no checkpoint"):
        load_released(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="is a directory"):
        load_released(tmp_path)
    load_released(random_state(SIT), num_heads=4).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=r"open it with SiT\.from_pretrained"):
        load_released(tmp_path / "ours")


# The command


def test_the_command_writes_what_sampling_opens(tmp_path: Path) -> None:
    source = replace(REPA, channels=3, mixers=BOTH)
    state = random_state(source)
    torch.save({"ema": state, "steps": 7}, tmp_path / "repa.pt")
    out = tmp_path / "made" / "model"
    main([str(tmp_path / "repa.pt"), str(out), "--num-heads", "4", "--vae", "identity"])
    assert {p.name for p in out.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "projectors.safetensors", "sit_atconv.py",
    }  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    require_equal(SiT.from_pretrained(out), source, state)

    # Projectors as training holds them
    projectors = nn.ModuleList(Projector(32, width, 64) for width in source.projector_widths)
    projectors.load_state_dict(load_file(out / "projectors.safetensors"))
    assert torch.equal(projectors[1].layers[4].weight, state["projectors.1.4.weight"])

    words = ["--solver", "euler", "--steps", "2", "--num-samples", "4", "--guidance", "1.5"]
    sample.main(["--checkpoint", str(out), "--out", str(tmp_path / "samples"), *words])
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (4, 8, 8, 3)


def test_what_the_command_cannot_do_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(random_state(SIT), tmp_path / "sit.pt")

    def fails(*words: str) -> str:
        with pytest.raises(SystemExit) as error:
            main(list(words))
        assert error.value.code == 2
        return capsys.readouterr().err

    released, out = str(tmp_path / "sit.pt"), tmp_path / "out"
    assert "give num_heads (--num-heads)" in fails(released, str(out))
    assert not out.exists()
    assert "There is no checkpoint" in fails(str(tmp_path / "sti.pt"), str(out))
    (tmp_path / "vae").mkdir()
    assert "not a diffusers auto" in fails(released, str(out), "--num-heads", "4", "--vae", str(tmp_path / "vae"))
    assert "exists already" in fails(released, str(tmp_path), "--num-heads", "4")
    assert "invalid choice" in fails(released, str(out), "--pool", "max")
    assert {p.name for p in tmp_path.iterdir()} == {"sit.pt", "vae"}
