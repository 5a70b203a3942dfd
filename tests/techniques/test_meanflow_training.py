"""Training with Decoupled MeanFlow: the loss written out, precision, resuming, processes, and what is refused."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from sampling_fixtures import tiny_model
from torch import Tensor
from training_runs import (
    ALIGNED,
    NO_PREVIEW,
    assert_same_checkpoint,
    checkpoint_tensors,
    log_lines,
    losses,
    run_tiny,
    start_run,
    tiny_config,
)

import sample
from sit_atconv import SiT
from sit_atconv.config import Config, FlowConfig, config_keys
from sit_atconv.errors import InputError
from sit_atconv.flow.meanflow import times_from_normal
from sit_atconv.training.session.meanflow import require_mean_flow
from sit_atconv.training.session.objective import Draws, Objective, draw, draw_fields
from sit_atconv.training.trainer import Trainer

MEAN_FLOW = "--flow.objective meanflow"
RUN = f"{MEAN_FLOW} {NO_PREVIEW}"


def objective(extra: str = "", **options: object) -> Objective:
    """Of a small flow map whose weighting has random weights."""
    config = tiny_config(f"{MEAN_FLOW} {extra}").flow
    made = Objective(tiny_model(meanflow_blocks=1, **options), config, None)
    torch.nn.init.normal_(made.mean_flow.level.weight, std=0.05)
    return made


def batch(config: FlowConfig, count: int = 8) -> tuple[Tensor, Tensor, Draws, None]:
    latents = torch.randn(count, 1, 8, 6)
    return latents, torch.arange(count) % 3, draw(torch.arange(count), (1, 8, 6), config, 0), None


def in_fp64(inputs: tuple) -> tuple:
    latents, labels, draws, _ = inputs
    return latents.double(), labels, Draws(**{name: tensor.double() for name, tensor in vars(draws).items()}), None


def test_the_loss_is_its_definition_written_out() -> None:
    """Sample by sample, with differences in place of the forward-mode derivative."""
    made = objective("--flow.label_dropout 0.3", num_classes=3).double()
    given = in_fp64(batch(made.flow))
    latents, labels, draws, _ = given
    found = made(*given)
    model, level = made.model, made.mean_flow.level
    pairs = times_from_normal(draws.mean_flow_times)
    y = torch.where(draws.dropout < 0.3, 3, labels)
    assert (y == 3).any() and (y != 3).any() and (pairs[0] > 0.7).any() and (pairs[0] < 0.7).any()

    def features(t: Tensor) -> Tensor:
        angles = t * 10_000 ** -(torch.arange(64, dtype=torch.float64) / 64)
        return torch.cat([angles.cos(), angles.sin()])

    def half(i: int, t: Tensor, r: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted and the plain error of sample i."""
        x_t, v = (1 - t) * latents[i] + t * noise, noise - latents[i]

        def u(x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
            return model(x[None], t[None], y[None], r=r[None])[0]

        if t <= 0.7 and y[i] != 3:
            v = v + 0.6 * (u(x_t, t, t, y[i]) - u(x_t, t, t, torch.tensor(3)))
        h = 1e-5
        slope = (u(x_t + h * v, t + h, r, y[i]) - u(x_t - h * v, t - h, r, y[i])) / (2 * h)
        m = (u(x_t, t, r, y[i]) - (v - (t - r) * slope)).square().mean()
        expected = level.weight[0] @ torch.cat([features(t), features(r)]) + level.bias[0]
        return torch.log(m * torch.exp(-expected) + 0.01) + expected, m

    with torch.no_grad():
        flow = [half(i, draws.times[i], draws.times[i], draws.noise[i]) for i in range(8)]
        mean = [half(i, pairs[0][i], pairs[1][i], draws.mean_flow_noise[i]) for i in range(8)]
    weighted, plain = torch.tensor([flow, mean], dtype=torch.float64).mean(1).unbind(1)
    torch.testing.assert_close(found["loss"], weighted.mean(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.stack([found["flow"], found["mean_flow"]]), plain, rtol=1e-6, atol=1e-7)


def test_each_sample_has_its_own_weight() -> None:
    """A batch's loss is the mean of its samples' losses: nothing is broadcast over pairs of samples."""
    made = objective()
    latents, labels, draws, _ = batch(made.flow)
    whole = made(latents, labels, draws, None)["loss"]
    alone = []
    for i in range(8):
        one = Draws(**{name: tensor[i : i + 1] for name, tensor in vars(draws).items()})
        alone.append(made(latents[i : i + 1], labels[i : i + 1], one, None)["loss"])
    torch.testing.assert_close(whole, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)


def gradients(made: Objective, given: tuple) -> Tensor:
    made.zero_grad()
    made(*given)["loss"].backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []
    return torch.cat([p.grad.flatten() for p in made.parameters()])


@pytest.mark.parametrize("extra", ["", "--flow.meanflow.guidance 1"], ids=["guided", "plain"])
def test_bf16_reaches_all_weights_with_nearly_the_same_gradients(extra: str) -> None:
    made = objective(extra)
    given = batch(made.flow)
    exact = gradients(made, given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(made, given)
        assert made(*given)["loss"].dtype == torch.float32
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999


def test_guidance_is_learnt_within_its_interval_from_classes_alone() -> None:
    latents, labels, draws, _ = batch(objective().flow)
    early = Draws(**{**vars(draws), "times": torch.full((8,), 0.2)})
    found = {
        extra: objective(extra)(latents, labels, early, None)["flow"].item()
        for extra in ("", "--flow.meanflow.guidance 1", "--flow.meanflow.interval [0.3,1]")
    }
    guided, plain, elsewhere = found.values()
    assert plain == elsewhere != guided
    unconditional = objective(num_classes=0)
    assert unconditional(latents, labels, early, None)["flow"].item() > 0


def test_off_is_todays_program() -> None:
    config = tiny_config()
    assert sorted(draw_fields([3, 4], (1, 8, 6), config.flow, 0)) == ["dropout", "noise", "posterior_noise", "times"]
    on = draw(torch.tensor([3, 4]), (1, 8, 6), tiny_config(MEAN_FLOW).flow, 0)
    off = draw(torch.tensor([3, 4]), (1, 8, 6), config.flow, 0)
    for name, tensor in vars(off).items():
        assert tensor is None or tensor.equal(getattr(on, name))
    names = [name for name, _ in Objective(tiny_model(), config.flow, None).named_parameters()]
    assert names == [f"model.{name}" for name, _ in tiny_model().named_parameters()]
    written = yaml.safe_load(Config().to_yaml())["flow"]
    assert not {"objective", "meanflow"} & written.keys()
    assert "flow.meanflow.guidance" in config_keys() and "flow.meanflow.guidance" not in config_keys(every=False)
    some = yaml.safe_load(tiny_config(f"{MEAN_FLOW} --flow.meanflow.blocks 1").to_yaml())["flow"]
    assert some["objective"] == "meanflow" and some["meanflow"]["blocks"] == 1


def stop_before(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.position.step == number - 1:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize(
    "extra",
    ["--training.accumulation 2 --training.precision bf16", f"--data.workers 1 {ALIGNED}"],
    ids=["accumulation-bf16", "alignment-workers"],
)
def test_a_stopped_run_continued_equals_the_unbroken_run(tmp_path: Path, monkeypatch, extra: str) -> None:
    extra = f"{RUN} {extra} --log.checkpoint_every 2"
    run_tiny(tmp_path / "whole", extra)
    with monkeypatch.context() as patched:
        stop_before(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path / "parts", extra)
    run_tiny(tmp_path / "parts", extra)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("parts", "whole")))
    assert all("mean_flow" in line for line in log_lines(tmp_path / "whole") if "loss" in line)
    tensors = checkpoint_tensors(tmp_path / "whole" / "checkpoints" / "latest")
    assert tensors["weights.safetensors:mean_flow.level.bias"].any()  # the weighting has learnt, and is saved


def test_accumulation_equals_the_whole_batch_to_rounding(tmp_path: Path) -> None:
    for run, extra in (("whole", ""), ("parts", "--training.accumulation 4")):
        run_tiny(tmp_path / run, f"{RUN} {extra} --training.steps 3")
    for ours, theirs in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
        assert ours[4] == pytest.approx(theirs[4], rel=1e-4)


def become(rank: int, world: int, port: int) -> None:
    """Make this process one of many, as a launcher does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    extra = f"{RUN} --training.steps 3"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [f"{tmp_path / 'two'}-{rank}.stderr" for rank in (0, 1)]
    processes = [start_run(tmp_path / "two", extra, become, rank, 2, port, stderr=names[rank]) for rank in (0, 1)]
    for process in processes:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0], Path(names[0]).read_text()
    run_tiny(tmp_path / "one", extra)
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
        assert ours[4] == pytest.approx(theirs[4], rel=1e-4)


def test_it_begins_with_any_model_and_is_drawn_in_few_steps(tmp_path: Path, capsys) -> None:
    preview = "--preview.solver meanflow --preview.steps 2"
    run_tiny(tmp_path / "flow", f"{NO_PREVIEW} --training.steps 2 --flow.label_dropout 0.1")
    start = f"--model.init_from {tmp_path}/flow/checkpoints/latest/model"
    run_tiny(tmp_path / "map", f"{MEAN_FLOW} {preview} {start} --training.steps 1 --optimizer.lr 1e-9")
    plain, of_map = (SiT.from_pretrained(tmp_path / run / "checkpoints/latest/model") for run in ("flow", "map"))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(of_map.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert of_map.config.meanflow_blocks == 1  # of 2: 20 of 28
    assert (tmp_path / "map/samples/step-0000001.png").is_file()
    again = f"--model.init_from {tmp_path}/map/checkpoints/latest/model {RUN} --flow.meanflow.blocks 2"
    with pytest.raises(InputError, match=r"another network \(flow.meanflow.blocks: 1 there, 2 here\)"):
        run_tiny(tmp_path / "other", again)
    words = ["--num-samples", "4", "--solver", "meanflow", "--steps", "1", "--out", str(tmp_path / "drawn")]
    sample.main(["--checkpoint", str(tmp_path / "map/checkpoints/latest"), *words])
    settings = json.loads((tmp_path / "drawn/settings.json").read_text())
    assert (settings["solver"], settings["steps"]) == ("meanflow", 1)
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint", str(tmp_path / "flow/checkpoints/latest"), *words[:-1], str(tmp_path / "not")])
    assert "trained with flow.objective meanflow" in capsys.readouterr().err
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_split_weights_are_refused(kind: DistributedType) -> None:
    with pytest.raises(InputError, match=r"does not go with .*configs/accelerate/ddp.yaml"):
        require_mean_flow(tiny_config(MEAN_FLOW), SimpleNamespace(distributed_type=kind))
    require_mean_flow(tiny_config(), SimpleNamespace(distributed_type=kind))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (f"{MEAN_FLOW} --flow.interpolant cosine", "does not go with flow.interpolant cosine"),
        (f"{MEAN_FLOW} --flow.prediction noise", "does not go with flow.prediction noise"),
        (f"{MEAN_FLOW} --training.compile true", "does not go with training.compile: torch crashes"),
        (f"{MEAN_FLOW} --training.gradient_checkpointing mixers", "does not go with training.gradient_checkpointing"),
        (f"{MEAN_FLOW} --flow.meanflow.blocks 3", "flow.meanflow.blocks is 3, but the model has 2 blocks"),
        (f"{MEAN_FLOW} --flow.meanflow.interval [0.7,0.1]", "must be low <= high, not 0.7 0.1"),
        (f"{MEAN_FLOW} --flow.label_dropout 0", "guidance 2.5 needs a null class, and flow.label_dropout is 0"),
        (f"{MEAN_FLOW} --preview.solver meanflow --preview.guidance 2", "takes no guidance"),
        ("--flow.meanflow.guidance 2", "flow.meanflow does nothing here"),
        ("--preview.solver meanflow", "needs a model that was trained with flow.objective meanflow"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    tmp_path: Path, extra: str, message: str
) -> None:
    with pytest.raises(InputError) as raised:
        run_tiny(tmp_path / "run", extra)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
