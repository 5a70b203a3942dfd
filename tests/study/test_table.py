"""`evaluate_fid.py table`: what it draws and scores once, how it goes on, and what it refuses before any work."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_fixtures import tiny_model

from sit_atconv.evaluation import evaluate
from sit_atconv.sampling import SamplerSettings, sample_to_directory
from sit_atconv.sampling.draw import Drawing
from sit_atconv.study.table import command, scoring
from sit_atconv.study.table.calls import Calls, count_calls

DRAWING = ["--num-samples", "12", "--solver", "euler", "--steps", "4", "--seed", "3"]
SCORING = ["--features", "pixels", "--device", "cpu", "--workers", "0", "--bootstrap", "3"]
FOUR = [
    ("unguided", "random"),
    ("unguided", "balanced"),
    ("guided", "random"),
    ("guided", "balanced"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models and a reference of the size of their images."""
    folder = tmp_path_factory.mktemp("table")
    tiny_model().save_pretrained(folder / "model")
    tiny_model(num_classes=0).save_pretrained(folder / "free")
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 6, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    return folder


def words(place: Path, out: Path, *more: str, run: str = "model") -> list[str]:
    reference = ["--reference", str(place / "reference.npz")]
    return [str(place / run), "--out", str(out), *reference, *DRAWING, *SCORING, *more]


def written(out: Path) -> dict:
    return json.loads((out / "table.json").read_text())


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory) -> Path:
    """A finished table."""
    out = tmp_path_factory.mktemp("made") / "out"
    command.main(words(place, out, "--guidance", "1.8", "--interval", "0", "0.6"))
    return out


def refused(capsys, *arguments: str) -> str:
    """The paragraph on standard error of a command that must end with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main(list(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_the_four_sets_are_those_of_sample_py(place: Path, made: Path, tmp_path: Path) -> None:
    plain = SamplerSettings("euler", 4)
    guided = SamplerSettings("euler", 4, guidance=1.8, interval=(0.0, 0.6))
    for guidance, labels in FOUR:
        out = tmp_path / f"{guidance}-{labels}"
        settings = guided if guidance == "guided" else plain
        sample_to_directory(place / "model", out, 12, settings, labels=labels, seed=3)
        with np.load(out / "samples.npz") as alone, np.load(made / "model" / out.name / "samples.npz") as drawn:
            assert np.array_equal(alone["arr_0"], drawn["arr_0"])
            assert np.array_equal(alone["arr_1"], drawn["arr_1"])


def test_the_numbers_are_those_of_the_scores_and_complete(made: Path) -> None:
    found = written(made)
    assert [(row["guidance"], row["labels"]) for row in found["rows"]] == FOUR
    assert list(found["columns"]) == ["fd_pixels", "precision_pixels", "recall_pixels"]
    markdown, tex = ((made / name).read_text() for name in ("table.md", "table.tex"))
    for row in found["rows"]:
        scores = json.loads((made / row["folder"] / "scores.json").read_text())
        assert (row["metrics"], row["intervals"]) == (scores["metrics"], scores["intervals"])
        low, high = (row["intervals"]["fd_pixels"][bound] for bound in ("low", "high"))
        assert low < high
        for text in (f"{row['metrics']['fd_pixels']:.2f}", f"{low:.2f}, {high:.2f}"):
            assert text in markdown and text in tex
    assert len({row["metrics"]["fd_pixels"] for row in found["rows"]}) == 4
    run = found["runs"]["model"]
    # The times of the steps are 1, 0.75, 0.5 and 0.25: two of them lie in the interval.
    assert run["calls"] == {
        "unguided": {"evaluations": 4, "guided": 0, "total": 4},
        "guided": {"evaluations": 4, "guided": 2, "total": 6},
    }
    about = {note["about"]: note["text"] for note in found["notes"]}
    assert run["sha256"]["checkpoint"]["diffusion_pytorch_model.safetensors"][:8] in about["model"]
    assert "scale 1.8 at times from 0 to 0.6" in about["guidance"] and "seed 3" in about["samples"]
    assert found["rows"][0]["reference"]["images_sha256"][:8] in about["reference"]
    assert "95 % of 3 bootstrap resamples" in about["intervals"]


def test_latex_compiles(made: Path, tmp_path: Path) -> None:
    document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{table.tex}\end{document}"
    (tmp_path / "paper.tex").write_text(document)
    (tmp_path / "table.tex").write_bytes((made / "table.tex").read_bytes())
    try:
        told = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(told, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs pdflatex")
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_same_command_draws_and_scores_nothing_again(place: Path, made: Path, monkeypatch) -> None:
    before = written(made)
    monkeypatch.setattr("sit_atconv.sampling.run.generate", lambda *_, **__: pytest.fail("drawn again"))
    monkeypatch.setattr("sit_atconv.study.table.scoring.evaluate", lambda *_: pytest.fail("scored again"))
    (made / "table.json").unlink()
    command.main(words(place, made, "--guidance", "1.8", "--interval", "0", "0.6"))
    assert written(made) == before


def test_what_is_missing_or_belongs_to_other_samples_is_made_again(place: Path, tmp_path: Path, monkeypatch) -> None:
    arguments = words(place, tmp_path / "out", "--guidance", "1.8")
    command.main(arguments)
    before = written(tmp_path / "out")
    folders = [tmp_path / "out" / row["folder"] for row in before["rows"]]
    (folders[0] / "scores.json").unlink()
    other = json.loads((folders[1] / "scores.json").read_text())
    other["samples"]["images_sha256"], other["metrics"]["fd_pixels"] = "0" * 64, -1.0
    (folders[1] / "scores.json").write_text(json.dumps(other))
    other = json.loads((folders[2] / "scores.json").read_text())
    other["settings"]["bootstrap"], other["metrics"]["fd_pixels"] = 7, -1.0
    (folders[2] / "scores.json").write_text(json.dumps(other))
    scored = []
    monkeypatch.setattr(scoring, "evaluate", lambda *given: scored.append(given[0]) or evaluate(*given))
    command.main(arguments)
    assert scored == [str(folder / "samples.npz") for folder in folders[:3]]
    assert [row["metrics"] for row in written(tmp_path / "out")["rows"]] == [row["metrics"] for row in before["rows"]]


def test_a_model_may_be_added_and_an_unconditional_one_has_one_row(place: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    shutil.copytree(made, out)
    added = words(place, out, "--guidance", "1.8", "--interval", "0", "0.6")
    command.main([f"{place / 'model'}", f"second={place / 'free'}", *added[1:]])
    rows = written(out)["rows"]
    assert [(row["run"], row["guidance"], row["labels"]) for row in rows] == [
        *(("model", *each) for each in FOUR),
        ("second", "unguided", None),
    ]
    assert "It has no guided rows" in next(n["text"] for n in written(out)["notes"] if n["about"] == "second")
    command.main(words(place, tmp_path / "alone", run="free"))
    assert written(tmp_path / "alone")["rows"][0]["metrics"] == rows[-1]["metrics"]
    with np.load(tmp_path / "alone" / "free" / "unguided" / "samples.npz") as file:
        assert "arr_1" not in file


def test_a_weak_model_guides_an_unconditional_one(place: Path, tmp_path: Path) -> None:
    weak = ["--guidance", "2", "--weak-checkpoint", str(place / "free")]
    command.main(words(place, tmp_path / "out", *weak, run="free"))
    found = written(tmp_path / "out")
    assert [row["folder"] for row in found["rows"]] == ["free/unguided", "free/guided"]
    assert found["runs"]["free"]["calls"]["guided"] == {"evaluations": 4, "guided": 4, "total": 8}
    assert found["runs"]["free"]["sha256"]["weak_checkpoint"] == found["runs"]["free"]["sha256"]["checkpoint"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SamplerSettings("heun", 5), Calls(9, 0)),
        (SamplerSettings("heun", 5, guidance=2.0), Calls(9, 9)),
        (SamplerSettings("heun", 5, guidance=2.0, interval=(0.0, 0.5)), Calls(9, 3)),  # steps from 0.4 and, Euler, 0.2
        (SamplerSettings("midpoint", 5), Calls(10, 0)),
        (SamplerSettings("adams2", 5), Calls(6, 0)),
        (SamplerSettings("adams4", 5, guidance=2.0), Calls(9, 9)),
        (SamplerSettings("sde", 7), Calls(7, 0)),
        (SamplerSettings("sde-heun", 7), Calls(13, 0)),
        (SamplerSettings("dopri5"), None),
    ],
)
def test_calls_are_counted(settings: SamplerSettings, expected: Calls | None) -> None:
    assert count_calls(tiny_model(), settings) == expected


def test_counted_calls_are_the_networks_own() -> None:
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    settings = SamplerSettings("heun", 6, guidance=1.5, interval=(0.2, 0.7))
    counted = count_calls(model, settings)
    assert seen == []
    Drawing(model, settings).latents([0], torch.zeros(1, dtype=torch.int64), 0)
    assert (len(seen), sum(seen)) == (counted.evaluations, counted.total)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "--guidance SCALE"),
        (["--guidance", "1"], "--guidance 1 is no guidance"),
        (["--interval", "0", "0.5"], "interval would do nothing without guidance"),
        (["--guidance", "2", "--labels", "random"], "--labels: the table has rows for"),
        (["--guidance", "2", "--metrics", "fid"], "fid is of the features inception"),
        (["--guidance", "2", "--reference", "nowhere.npz"], "nowhere.npz"),
        (["--guidance", "2", "--num-samples", "1"], "--num-samples must be at least 2"),
        (["--guidance", "2", "--bootstrap", "1"], "at least two resamples"),
        (["--weak-checkpoint", "x"], "--weak-checkpoint is a model to guide away from"),
        (["--guidance", "2", "--checkpoint-weights", "raw"], "there are no weights 'raw' beside it"),
    ],
)
def test_wrong_use_is_refused_before_any_work(place: Path, tmp_path: Path, capsys, more: list, expected: str) -> None:
    assert expected in refused(capsys, *words(place, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_wrong_runs_are_refused(place: Path, tmp_path: Path, capsys) -> None:
    rest = words(place, tmp_path / "out", "--guidance", "2")[1:]
    assert "There is no RUN nowhere" in refused(capsys, "nowhere", *rest)
    assert "Two RUNs have the name Model" in refused(capsys, str(place / "model"), f"Model={place / 'free'}", *rest)
    assert "'table.md' cannot name" in refused(capsys, f"table.md={place / 'model'}", *rest)
    assert "'..' cannot name" in refused(capsys, f"..={place / 'model'}", *rest)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in refused(capsys, str(tmp_path / "run"), *rest)
    assert "None of these models can be guided" in refused(capsys, str(place / "free"), *rest)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(place: Path, made: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("")
    assert "holds no table" in refused(capsys, *words(place, tmp_path / "letters", "--guidance", "1.8"))
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    said = refused(capsys, *words(place, made, "--guidance", "1.9", "--interval", "0", "0.6"))
    assert "drawing.guided.guidance: 1.8 -> 1.9" in said and "in another way" not in said
    said = refused(capsys, *words(place, made, "--guidance", "1.8", "--interval", "0", "0.6", "--kid"))
    assert "scoring.kid: False -> True" in said and "table-settings.json first" in said
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before
    (tmp_path / "runs" / "model" / "checkpoints").mkdir(parents=True)
    assert "holds no table" in refused(capsys, *words(place, tmp_path / "runs", "--guidance", "1.8"))


def test_the_same_samples_can_be_scored_anew(place: Path, made: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "anew"
    shutil.copytree(made, out)
    (out / "table-settings.json").unlink()
    monkeypatch.setattr("sit_atconv.sampling.run.generate", lambda *_, **__: pytest.fail("drawn again"))
    command.main(words(place, out, "--guidance", "1.8", "--interval", "0", "0.6", "--kid"))
    before, after = written(made), written(out)
    assert list(after["columns"]) == [*before["columns"], "kid_pixels"]
    for old, new in zip(before["rows"], after["rows"], strict=True):
        assert new["metrics"]["fd_pixels"] == pytest.approx(old["metrics"]["fd_pixels"], rel=1e-12)
        assert new["samples"]["images_sha256"] == old["samples"]["images_sha256"]


def test_what_mind_and_fdr_are_measured_by_stands_under_the_table(place: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", ["--metrics", "mind", "fdr", "--fdr-divisors", "own", "--bootstrap", "0"]
    command.main(words(place, out, "--guidance", "1.8", *more))
    found = written(out)
    assert list(found["columns"]) == ["mind@12_pixels", "fdr_own"]
    about = {note["about"]: note["text"] for note in found["notes"]}
    assert "MIND@12 (pixels): " in about["MIND"] and "between 12 references and as many others" in about["MIND"]
    report = json.loads((out / found["rows"][0]["folder"] / "scores.json").read_text())
    assert f"pixels {report['ratios']['pixels']['divisor']:.4g}" in about["FDr"]
