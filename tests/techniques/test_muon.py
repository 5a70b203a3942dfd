"""Muon: its update against the definition, which weights it has, skipped steps, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin
from torch import Tensor
from training_runs import ROOT, tiny_config

import train as train_command
from sit_atconv.config import Config, FlowConfig, OptimizerConfig, load_config
from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.models.matrices import hidden_matrices
from sit_atconv.models.mixers import Attention, list_mixers
from sit_atconv.training.run.guard import step_unless_bad
from sit_atconv.training.session import optimizer as optimizer_module
from sit_atconv.training.session.objective import Objective
from sit_atconv.training.session.optimizer import Muon, build_optimizer, newton_schulz
from sit_atconv.training.session.zero import configure_zero

SMALL = {"input_size": 8, "in_channels": 1, "num_classes": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def literal_update(gradient: Tensor) -> Tensor:
    """Jordan's five iterations on one matrix, in its precision, by powers of a square matrix."""
    x = gradient / gradient.norm()
    left = x.shape[0] <= x.shape[1]
    for _ in range(5):
        square = x @ x.T if left else x.T @ x
        factor = 3.4445 * torch.eye(len(square)).to(x) - 4.7750 * square + 2.0315 * square @ square
        x = factor @ x if left else x @ factor
    return x


@pytest.mark.parametrize("shape", [(12, 12), (6, 20), (20, 6)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_newton_schulz_is_the_definition(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    matrix = random(*shape).to(dtype)
    found = newton_schulz(matrix)
    assert (found.dtype, found.shape) == (dtype, matrix.shape)
    torch.testing.assert_close(found.double(), literal_update(matrix.double()), atol=tolerance, rtol=0)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = (u.mT @ found.double() @ vh.mT).diagonal()
    assert ((values > 0.6) & (values < 1.3)).all() and s.max() / s.min() > 1.5


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))


def muon(matrices: dict, others: list, **options: object) -> Muon:
    return Muon(matrices, others, lr=0.02, momentum=0.9, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, **options)


def test_three_steps_are_the_definition_for_each_part_of_a_fused_weight() -> None:
    fused, plain = (torch.nn.Parameter(random(*shape, seed=5)) for shape in ((18, 6), (4, 10)))
    bias = torch.nn.Parameter(random(7))
    twin = torch.nn.Parameter(bias.detach().clone())
    ours = muon({fused: (6, 6, 6), plain: (4,)}, [bias])
    adam = torch.optim.AdamW([twin], 0.02, (0.9, 0.99), 1e-8, 0.1, fused=True)
    parts = [*(part.double() for part in fused.detach().split(6)), plain.detach().double()]
    buffers = [torch.zeros_like(part) for part in parts]
    for step in range(3):
        for parameter in (fused, plain, bias):
            parameter.grad = random(*parameter.shape, seed=10 + step)
        twin.grad = bias.grad.clone()
        gradients = [*fused.grad.double().split(6), plain.grad.double()]
        for i, gradient in enumerate(gradients):
            buffers[i] = 0.9 * buffers[i] + 0.1 * gradient
            direction = literal_update(0.1 * gradient + 0.9 * buffers[i])
            size = 0.2 * max(gradient.shape) ** 0.5
            parts[i] = (1 - 0.02 * 0.1) * parts[i] - 0.02 * size * direction
        ours.step()
        adam.step()
    torch.testing.assert_close(fused.detach().double(), torch.cat(parts[:3]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(plain.detach().double(), parts[3], atol=1e-6, rtol=1e-5)
    assert torch.equal(bias, twin)
    assert list(ours.state[fused]) == ["momentum_buffer"] and ours.state[fused]["momentum_buffer"].shape == (18, 6)
    # The three parts together would be another update.
    whole = literal_update(torch.cat([0.1 * g + 0.9 * b for g, b in zip(gradients[:3], buffers[:3], strict=True)]))
    each = torch.cat([literal_update(0.1 * g + 0.9 * b) for g, b in zip(gradients[:3], buffers[:3], strict=True)])
    assert torch.cosine_similarity(whole.flatten(), each.flatten(), 0) < 0.99


def test_torchs_own_muon_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = getattr(torch.optim, "Muon", None)
    if theirs is None:
        pytest.skip("needs torch 2.9")
    monkeypatch.setattr(optimizer_module, "_precision", lambda weight: torch.bfloat16)
    ours, other = (torch.nn.Parameter(random(24, 16)) for _ in range(2))
    optimizers = [
        muon({ours: (24,)}, [torch.nn.Parameter(torch.zeros(1))]),
        theirs([other], 0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(3):
        for parameter, optimizer in zip((ours, other), optimizers, strict=True):
            parameter.grad = random(24, 16, seed=step)
            optimizer.step()
    # They multiply size and learning rate first: the last bits differ.
    torch.testing.assert_close(ours, other, atol=1e-6, rtol=0)


def test_a_step_that_is_not_finite_is_skipped_on_the_device() -> None:
    matrix, bias = torch.nn.Parameter(random(6, 8)), torch.nn.Parameter(random(5))
    optimizer = muon({matrix: (6,)}, [bias])
    for finite in (True, False, True):
        before = [p.detach().clone() for p in (matrix, bias)]
        kept = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in (matrix, bias)]
        for parameter in (matrix, bias):
            parameter.grad = random(*parameter.shape) * (1.0 if finite else torch.nan)
        step_unless_bad(optimizer, torch.tensor(finite))
        optimizer.step()
        same = [torch.equal(p, b) for p, b in zip((matrix, bias), before, strict=True)]
        assert same == [not finite] * 2
        now = [optimizer.state[p] for p in (matrix, bias)]
        if not finite:
            assert all(torch.equal(now[i][k], v) for i, state in enumerate(kept) for k, v in state.items())
    assert optimizer.state[bias]["step"] == 2


def test_torchs_loss_scaler_skips_an_overflow_and_steps_otherwise() -> None:
    matrix, bias = torch.nn.Parameter(random(6, 8)), torch.nn.Parameter(random(5))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (matrix, bias)]
    scaled, plain = muon({matrix: (6,)}, [bias]), muon({twins[0]: (6,)}, [twins[1]])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf, 2.0):
        for parameter, twin in zip((matrix, bias), twins, strict=True):
            twin.grad = factor * random(*parameter.shape)
            parameter.grad = twin.grad * scaler.get_scale()
        scaler.scale(torch.zeros(()))
        scaler.unscale_(scaled)  # as clipping does in every step
        scaler.step(scaled)
        scaler.update()
        if factor != torch.inf:
            plain.step()
        assert torch.equal(matrix, twins[0]) and torch.equal(bias, twins[1])
    assert scaler.get_scale() == 2.0


def test_no_step_of_muon_waits_for_the_device() -> None:
    """On the meta device there are no values: whatever looked at one would fail. (AdamW's part is fused.)"""
    matrix = torch.nn.Parameter(torch.empty(6, 8, device="meta"))
    optimizer = muon({matrix: (2, 2, 2)}, [torch.nn.Parameter(torch.zeros(2))])
    matrix.grad = torch.empty_like(matrix)
    step_unless_bad(optimizer, torch.empty((), dtype=torch.bool, device="meta"))
    optimizer._adam = SimpleNamespace(step=lambda: None)
    optimizer.step()
    assert optimizer.state[matrix]["momentum_buffer"].device.type == "meta"


def test_the_matrices_of_a_hybrid() -> None:
    found = hidden_matrices(create_model("SiT-Hybrid-S/2", **SMALL))
    C, F = 16, 64
    mlp = {"mlp.fc1.weight": (F,), "mlp.fc2.weight": (C,)}
    attention = {"mixer.qkv.weight": (C, C, C), "mixer.out_proj.weight": (C,), **mlp}
    atconv = {f"mixer.{name}.weight": (C,) for name in ("kernel_proj", "value_proj", "out_proj")} | mlp
    named = [(f"blocks.{i}.{name}", rows) for i, part in enumerate((attention, atconv)) for name, rows in part.items()]
    assert found == dict(named)


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_names_its_matrices(mixer: str) -> None:
    pattern = [{"parallel": [mixer, "attention"]}] if mixer != "attention" else mixer
    model = create_model("SiT-S/2", **SMALL, mixer_pattern=pattern)
    found, named = hidden_matrices(model), dict(model.named_parameters())
    for name, rows in found.items():
        assert name.endswith(".weight") and named[name].ndim == 2 and sum(rows) == named[name].shape[0]
        assert min(rows) > 1 and named[name].shape[1] >= 8  # no table, generator or scale
        assert "qkv" not in name or len(rows) >= 3
    left_out = {name for name, p in named.items() if p.ndim == 2 and name.startswith("blocks") and name not in found}
    rest = ("modulation.weight", "kernel_gen.weight", "table", "position.weight", "fc.weight")
    assert [name for name in left_out if not name.endswith(rest)] == []


@pytest.mark.parametrize("said", [5, (10, 7)])
def test_a_mixer_that_miscounts_its_matrices_is_named(said: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "matrices", {"qkv": said})
    with pytest.raises(InputError, match=r"Attention.matrices divides qkv into .*, but its weight has 48 rows"):
        hidden_matrices(create_model("SiT-S/2", **SMALL))


def test_without_its_name_the_optimizer_and_its_file_are_adamws() -> None:
    assert "momentum" not in Config().to_yaml() and "name: adamw" not in Config().to_yaml()
    objective = Objective(create_model("SiT-Hybrid-S/2", **SMALL), FlowConfig(), None)
    built = build_optimizer(OptimizerConfig(), objective)
    assert type(built) is torch.optim.AdamW and len(built.param_groups) == 1
    assert [id(p) for p in built.param_groups[0]["params"]] == [id(p) for p in objective.parameters()]
    config = load_config(ROOT / "configs/imagenet256.yaml", ["--config", str(ROOT / "configs/overlays/muon.yaml")])
    both = build_optimizer(config.optimizer, objective)
    assert sum(len(group["params"]) for group in both.param_groups) == len(list(objective.parameters()))
    assert [group["lr"] for group in both.param_groups] == [1e-4] * 2


def test_deepspeed_is_refused() -> None:
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 1}, "train_batch_size": 8})
    accelerator = SimpleNamespace(deepspeed_plugin=plugin, num_processes=1)
    with pytest.raises(InputError, match="Muon under DeepSpeed is not supported"):
        configure_zero(accelerator, tiny_config("--optimizer.name muon"))
    configure_zero(accelerator, tiny_config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer.momentum", "0.9"], "optimizer.momentum would do nothing: it is Muon's"),
        (["--optimizer.name", "muon", "--optimizer.momentum", "1"], "optimizer.momentum: Expected `float` < 1"),
        (["--optimizer.name", "moun"], "optimizer.name"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    words = ["--config", str(ROOT / "configs/quickstart.yaml"), *options, "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        train_command.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()
