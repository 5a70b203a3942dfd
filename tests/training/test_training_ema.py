"""Averages of the weights: their profiles exactly, and any width from snapshots."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import NO_PREVIEW, log_lines, run_tiny

from sit_atconv import SiT
from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.training import power_ema
from sit_atconv.training.averages.ema import ConstantDecay, PowerFunction, WeightAverages, exponent_of_width
from sit_atconv.training.averages.first_weights import longest_decay
from sit_atconv.training.averages.power_ema import combination, profile_product, reconstruct


def weights_by_step(profile, steps: int) -> np.ndarray:
    """How much the weights of step 1, …, n count in the average after step n."""
    counts = np.zeros(steps)
    for step in range(1, steps + 1):
        weight = profile.weight(step)
        counts *= 1 - weight
        counts[step - 1] += weight
    return counts


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25])
def test_the_power_function_has_the_width_asked_for(width: float) -> None:
    gamma = exponent_of_width(width)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(width, rel=1e-9)
    steps = 4000
    counts = weights_by_step(PowerFunction(width), steps)
    end = np.arange(steps + 1) / steps
    np.testing.assert_allclose(counts, np.diff(end ** (gamma + 1)), rtol=1e-6, atol=1e-12)  # the profile's integral
    middle = (np.arange(steps) + 0.5) / steps
    mean = counts @ middle
    assert (counts @ (middle - mean) ** 2) ** 0.5 == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.289, 1.0])
def test_other_widths_are_refused(width: float) -> None:
    with pytest.raises(InputError, match="relative width"):
        PowerFunction(width)


def test_products_of_profiles_are_their_integrals() -> None:
    time = (np.arange(200_000) + 0.5) / 200_000 * 8
    for (a, ta), (b, tb) in [((1.5, 8.0), (3.0, 8.0)), ((6.9, 5.0), (16.0, 8.0)), ((0.5, 3.0), (0.5, 2.0))]:
        p = (a + 1) * time**a / ta ** (a + 1) * (time <= ta)
        q = (b + 1) * time**b / tb ** (b + 1) * (time <= tb)
        assert profile_product(a, ta, b, tb) == pytest.approx(np.sum(p * q) * 8 / len(time), rel=1e-4)
    assert np.isfinite(profile_product(500.0, 1e6, 400.0, 9e5))


def test_a_stored_profile_is_its_own_reconstruction_and_others_are_near() -> None:
    stored = [(exponent_of_width(w), t) for t in range(100, 2001, 100) for w in (0.05, 0.1)]
    exponents, ends = zip(*stored, strict=True)
    np.testing.assert_allclose(combination(exponents, ends, exponent_of_width(0.1), 2000), np.eye(40)[39], atol=1e-6)
    bases = [weights_by_step(PowerFunction(w), t) for t in range(100, 2001, 100) for w in (0.05, 0.1)]
    profiles = np.stack([np.pad(base, (0, 2000 - len(base))) for base in bases])
    for width, error in ((0.07, 5e-3), (0.15, 2e-2)):
        wanted = weights_by_step(PowerFunction(width), 2000)
        made = combination(exponents, ends, exponent_of_width(width), 2000) @ profiles
        assert np.linalg.norm(made - wanted) < error * np.linalg.norm(wanted)
        assert made.sum() == pytest.approx(1, abs=1e-2)


def tiny_model() -> SiT:
    return create_model("SiT-ATConv-S/2", input_size=4, num_classes=0, hidden_size=8, depth=1, num_heads=1)


def test_averages_follow_their_formulas_and_rest_when_a_step_is_skipped() -> None:
    model, profiles = tiny_model(), [ConstantDecay(0.9), ConstantDecay(0.5), PowerFunction(0.1)]
    averages = WeightAverages(model, tiny_model(), profiles)
    expected = {p.name: {n: v.detach().double().clone() for n, v in model.named_parameters()} for p in profiles}
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averages.update(step, torch.tensor(step != 3))
        for profile in profiles:
            weight = profile.weight(step) * (step != 3)
            for name, parameter in model.named_parameters():
                old = expected[profile.name][name]
                expected[profile.name][name] = (1 - weight) * old + weight * parameter.detach().double()
    for name, tensors in expected.items():
        averaged = averages.model(name)
        assert not averaged.training
        for key, value in averaged.state_dict().items():
            torch.testing.assert_close(value.double(), tensors[key], rtol=1e-5, atol=1e-6)
    assert averages.main == "0.9"
    before = averages.model().patch_embed.weight
    assert before.data_ptr() == averages.model("0.9").patch_embed.weight.data_ptr()  # no copy is made


def test_any_width_is_reconstructed_from_a_run(tmp_path: Path) -> None:
    extra = f"--training.steps 40 --log.every 40 --log.checkpoint_every 40 {NO_PREVIEW} --log.keep null"
    run_tiny(tmp_path / "run", f"{extra} --training.power_ema [0.05,0.1] --training.power_ema_every 4")
    run_tiny(tmp_path / "direct", f"{extra} --training.power_ema [0.08]")
    folder = tmp_path / "run" / "ema"
    exact = SiT.from_pretrained(tmp_path / "run" / "checkpoints" / "latest" / "model-power-0.1").state_dict()
    for name, tensor in reconstruct(folder, 0.1).state_dict().items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-5, atol=1e-6)
    power_ema.main([str(tmp_path / "run"), str(tmp_path / "out"), "--width", "0.08"])
    made = SiT.from_pretrained(tmp_path / "out").state_dict()
    direct = SiT.from_pretrained(tmp_path / "direct" / "checkpoints" / "latest" / "model-power-0.08").state_dict()
    start = SiT.from_pretrained(folder.parent / "checkpoints" / "latest" / "model").state_dict()
    gap = sum((direct[n] - start[n]).square().sum() for n in direct) ** 0.5
    assert sum((made[n] - direct[n]).square().sum() for n in direct) ** 0.5 < 0.03 * gap
    with pytest.raises(InputError, match="no snapshots of step 5: there are"):
        reconstruct(folder, 0.1, step=5)
    with pytest.raises(InputError, match="there are none"):
        reconstruct(tmp_path, 0.1)


# --- the weights that a run began with


@pytest.mark.parametrize(
    "profile", [ConstantDecay(0.9), ConstantDecay(0.9999), PowerFunction(0.1), PowerFunction(0.28)]
)
@pytest.mark.parametrize(("step", "skipped"), [(0, 0), (1, 0), (1, 1), (40, 0), (40, 3)])
def test_the_share_of_the_first_weights_follows_from_the_update(profile, step: int, skipped: int) -> None:
    """The first steps are skipped here, as those of fp16 are."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    averages = WeightAverages(model, tiny_model(), [profile])
    torch.nn.init.zeros_(model.weight)
    for number in range(1, step + 1):
        averages.update(number, torch.tensor(number > skipped))
    ((_, average),) = averages.tensors(profile.name)
    assert averages.first_shares(step, skipped)[profile.name] == pytest.approx(average.item(), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 300, 46_050, 7_000_000])
def test_the_longest_decay_forgets_the_first_weights_in_time(steps: int) -> None:
    decay = longest_decay(steps)
    assert 0.0075 < decay**steps <= 0.01 or decay == pytest.approx(0.01, abs=1e-3)


def test_a_run_says_that_its_average_is_what_it_began_with(tmp_path: Path, caplog) -> None:
    narrow = "--preview.every 2 --preview.steps 1 --log.checkpoint_every 4"
    run_tiny(tmp_path / "long", f"{narrow} --training.ema_decay 0.9999 --training.more_ema_decays [0.001]")
    notes = [(line["step"], line["note"]) for line in log_lines(tmp_path / "long") if "note" in line]
    assert [step for step, _ in notes] == [2, 6]  # the first grid, and the end of the run
    for step, note in notes:
        assert (
            f"After step {step}, {100 * 0.9999**step:.3g} % of the average 0.9999 are still the random weights" in note
        )
        assert "A decay of 0.46 or less" in note and "--weights raw" in note and note in caplog.text
    run_tiny(tmp_path / "short", f"{narrow} --training.ema_decay 0.4")  # 0.16 and 0.004
    ((step, note),) = [(line["step"], line["note"]) for line in log_lines(tmp_path / "short") if "note" in line]
    assert step == 2 and "16 % of the average 0.4" in note and "By step 6 it is 1 % or less" in note

    grids = {
        name: [np.asarray(Image.open(tmp_path / name / "samples" / f"step-000000{step}.png")) for step in (2, 6)]
        for name in ("long", "short")
    }
    heights = {name: [grid.shape[0] for grid in pair] for name, pair in grids.items()}
    assert min(*heights["long"], heights["short"][0]) > heights["short"][1]
    text = grids["long"][1][heights["short"][1] :]
    assert text.min() < 100 and text.mean() > 200  # black on white


def test_a_fine_tuned_run_names_the_weights_it_began_with(tmp_path: Path) -> None:
    run_tiny(tmp_path / "base", f"--training.steps 1 {NO_PREVIEW}")
    model = tmp_path / "base" / "checkpoints" / "latest" / "model"
    run_tiny(tmp_path / "tuned", f"--training.steps 1 {NO_PREVIEW} --model.init_from {model}")
    assert any("the weights of model.init_from" in line.get("note", "") for line in log_lines(tmp_path / "tuned"))


@pytest.mark.parametrize("profile", [ConstantDecay(0.999), PowerFunction(0.2)], ids=lambda profile: profile.name)
def test_statistics_forget_that_they_began_as_one(profile):
    """After 100 steps a variance of 0.01 is known to a tenth, where an average with decay 0.999 would be 0.9."""
    network, twin = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    averages, random = WeightAverages(network, twin, [profile]), torch.Generator().manual_seed(0)
    for step in range(1, 101):
        network(0.1 * torch.randn(4, 2, 8, 8, generator=random))
        averages.update(step, torch.tensor(True))
    state = averages.model().state_dict()
    assert state["running_var"].tolist() == pytest.approx([0.01, 0.01], rel=0.1)
    assert state["num_batches_tracked"] == 100
    assert torch.equal(state["weight"], torch.ones(2))
