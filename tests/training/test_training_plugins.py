"""A mixer of a user's own file goes through everything: trained, resumed, counted, sampled, scored, opened."""

import json
import sys
from pathlib import Path

import pytest
from training_runs import NO_PREVIEW, assert_same_checkpoint, command_words, fresh_accelerate, number_lines

import evaluate_fid
import sample
import train
from sit_atconv import SiTPipeline
from sit_atconv.models.mixers import registry
from sit_atconv.training.watch import throughput

PAGE = Path(__file__).parents[2] / "docs" / "mixers.md"


@pytest.fixture
def own_mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that docs/mixers.md begins with, as my_mixers.py; what it registers is gone after the test."""
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "my_mixers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_mixers", raising=False)
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))


def train_own(run: Path, extra: str = "") -> None:
    fresh_accelerate()
    pattern = '["attention",{"name":"smooth","kernel_size":5}]'
    mixers = f"--model.plugins [my_mixers] --model.mixer_pattern {pattern}"
    train.main([*command_words(f"{NO_PREVIEW} {mixers} {extra}"), "--run", str(run)])


@pytest.mark.usefixtures("own_mixer")
def test_a_ten_line_mixer_goes_through_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: 1e12)  # a CPU has no MFU
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_own(whole)
    train_own(parts, "--training.steps 3")
    train_own(parts)
    assert_same_checkpoint(*(run / "checkpoints" / "latest" for run in (whole, parts)))
    assert all(line["mfu"] > 0 for line in number_lines(whole))

    model = whole / "checkpoints" / "latest" / "model"
    sample.main(f"--checkpoint {model} --out {tmp_path / 'samples'} --num-samples 12 --steps 2".split())
    scores, words = tmp_path / "scores.json", "--features pixels --reference digits:heldout@8 --num-samples 4 --steps 2"
    monkeypatch.setattr(sys, "argv", f"evaluate_fid.py --checkpoint {model} --json {scores} {words}".split())
    evaluate_fid.main()
    assert json.loads(scores.read_text())["metrics"]["fd_pixels"] > 0
    assert len(SiTPipeline.from_pretrained(model)(class_labels=[0, 1], num_inference_steps=2).images) == 2


@pytest.mark.usefixtures("own_mixer")
def test_what_a_user_does_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run", str(tmp_path / "run")]
    for words, message in (
        (["--model.mixer_pattern", "smooth"], "Unknown mixer 'smooth'"),
        (["--model.plugins", "[my_mixer]"], "The plugin my_mixer cannot be imported"),
        (["--model.plugins", "[my_mixers]", "--model.mixer_pattern", "[{name: smooth, size: 5}]"], "no option 'size'"),
        (["--model.mixer_pattern", "[{size: 5}]"], "is not a valid entry of mixer_pattern"),
    ):
        fresh_accelerate()
        with pytest.raises(SystemExit) as caught:
            train.main([*command_words(NO_PREVIEW), *words, *run])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
