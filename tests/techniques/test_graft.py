"""Grafting: what the new mixers are fitted to, what is kept, what comes back, and what is refused."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from released_sources import Source, random_state
from safetensors.torch import load_file
from torch import Tensor
from training_runs import NO_PREVIEW, fresh_accelerate, log_lines, run_tiny

import sample as sample_command
from sit_atconv.config import AlignmentConfig, FlowConfig, TeacherConfig
from sit_atconv.convert.__main__ import main as convert
from sit_atconv.data.dataset import open_dataset
from sit_atconv.graft import fitting
from sit_atconv.graft.__main__ import main as graft_command
from sit_atconv.graft.fitting import Fitting
from sit_atconv.graft.network import Graft, changed_blocks, relative_error, with_new_mixers
from sit_atconv.graft.settings import GraftSettings
from sit_atconv.models import SiT, create_model
from sit_atconv.models.checkpoint import load_model
from sit_atconv.randomness import Stream, keyed_normal, keyed_uniform
from sit_atconv.training.session.objective import Objective
from sit_atconv.training.session.projectors import begin_projectors

DATA = "digits:train@8"
WEIGHTS = "model/diffusion_pytorch_model.safetensors"


def trained(pattern: object = "attention", **options: object) -> SiT:
    """A tiny network on the digits at 8 pixels, with weights that no training began with."""
    torch.manual_seed(1)
    latents = open_dataset(DATA).latents.to_dict()
    sizes = {"hidden_size": 16, "depth": 3, "num_heads": 2, "in_channels": 1, "input_size": 8, "num_classes": 10}
    model = create_model("SiT-S/2", **{**sizes, "mixer_pattern": pattern, "latents": latents, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    trained().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def graft(checkpoint: Path, out: Path, words: str = "--mixer-pattern hybrid") -> None:
    """The command, short; later words override earlier ones."""
    fresh_accelerate()
    short = f"--data {DATA} --steps 6 --batch-size 8 --workers 0 --lr 0.01"
    graft_command([str(checkpoint), str(out), *short.split(), *words.split()])


def inputs(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, 1, 8, 8), torch.rand(count), torch.arange(count) % 11


# The fit


def mixers_by_hand(model: SiT, x: Tensor, t: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each block, the mixer's input and output, from the definition of an adaLN-Zero block."""
    c, tokens, pairs = F.silu(model.condition(t, y)), model.embed_patches(x, (4, 4)), []
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in block.modulation(c).chunk(6, dim=1))
        given = F.layer_norm(tokens, (16,), eps=1e-6) * (1 + scale1) + shift1
        pairs.append((given, block.mixer(given, (4, 4))))
        tokens = tokens + gate1 * pairs[-1][1]
        tokens = tokens + gate2 * block.mlp(F.layer_norm(tokens, (16,), eps=1e-6) * (1 + scale2) + shift2)
    return pairs


@pytest.mark.parametrize("loss", ["l1", "mse", "huber"])
def test_each_mixer_learns_the_old_ones_output_at_the_frozen_networks_input(loss: str) -> None:
    old = trained()
    new = with_new_mixers(old, ["attention", "atconv", "conv"], [2, 3], seed=0)
    grafting, (x, t, y) = Graft(old, {block: new.blocks[block - 1].mixer for block in (2, 3)}, loss), inputs()
    losses, squares = grafting(x, t, y)
    losses.sum().backward()
    for k, block in enumerate((2, 3)):
        mixer = new.blocks[block - 1].mixer
        with torch.no_grad():
            given, wanted = mixers_by_hand(old, x, t, y)[block - 1]
        error = mixer(given, (4, 4)) - wanted
        huber = torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5)
        expected = {"l1": error.abs(), "mse": error**2, "huber": huber}[loss].mean()
        torch.testing.assert_close(losses[k], expected)
        torch.testing.assert_close(squares[k], torch.stack([error.square().sum(), wanted.square().sum()]).detach())
        torch.testing.assert_close(relative_error(squares)[k], (error.norm() / wanted.norm()).detach())
        gradients = torch.autograd.grad(expected, list(mixer.parameters()))  # of no other block's loss
        torch.testing.assert_close([p.grad for p in mixer.parameters()], list(gradients))
    assert all(parameter.grad is None for parameter in old.parameters())
    assert not old.blocks[1].mixer._forward_hooks


def test_the_network_is_given_what_training_gives_it(tmp_path: Path, monkeypatch) -> None:
    """x_t, t and dropped labels by (seed, position); the rate halves with each quarter of the steps."""
    seen, step = [], Fitting.step

    def recorded(self: Fitting, number: int, batch: dict[str, Tensor]) -> object:
        result = step(self, number, batch)
        seen.append((batch["position"].tolist(), batch, self.noised(batch), self.adam.param_groups[0]["lr"]))
        return result

    monkeypatch.setattr(Fitting, "step", recorded)
    trained(label_dropout=0.5).save_pretrained(tmp_path / "teacher")
    graft(tmp_path / "teacher", tmp_path / "out", "--mixer-pattern hybrid --seed 3 --steps 4 --lr 0.08")
    assert [positions for positions, *_ in seen] == [list(range(8 * k, 8 * k + 8)) for k in range(4)]
    assert [rate for *_, rate in seen] == pytest.approx([0.08, 0.04, 0.02, 0.01])
    positions, batch, (x_t, t, y), _ = seen[1]
    times, noise = keyed_uniform(3, Stream.TIME, positions), keyed_normal(3, Stream.NOISE, positions, (1, 8, 8))
    x = open_dataset(DATA).read(batch["index"].tolist(), [False] * 8)["moments"][:, :1]
    wide = times.float()[:, None, None, None]
    torch.testing.assert_close(t, times.float(), rtol=0, atol=0)
    torch.testing.assert_close(x_t, (1 - wide) * x + wide * noise)
    dropped = keyed_uniform(3, Stream.LABEL_DROPOUT, positions) < 0.5
    assert 0 < dropped.sum() < 8
    assert torch.equal(y, torch.where(dropped, 10, batch["label"]))


@pytest.mark.parametrize(
    ("steps", "step", "halvings"), [(200, 50, 0), (200, 51, 1), (200, 101, 2), (200, 200, 3), (1, 1, 0)]
)
def test_the_learning_rate_halves_as_in_the_paper(steps: int, step: int, halvings: int) -> None:
    assert GraftSettings(steps=steps, lr=0.8).learning_rate(step) == pytest.approx(0.8 / 2**halvings)


# What the new network is


def test_blocks_with_the_same_mixer_keep_it_and_new_weights_follow_the_seed() -> None:
    old = trained(["attention", {"name": "atconv", "pool": "raster"}, "atconv"])
    pattern = ["attention", "atconv", {"name": "atconv", "kernel_size": 3}]  # the last one says a default
    assert changed_blocks(old, pattern) == [2]
    one, same, other = (with_new_mixers(old, pattern, [2], seed, fresh=True) for seed in (0, 0, 1))
    names = {name for name, tensor in one.state_dict().items() if not torch.equal(tensor, old.state_dict()[name])}
    assert names and all(name.startswith("blocks.1.mixer.") for name in names)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.blocks[1].mixer.value_proj.weight, other.blocks[1].mixer.value_proj.weight)
    assert one.config.mixer_pattern == pattern and one.config.latents == old.config.latents


def test_a_mixer_with_weights_of_the_same_shapes_begins_with_the_old_ones() -> None:
    """Attention in a window as large as the grid is attention, so nothing is left to learn."""
    old, (x, t, y) = trained(), inputs()
    new = with_new_mixers(old, [{"name": "window", "window": 4, "relative_bias": False}], [1, 2, 3], seed=0)
    torch.testing.assert_close(new(x, t, y), old(x, t, y))


@pytest.mark.slow
def test_self_grafting_gives_the_outputs_back() -> None:
    """All mixers begin anew, and the network's output is back to 1e-3, from an error a hundred times as large."""
    old = trained("hybrid", depth=2)
    for name, parameter in old.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith("modulation.bias"):
            parameter.data[2 * 16 : 3 * 16] = 0.1  # the mixers' gates
    new, loss, steps, lr = with_new_mixers(old, "hybrid", [1, 2], seed=0, fresh=True), "l1", 600, 0.02

    def output_error() -> float:
        x, t, y = inputs(32)
        with torch.no_grad():
            return float((new(x, t, y) - old(x, t, y)).norm() / old(x, t, y).norm())

    before, settings = output_error(), GraftSettings(steps=steps, lr=lr, loss=loss)
    grafting = Graft(old, {1: new.blocks[0].mixer, 2: new.blocks[1].mixer}, loss)
    adam = torch.optim.AdamW(grafting.mixers.parameters(), lr, weight_decay=0, fused=True)
    for step in range(1, steps + 1):
        adam.param_groups[0]["lr"] = settings.learning_rate(step)
        grafting(*inputs(32))[0].sum().backward()
        adam.step()
        adam.zero_grad()
    assert output_error() <= 1e-3 < before / 100


# The command


def test_the_graft_opens_everywhere_and_training_goes_on_from_it(tmp_path: Path, capsys, caplog) -> None:
    caplog.set_level("INFO")
    words = "--model.name SiT-S/2 --training.steps 2"
    run_tiny(tmp_path / "run", f"{NO_PREVIEW} {words}")
    checkpoint = tmp_path / "run" / "checkpoints" / "latest" / "model"
    graft(checkpoint, tmp_path / "out", "--mixer-pattern hybrid --steps 40")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["graft.json", "log.jsonl", "model"]
    new, old = load_file(tmp_path / "out" / WEIGHTS), load_file(checkpoint.parent / WEIGHTS)
    kept = [name for name in new if not name.startswith("blocks.1.mixer.")]
    assert len(kept) < len(new) and all(torch.equal(new[name], old[name]) for name in kept)
    errors = [line["error_block_2"] for line in log_lines(tmp_path / "out")]
    assert len(errors) == 40 and errors[-1] < 0.9 * errors[0]
    assert "attention  atconv" in caplog.text
    assert (
        f"--config {tmp_path / 'run' / 'config.yaml'} --run RUN --data.path {DATA} --model.mixer_pattern 'hybrid'"
        in caplog.text
    )

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    graft(checkpoint, tmp_path / "out", "--mixer-pattern hybrid --steps 40")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert "complete already" in caplog.text

    tuned = (
        f"{NO_PREVIEW} {words} --model.mixer_pattern hybrid --model.init_from {tmp_path / 'out'} --optimizer.lr 1e-12"
    )
    run_tiny(tmp_path / "tuned", tuned)
    begun = load_file(tmp_path / "tuned" / "checkpoints" / "latest" / "weights.safetensors")
    for name, tensor in new.items():
        torch.testing.assert_close(begun[f"model.{name}"], tensor, rtol=0, atol=1e-9)
    out = ["--out", str(tmp_path / "samples"), "--num-samples", "2", "--steps", "1"]
    sample_command.main(["--checkpoint", str(tmp_path / "out"), *out])
    assert (tmp_path / "samples" / "samples.npz").is_file()


def stopped(number: int, how: int | None = None) -> None:
    """Let the fit fail in the step of this number, or the process die by the signal `how`."""
    original = Fitting.step

    def step(self: Fitting, step_number: int, batch: dict[str, Tensor]) -> object:
        if step_number == number:
            if how is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), how)
        return original(self, step_number, batch)

    Fitting.step = step


def in_a_process(
    checkpoint: Path, out: Path, words: str, kill_at: int | None = None, rank: int = 0, **told: str
) -> None:
    torch.set_num_threads(1)
    with open(f"{out}-{rank}.stderr", "a") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= told
    if kill_at is not None:
        stopped(kill_at, signal.SIGKILL)
    graft(checkpoint, out, words)


def contents(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in (WEIGHTS, "model/config.json", "log.jsonl", "graft.json")]


@pytest.mark.parametrize("words", ["", "--precision bf16 --workers 1 --loss huber"])
def test_a_killed_fit_goes_on_to_the_same_result(teacher: Path, tmp_path: Path, monkeypatch, words: str) -> None:
    monkeypatch.setattr(fitting, "_LINES", 4)  # the state is kept after every third of ten steps
    words = f"--mixer-pattern hybrid --steps 10 --batch-size 4 {words}"
    graft(teacher, tmp_path / "whole", words)
    assert [line["step"] for line in log_lines(tmp_path / "whole")] == [3, 6, 9, 10]
    for kill_at in (2, 5, 9):
        process = multiprocessing.get_context("fork").Process(
            target=in_a_process, args=(teacher, tmp_path / "parts", words, kill_at)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "parts" / "model").exists()
    graft(teacher, tmp_path / "parts", words)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["graft.json", "log.jsonl", "model"]


@pytest.mark.slow
def test_two_processes_fit_what_one_does(teacher: Path, tmp_path: Path) -> None:
    graft(teacher, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=in_a_process,
            args=(teacher, tmp_path / "two", "--mixer-pattern hybrid", None, rank),
            kwargs={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "two-0.stderr").read_text()
    one, two = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_release_of_repa_is_grafted_with_its_projectors(tmp_path: Path) -> None:
    source = Source("repa", ("attention",) * 2, patch=2, side=8, channels=1, label_rows=11, variance=False)
    state = random_state(Source(**{**vars(source), "width": 16, "heads": 2, "mlp": 64, "projector_widths": (64,)}))
    torch.save({"ema": state, "args": {"encoder_depth": 1, "enc_type": "dinov2-vit-b"}}, tmp_path / "released.pt")
    convert([str(tmp_path / "released.pt"), str(tmp_path / "old"), "--num-heads", "2", "--layout", "repa"])
    graft(tmp_path / "old", tmp_path / "new", "--mixer-pattern atconv")
    graft(tmp_path / "new", tmp_path / "newer", "--mixer-pattern conv")  # and that once more
    model = load_model(tmp_path / "newer")
    assert model.config.mixer_pattern == "conv" and model.config.num_classes == 10
    config = AlignmentConfig(block=1, projector_width=64, teachers=[TeacherConfig("test_vit", "random")])
    objective = Objective(model, FlowConfig(), config, (64,))
    begin_projectors(objective.projectors, config, str(tmp_path / "newer"))
    theirs = load_file(tmp_path / "old" / "projectors.safetensors")
    found = objective.projectors.state_dict()
    assert theirs.keys() == found.keys() and all(torch.equal(found[name], theirs[name]) for name in found)


def test_an_unconditional_network_takes_labelled_data(tmp_path: Path) -> None:
    trained(num_classes=0).save_pretrained(tmp_path / "teacher")
    graft(tmp_path / "teacher", tmp_path / "out")
    assert load_model(tmp_path / "out").num_classes == 0
