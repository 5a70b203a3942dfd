"""What is found out before anything runs."""

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from sit_atconv.errors import InputError
from sit_atconv.study import checks
from sit_atconv.study.__main__ import main
from sit_atconv.study.checks import check_plan
from sit_atconv.study.plan import read_plan
from sit_atconv.study.room import require_room

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = f"""
config: {CONFIGS / "quickstart.yaml"}
set: {{model.hidden_size: 16, model.depth: 2, model.num_heads: 2}}
rows: {{attention: {{model.name: SiT-S/4}}, atconv: {{model.name: SiT-ATConv-S/4}}}}
seeds: [0]
budgets: {{steps: 40, seconds: 3}}
sampling: {{num-samples: 20}}
scores: [{{reference: 'digits:heldout@16', features: pixels}}]
agreement: {{reference: 'digits:train@16', features: pixels}}
"""


def check(folder: Path, text: str = FILE) -> dict:
    (folder / "study.yaml").write_text(text)
    return check_plan(read_plan(folder / "study.yaml"))


def test_room_is_counted_from_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = check(tmp_path)
    assert set(needed) == {(row, budget) for row in ("attention", "atconv") for budget in ("steps", "seconds")}
    assert all(4 * 4 * 1000 < size < 4 * 4 * 100_000 for size in needed.values())

    usage = namedtuple("usage", "total used free")
    plan, total = read_plan(tmp_path / "study.yaml"), sum(needed.values())
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "there").write_bytes(bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, total - 100))
    require_room(plan, tmp_path, needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, total - 101))
    with pytest.raises(InputError, match="are free: make room"):
        require_room(plan, tmp_path, needed)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model.depth", "model.dept", "row attention: .*Unknown key 'model.dept': did you mean 'model.depth'"),
        ("SiT-ATConv-S/4", "SiT-ATConf-S/4", "row atconv: Unknown model 'SiT-ATConf-S/4': did you mean"),
        ("SiT-ATConv-S/4", "SiT-S/4", "The rows attention and atconv are equal in effect"),
        ("{model.name: SiT-ATConv-S/4}", "{model.name: SiT-S/4, model.mixer_pattern: [attention]}", "equal in effect"),
        ("model.depth: 2", "model.depth: 2, data.path: nowhere", "'nowhere' is not a prepared data set"),
        ("model.depth: 2", "model.depth: 2, model.init_from: nowhere", "nowhere is not a folder"),
        ("model.depth: 2", "model.depth: 2, evaluation.loss: true", "data.heldout"),
        ("model.depth: 2", "model.depth: 2, data.heldout: nowhere, evaluation.loss: true", "'nowhere' is not a prep"),
        ("num-samples: 20", "num-sample: 20", "sampling: unrecognized arguments: --num-sample 20"),
        ("num-samples: 20", "guidance: -1", "sampling: |guidance scale"),
        ("num-samples: 20", "shift: 2, solver: dopri5", "shift would do nothing"),
        ("num-samples: 20", "labels: '12'", "12"),
        ("num-samples: 20", "out: here", "sampling has out, which the study sets itself"),
        ("features: pixels}]", "feature: pixels}]", r"scores\[0\]: unrecognized arguments: --feature pixels"),
        ("features: pixels}]", "features: pixel}]", "Unknown features 'pixel'"),
        ("features: pixels}]", "weights: nowhere}]", "there is no file nowhere"),
        ("features: pixels}]", "steps: 3}]", "belong to sampling"),
        ("'digits:heldout@16'", "nowhere", "'nowhere' does not exist"),
        ("'digits:train@16', features: pixels", "'digits:train@16', feature: pixels", "did you mean 'features'"),
    ],
)
def test_what_a_program_would_refuse_is_refused_first(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FILE
    with pytest.raises(InputError, match=said) as caught:
        check(tmp_path, FILE.replace(old, new))
    assert "\n" not in str(caught.value)


def test_agreement_needs_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", arr_0=(np.arange(3072) % 256).astype(np.uint8).reshape(4, 16, 16, 3))
    with pytest.raises(InputError, match="has no labels"):
        check(tmp_path, FILE.replace("'digits:train@16'", str(tmp_path / "plain.npz")))
    with pytest.raises(InputError, match="the model is unconditional"):
        check(tmp_path, FILE.replace("model.depth: 2", "model.depth: 2, model.num_classes: 0"))


def test_programs_that_are_not_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    with pytest.raises(InputError, match=r"There is no train.py in .*pip install -e"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cell", "atconv/steps-7"], "Unknown cell 'atconv/steps-7': did you mean 'atconv/steps-0'"),
        (["--report"], "holds no study yet"),
        (["--parallel", "0"], "--parallel: '0' is not a whole number"),
        (["--report", "--print-jobs"], "not allowed with argument"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    (tmp_path / "study.yaml").write_text(FILE)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_jobs_are_command_lines_for_a_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "study.yaml").write_text(FILE)
    out = tmp_path / "out"
    main([str(tmp_path / "study.yaml"), "--out", str(out), "--print-jobs"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].endswith(f"-m sit_atconv.study {out}/study.yaml --out {out} --cell attention/steps-0")
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "study.yaml"]


def test_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")])
    assert "without a launcher" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((CONFIGS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_name_configurations_and_keys_that_there_are(path: Path) -> None:
    plan = read_plan(path)
    for row in plan.rows:
        assert checks._config(plan, row).model.name == {**plan.set, **plan.rows[row]}["model.name"]
