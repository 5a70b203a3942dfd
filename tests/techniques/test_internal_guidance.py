"""Internal Guidance (arXiv 2512.24176): the head, its loss, and sampling away from it in every solver."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sampling_fixtures import images_of, tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_runs import QUICKSTART, tiny_config

import sample
from sit_atconv import SiT, SiTPipeline, create_model
from sit_atconv.config import FlowConfig, load_config
from sit_atconv.data.dataset import open_dataset
from sit_atconv.errors import InputError
from sit_atconv.flow import guided_velocity, integrate_ode, internally_guided
from sit_atconv.flow.field import at_step, switch_times
from sit_atconv.models.checkpoint import load_model
from sit_atconv.models.flops import training_flops
from sit_atconv.sampling import SamplerSettings, sample_to_directory
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.likelihood import score_likelihood
from sit_atconv.study.table.calls import Calls, count_calls
from sit_atconv.study.table.command import main as make_table
from sit_atconv.training.session.objective import Objective, draw

SMALL = {"input_size": 4, "num_classes": 2, "hidden_size": 16, "depth": 3, "num_heads": 2}
ONE_CLASS = torch.zeros(3, dtype=torch.int64)


def guidable(**options: object) -> SiT:
    return tiny_model(internal_block=1, **options)


class Head(SiT):
    """A model of its own that predicts what the head does."""

    def forward(self, *inputs: Tensor, internal: bool = False) -> Tensor:
        return super().forward(*inputs, internal=True)[1]


def head_of(model: SiT) -> Head:
    weak = Head.from_config(model.config)
    weak.load_state_dict(model.state_dict())
    return weak.eval()


def test_the_loss_is_that_of_both_predictions_and_trains_the_blocks_before_the_head() -> None:
    model = create_model("SiT-S/2", **SMALL, internal_block=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    flow = FlowConfig(label_dropout=0.0, internal_weight=0.3)
    latents, labels, draws = torch.randn(3, 4, 4, 4), torch.tensor([0, 1, 1]), draw(torch.arange(3), (4, 4, 4), flow, 0)
    terms = Objective(model, flow, None)(latents, labels, draws, [])

    time = draws.times.view(3, 1, 1, 1)
    x_t, target = (1 - time) * latents + time * draws.noise, draws.noise - latents
    velocity, tokens = model.forward_intermediates(x_t, draws.times, labels, [2])
    shift, scale = model.internal.modulation(F.silu(model.condition(draws.times, labels))).chunk(2, dim=1)
    normed = F.layer_norm(tokens[2], (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    internal = model.unpatchify(model.internal.proj(normed), (2, 2))
    errors = (velocity - target).square().mean(), (internal - target).square().mean()
    torch.testing.assert_close(terms["flow"], errors[0])
    torch.testing.assert_close(terms["internal"], errors[1])
    torch.testing.assert_close(terms["loss"], errors[0] + 0.3 * errors[1])
    weights = [*model.blocks.parameters(), *model.internal.parameters()]
    found, expected = (torch.autograd.grad(loss, weights) for loss in (terms["loss"], errors[0] + 0.3 * errors[1]))
    torch.testing.assert_close(found, expected)


def test_the_head_is_as_large_as_the_papers_begins_as_zero_and_changes_nothing_else() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in create_model("SiT-XL/2", internal_block=k).parameters()) for k in (None, 8)]
    assert sizes[1] - sizes[0] == 2_674_960
    built = []
    for block in (None, 2):
        torch.manual_seed(3)
        built.append((create_model("SiT-Hybrid-S/2", **SMALL, internal_block=block), torch.rand(1)))
    (plain, drawn), (headed, drawn_with_head) = built
    assert drawn == drawn_with_head
    assert headed.state_dict().keys() - plain.state_dict().keys() == {
        f"internal.{part}.{kind}" for part in ("modulation", "proj") for kind in ("weight", "bias")
    }
    assert all(torch.equal(tensor, headed.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert not any(parameter.any() for parameter in headed.internal.parameters())
    assert "internal_block" not in json.loads(plain.to_json_string())
    assert json.loads(headed.to_json_string())["internal_block"] == 2
    counted = []
    for internal in (False, True):
        with FlopCounterMode(display=False) as counter:
            headed(torch.randn(1, 4, 4, 4), torch.rand(1), torch.tensor([0]), internal=internal)
        counted.append(counter.get_total_flops())
    shape = (4, 4, 4)
    assert training_flops(headed, shape) - training_flops(plain, shape) == 3 * (counted[1] - counted[0]) > 0


def test_a_saved_model_has_its_head(tmp_path: Path) -> None:
    model = guidable()
    model.save_pretrained(tmp_path)
    inputs = torch.randn(2, 1, 8, 6), torch.rand(2), torch.tensor([0, 2])
    for mine, opened in zip(model(*inputs, internal=True), load_model(tmp_path)(*inputs, internal=True), strict=True):
        assert torch.equal(mine, opened)
    assert torch.equal(model(*inputs, internal=True)[0], model(*inputs))


def test_the_combined_field_of_two_rates_is_known_in_closed_form() -> None:
    """The model shrinks at rate 1, the head at 2: w = 3 gives 2 + 3·(1 − 2) = −1, and above t = 0.6 the model's own."""
    velocity = internally_guided(lambda x, t: x, lambda x, t: (x, 2 * x), 3.0)
    x = integrate_ode(velocity, torch.ones(1, 1).double(), method="dopri5", atol=1e-10, rtol=1e-10)
    assert x.item() == pytest.approx(math.e, rel=1e-9)
    velocity = internally_guided(lambda x, t: x, lambda x, t: (x, 2 * x), 3.0, (0.0, 0.6))
    x = integrate_ode(velocity, torch.ones(1, 1).double(), method="dopri5", atol=1e-10, rtol=1e-10)
    assert x.item() == pytest.approx(math.exp(-0.4 + 0.6), rel=1e-9)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("auto", [False, True])
def test_each_guidance_has_its_interval_and_both_halves_are_guided_internally(guidance: float, auto: bool) -> None:
    model, x, labels, w = guidable().double(), torch.randn(3, 1, 8, 6).double(), torch.tensor([0, 1, 1]), 2.5
    weak = tiny_model(label_dropout=0.0).double() if auto and guidance != 1 else None
    settings = SamplerSettings(
        guidance=guidance,
        interval=(0.0, 0.5) if guidance != 1 else (0.0, 1.0),
        internal_guidance=w,
        internal_interval=(0.3, 0.8),
    )
    field = Drawing(model, settings, weak).velocity(labels, x.device)
    for time in (0.1, 0.4, 0.6, 0.9):
        t = torch.tensor(time).double()

        def velocity(y: Tensor, t: Tensor = t, time: float = time) -> Tensor:
            end, internal = model(x, t.expand(3), y, internal=True)
            return internal + w * (end - internal) if 0.3 <= time <= 0.8 else end

        expected = velocity(labels)
        if guidance != 1 and time <= 0.5:
            base = velocity(torch.full((3,), 3)) if weak is None else weak(x, t.expand(3), labels)
            expected = base + guidance * (expected - base)
        torch.testing.assert_close(at_step(field, time)(x, t), expected)
        torch.testing.assert_close(field(x, t), expected)
    intervals = {0.3, 0.8} | ({0.0, 0.5} if guidance != 1 else set())
    assert set(switch_times(field)) == intervals


SETTINGS = [
    SamplerSettings("euler", 3),
    SamplerSettings("heun", 3),
    SamplerSettings("midpoint", 2, shift=2.0),
    SamplerSettings("dopri5", atol=1e-3, rtol=1e-2),
    SamplerSettings("sde", 4),
    SamplerSettings("sde-heun", 3, precision="bf16"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.solver)
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_every_solver_guides_as_by_a_weak_model_that_ends_with_the_head(
    settings: SamplerSettings, prediction: str
) -> None:
    model, interval = guidable(prediction=prediction), (0.2, 0.7)
    ours = Drawing(model, replace(settings, internal_guidance=1.8, internal_interval=interval))
    theirs = Drawing(model, replace(settings, guidance=1.8, interval=interval), head_of(model))
    with torch.no_grad():
        one, other = (drawing.latents([0, 1, 2], ONE_CLASS, 0) for drawing in (ours, theirs))
        unguided = Drawing(model, settings).latents([0, 1, 2], ONE_CLASS, 0)
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, unguided, atol=1e-3)


def test_scale_one_is_the_model_without_its_head_bit_for_bit() -> None:
    model, plain = guidable(), tiny_model()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("internal.")})
    calls: list[int] = []
    model.internal.register_forward_hook(lambda *_: calls.append(1))
    settings = SamplerSettings("heun", 3, guidance=1.5)
    assert (images_of(model, [0, 1], settings) == images_of(plain, [0, 1], settings)).all()
    assert calls == []
    images_of(model, [0, 1], replace(settings, guidance=1.0, internal_guidance=1.5, internal_interval=(0.5, 1.0)))
    assert len(calls) == 4  # of the steps from 1 and 2/3; the one from 1/3 calls the network without the head


def test_one_call_of_the_network_gives_both() -> None:
    model, seen = guidable(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    Drawing(model, SamplerSettings("euler", 5, internal_guidance=2.0)).latents([0], ONE_CLASS[:1], 0)
    assert seen == [1] * 5
    assert count_calls(model, SamplerSettings("euler", 5, internal_guidance=2.0)) == Calls(5, 0)
    assert count_calls(model, SamplerSettings("euler", 5, 2.0, (0, 0.5), internal_guidance=2.0)) == Calls(5, 2)


def test_half_precision_networks_are_combined_in_the_states_precision() -> None:
    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.full_like(x, value, dtype=torch.bfloat16) for value in (1 / 3, 0.336))

    end, internal = (value.double() for value in pair(torch.zeros(1, 1), None))
    found = internally_guided(lambda x, t: x, pair, 7.3)(torch.zeros(1, 1), torch.tensor(0.5))
    torch.testing.assert_close(found.double(), internal + 7.3 * (end - internal), rtol=1e-6, atol=0)


def test_the_pipeline_guides_so_and_its_card_says_that_it_can(tmp_path: Path) -> None:
    pipe = SiTPipeline(guidable())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 6)
    settings = {"num_inference_steps": 3, "latents": noise, "output_type": "latent", "guidance_scale": 1.5}
    found = pipe([0, 2], internal_guidance=2.0, internal_interval=(0.2, 0.9), **settings).images
    chosen = SamplerSettings("heun", 3, 1.5, internal_guidance=2.0, internal_interval=(0.2, 0.9))
    with torch.no_grad():
        assert torch.equal(found, Drawing(pipe.transformer, chosen).integrate(noise, torch.tensor([0, 2])))
    pipe.save_pretrained(tmp_path / "pipe")
    assert "second head after block 1 serves Internal Guidance" in (tmp_path / "pipe" / "README.md").read_text()
    opened = SiTPipeline.from_pretrained(tmp_path / "pipe")
    opened.set_progress_bar_config(disable=True)
    again = opened([0, 2], internal_guidance=2.0, internal_interval=(0.2, 0.9), **settings).images
    torch.testing.assert_close(again, found)
    with pytest.raises(InputError, match="needs a second head"):
        SiTPipeline(tiny_model())([0], internal_guidance=2.0)


def test_sample_py_notes_it_continues_with_it_and_refuses_another(tmp_path: Path, capsys, monkeypatch) -> None:
    guidable().save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "plain")
    drawn = ["--num-samples", "6", "--batch-size", "2", "--solver", "euler", "--steps", "3"]
    words = ["--checkpoint", str(tmp_path / "model"), *drawn, "--internal-guidance", "1.9"]
    words += ["--internal-interval", "0.3", "1"]
    sample.main([*words, "--out", str(tmp_path / "whole")])
    settings = json.loads((tmp_path / "whole" / "settings.json").read_text())
    assert (settings["internal_guidance"], settings["internal_interval"]) == (1.9, [0.3, 1.0])

    batches = sample_to_directory.__globals__["generate"]

    def two(*arguments: object, **options: object) -> object:
        for number, batch in enumerate(batches(*arguments, **options)):
            yield batch
            if number == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(sample_to_directory.__globals__, "generate", two)
        with pytest.raises(SystemExit, match="130"):
            sample.main([*words, "--out", str(tmp_path / "parts")])
    sample.main([*words, "--out", str(tmp_path / "parts")])
    with np.load(tmp_path / "whole" / "samples.npz") as one, np.load(tmp_path / "parts" / "samples.npz") as other:
        assert (one["arr_0"] == other["arr_0"]).all()

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            sample.main(list(words))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    capsys.readouterr()
    changed = ["--checkpoint", str(tmp_path / "model"), *drawn, "--out", str(tmp_path / "whole")]
    assert "internal_guidance: 1.9 -> None" in refused(*changed)
    plain = ["--checkpoint", str(tmp_path / "plain"), *drawn, "--out", str(tmp_path / "none")]
    assert "needs a second head" in refused(*plain, "--internal-guidance", "1.9")
    assert "internal_interval would do nothing" in refused(*plain, "--internal-interval", "0", "0.5")
    assert "internal guidance scale must be" in refused(*plain, "--internal-guidance", "-1")
    assert "internal guidance interval must" in refused(*changed[:-1], "x", *words[-5:-2], "1", "0.5")
    assert not (tmp_path / "none").exists()
    sample.main(plain)
    assert not [key for key in json.loads((tmp_path / "none" / "settings.json").read_text()) if "internal" in key]


def test_a_table_has_guided_rows_of_the_models_with_a_head(tmp_path: Path) -> None:
    guidable().save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "plain")
    np.savez(tmp_path / "r.npz", arr_0=np.random.default_rng(0).integers(0, 256, (30, 8, 6, 3), dtype=np.uint8))
    words = [str(tmp_path / name) for name in ("model", "plain")]
    words += ["--out", str(tmp_path / "out"), "--reference", str(tmp_path / "r.npz"), "--features", "pixels"]
    words += ["--device", "cpu", "--workers", "0", "--bootstrap", "0", "--num-samples", "6", "--solver", "euler"]
    make_table([*words, "--steps", "2", "--internal-guidance", "1.9"])
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["run"], row["guidance"]) for row in table["rows"]] == [
        *[("model", "unguided")] * 2,
        *[("model", "guided")] * 2,
        *[("plain", "unguided")] * 2,
    ]
    said = {note["about"]: note["text"] for note in table["notes"]}
    assert "second head, scale 1.9 at all times" in said["guidance"]
    assert "no second head" in said["plain"]
    assert table["drawing"]["guided"]["internal_guidance"] == 1.9
    assert "internal_guidance" not in table["drawing"]["unguided"]


def test_a_likelihood_is_refused_for_a_guided_field() -> None:
    settings, dataset = SamplerSettings(internal_guidance=2.0), open_dataset("digits:heldout@8")
    with pytest.raises(InputError, match="does not describe a learnt density"):
        next(score_likelihood(guidable(), dataset, settings, rows=[0]))


def test_the_quickstart_and_its_model_are_those_without() -> None:
    config = tiny_config()
    assert config.model.internal_block is None and config.flow == load_config(QUICKSTART).flow
    assert "internal" not in config.to_yaml() and "dispersion" not in config.to_yaml()
    assert "internal_guidance" not in SamplerSettings().to_dict()
    assert guided_velocity(lambda x, t: x, None, null_label=None)(torch.ones(1), torch.ones(())) == 1
