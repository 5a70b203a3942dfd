"""Internal Guidance in training: its loss in the log, exact resumption, grids and scores, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from sampling_fixtures import PIXELS
from stopped_runs import require_same_when_stopped
from torch import Tensor, nn
from training_runs import log_lines, run_tiny

from sit_atconv import SiT, create_model
from sit_atconv.config import load_config
from sit_atconv.data.dataset import open_dataset
from sit_atconv.errors import InputError
from sit_atconv.sampling import SamplerSettings
from sit_atconv.training.session.finetune import begin_with
from sit_atconv.training.watch import evaluation, preview
from sit_atconv.training.watch.goals import described_guidance
from sit_atconv.training.watch.heldout_loss import HeldOutLoss


def test_the_heldout_loss_is_without_the_head() -> None:
    dataset, found = open_dataset("digits:heldout@8"), []
    for block in (None, 1):
        torch.manual_seed(0)
        model = create_model("SiT-S/2", 8, 1, 10, hidden_size=16, depth=2, num_heads=2, internal_block=block)
        for name, parameter in model.named_parameters():
            if not name.startswith("internal."):
                nn.init.normal_(parameter, std=0.1)
        found.append(HeldOutLoss(dataset, 64, PartialState()).scores(model.eval()))
    assert found[0] == found[1] and found[0]["heldout_loss"] > 0


HEADED = "--model.internal_block 1"


def test_a_stopped_run_in_bf16_by_micro_batches_continues_to_the_last_bit(tmp_path: Path, monkeypatch) -> None:
    terms = require_same_when_stopped(
        tmp_path, monkeypatch, f"{HEADED} --training.accumulation 2 --training.precision bf16"
    )
    for line in terms:
        assert line["loss"] == pytest.approx(line["flow"] + 0.5 * line["internal"], rel=1e-6)
    assert terms[0]["internal"] == pytest.approx(terms[0]["flow"])  # both predict zero
    assert terms[-1]["internal"] != terms[-1]["flow"]


def test_accumulation_is_the_full_batch_and_the_first_step_that_of_a_run_without(tmp_path: Path) -> None:
    extra = "--preview.every null --training.steps 3"
    runs = {"full": HEADED, "parts": f"{HEADED} --training.accumulation 4", "plain": ""}
    for name, more in runs.items():
        run_tiny(tmp_path / name, f"{extra} {more}")
    lines = {name: [line for line in log_lines(tmp_path / name) if "loss" in line] for name in runs}
    for full, parts in zip(lines["full"], lines["parts"], strict=True):
        for key in ("loss", "flow", "internal", "grad_norm"):
            assert full[key] == pytest.approx(parts[key], rel=1e-4)
    assert lines["plain"][0]["flow"] == lines["full"][0]["flow"]  # the same initial weights and draws
    assert "internal" not in lines["plain"][0]
    assert "internal" not in (tmp_path / "plain" / "config.yaml").read_text()


def test_grids_and_scores_during_training_are_guided_so(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    for module in (preview, evaluation):
        draws = module.generate
        noted = partial(lambda draws, *given, **options: drawn.append(given[3]) or draws(*given, **options), draws)
        monkeypatch.setattr(module, "generate", noted)
    guided = "--preview.internal_guidance 2.0 --preview.internal_interval [0.2,1.0]"
    scored = "--evaluation.reference digits:heldout@8 --evaluation.features pixels --evaluation.steps 1"
    scored += " --evaluation.samples 8 --evaluation.every 6 --evaluation.internal_guidance 3.0"
    scored += ' --evaluation.goals {"fd_pixels":1000000}'
    run_tiny(tmp_path / "run", f"{HEADED} {guided} {scored} --optimizer.lr 1e-2")
    assert load_config(tmp_path / "run" / "config.yaml").preview.internal_interval == (0.2, 1.0)
    assert drawn == [
        SamplerSettings("heun", 2, internal_guidance=2.0, internal_interval=(0.2, 1.0)),
        SamplerSettings("heun", 1, internal_guidance=3.0),
    ]
    notes = " ".join(line.get("note", "") for line in log_lines(tmp_path / "run"))
    assert "of samples with internal guidance 3 (published" in notes


def test_guidance_in_words() -> None:
    assert described_guidance(1.0, 1.0) == ""
    assert described_guidance(1.5, 1.9) == "guidance 1.5 and internal guidance 1.9"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--model.internal_block 2", "block before the last of the 2"),
        ("--flow.internal_weight 0.3", "internal_weight would do nothing"),
        ("--preview.internal_guidance 1.5", "needs a second head"),
        (f"{HEADED} --preview.internal_interval [0.0,0.5]", "internal_interval would do nothing"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused_before_anything_is_written(
    extra: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_tiny(tmp_path / "run", extra)
    assert not list(tmp_path.glob("run/*.*"))


def test_finetuning_takes_the_head_of_the_same_block_and_begins_another_anew(tmp_path: Path) -> None:
    options = {"depth": 3, "hidden_size": 16, "num_heads": 2, "num_classes": 2, "latents": PIXELS.to_dict()}

    def model(block: int | None, filled: Callable[[Tensor], object] = nn.init.zeros_) -> SiT:
        made = create_model("SiT-S/2", 8, 1, **{**options, "internal_block": block})
        for parameter in made.parameters():
            filled(parameter)
        return made

    model(1, lambda p: nn.init.constant_(p, 0.25)).save_pretrained(tmp_path / "source")
    for block in (1, 2, None):
        begun = model(block)
        begin_with(begun, str(tmp_path / "source"))
        assert (begun.final.proj.weight == 0.25).all()
        if block:
            assert (begun.internal.proj.weight == (0.25 if block == 1 else 0)).all()
