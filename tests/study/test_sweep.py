"""`sample.py --sweep`: its points, what it draws and scores once, the best, and what it refuses before any work."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from sampling_fixtures import tiny_model

import evaluate_fid
import sample
from sit_atconv.errors import InputError
from sit_atconv.sampling import SamplerSettings, sample_to_directory
from sit_atconv.study.sweep.grid import parse_sweep, points, sweep_keys

SWEEP = ["--sweep", "guidance=1,1.5,3", "interval.high=0.6,1"]
DRAWING = ["--num-samples", "12", "--solver", "euler", "--steps", "4", "--seed", "3"]
SCORING = ["--features", "pixels", "--metrics", "precision", "fd", "--device", "cpu", "--workers", "0"]
POINTS = [
    "guidance=1.0",
    "guidance=1.5,interval.high=0.6",
    "guidance=1.5,interval.high=1.0",
    "guidance=3.0,interval.high=0.6",
    "guidance=3.0,interval.high=1.0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models and a reference of the size of their images."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_model().save_pretrained(folder / "model")
    tiny_model(num_classes=0).save_pretrained(folder / "free")
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 6, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    return folder


def words(place: Path, out: Path, *more: str, sweep: list[str] = SWEEP, model: str = "model") -> list[str]:
    fixed = ["--checkpoint", str(place / model), "--out", str(out), "--reference", str(place / "reference.npz")]
    return [*sweep, *fixed, *DRAWING, *SCORING, *more]


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory) -> Path:
    """A finished sweep by the lower of the two scores, for which the higher is worse."""
    out = tmp_path_factory.mktemp("made") / "out"
    sample.main(words(place, out, "--metrics", "fd", "precision"))
    return out


def written(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text())


def refused(capsys, *arguments: str) -> str:
    """The paragraph on standard error of a command that must end with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sample.main(list(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_keys_are_the_samplers_settings() -> None:
    assert {"guidance", "interval.low", "interval.high", "steps", "solver", "shift", "precision"} <= set(sweep_keys())
    assert not {"interval", "compile"} & set(sweep_keys())


def test_points_are_all_combinations_that_differ() -> None:
    swept = parse_sweep(["guidance=1,1.25", "interval.high=0.7,1", "steps=5,10"])
    found = {point.name: point.settings for point in points(swept, {"solver": "adams2"})}
    assert found == {
        f"guidance={g},interval.high={h},steps={n}" if g != 1 else f"guidance={g},steps={n}": SamplerSettings(
            "adams2", n, guidance=g, interval=(0.0, h if g != 1 else 1.0)
        )
        for g in (1.0, 1.25)
        for h in (0.7, 1.0)
        for n in (5, 10)
    }
    ends = points(parse_sweep(["interval.low=0.1,0.2"]), {"guidance": 2.0, "interval": (0.0, 0.5)})
    assert [point.settings.interval for point in ends] == [(0.1, 0.5), (0.2, 0.5)]
    kinds = points(parse_sweep(["solver=heun,sde", "diffusion=sigma,linear"]), {})
    assert [point.name for point in kinds] == [
        "solver=heun",
        "solver=sde,diffusion=sigma",
        "solver=sde,diffusion=linear",
    ]
    channels = points(parse_sweep(["guidance_channels=null,3"]), {"guidance": 2.0})
    assert [point.settings.guidance_channels for point in channels] == [None, 3]


@pytest.mark.parametrize(
    ("sweep", "given", "expected"),
    [
        (["guidance"], {}, "expected KEY=VALUE"),
        (["guidence=1,2"], {}, "did you mean 'guidance'"),
        (["interval=0,1"], {}, "did you mean 'interval"),
        (["guidance=1,two"], {}, "'two' is no value of it"),
        (["guidance=1,,2"], {}, "'' is no value of it"),
        (["steps=5.5,6"], {}, "'5.5' is no value of it"),
        (["guidance=1.5,1.50"], {}, "1.5 is given twice"),
        (["guidance=2,3", "guidance=4"], {}, "guidance is given twice"),
        (["guidance=2,3"], {"guidance": 2.0}, "--sweep guidance=… and --guidance set the same"),
        (["guidance=-1,2"], {}, "--sweep guidance=-1.0: The guidance scale must be"),
        (["guidance=2,nan"], {}, "--sweep guidance=nan: The guidance scale must be"),
        (["solver=heun,hoin"], {}, "--sweep solver=hoin: Unknown solver"),
        (["interval.high=0.5,0.7"], {}, "interval would do nothing without guidance"),
        (["steps=5,10"], {"interval": (0.0, 0.5)}, "interval would do nothing without guidance"),
        (["interval.low=0.8,0.1"], {"guidance": 2.0, "interval": (0.0, 0.5)}, "0 <= low <= high <= 1"),
    ],
)
def test_a_wrong_grid_is_named(sweep: list[str], given: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected.replace("(", r"\(")):
        points(parse_sweep(sweep), given)


def test_points_are_those_of_sample_py_and_the_best_comes_first(place: Path, made: Path, tmp_path: Path) -> None:
    found = written(made)
    assert sorted(row["folder"] for row in found["rows"]) == POINTS
    for guidance, interval, name in ((1.0, (0.0, 1.0), POINTS[0]), (3.0, (0.0, 0.6), POINTS[3])):
        settings = SamplerSettings("euler", 4, guidance=guidance, interval=interval)
        sample_to_directory(place / "model", tmp_path / name, 12, settings, seed=3)
        with np.load(tmp_path / name / "samples.npz") as alone, np.load(made / name / "samples.npz") as drawn:
            assert np.array_equal(alone["arr_0"], drawn["arr_0"])
            assert np.array_equal(alone["arr_1"], drawn["arr_1"])
    values = [row["metrics"]["fd_pixels"] for row in found["rows"]]
    assert values == sorted(values) and len(set(values)) == 5
    assert (found["metric"], found["best"]) == ("fd_pixels", found["rows"][0]["values"])
    calls = {row["folder"]: row["calls"]["total"] for row in found["rows"]}
    assert [calls[name] for name in POINTS] == [4, 6, 8, 6, 8]
    markdown = (made / "sweep.md").read_text()
    assert f"{values[0]:.2f}**" in markdown and "Do not publish it" in markdown and found["anew"] in markdown


def test_the_first_metric_decides_in_its_own_direction(place: Path, tmp_path: Path) -> None:
    sample.main(words(place, tmp_path / "out"))
    found = written(tmp_path / "out")
    values = [row["metrics"]["precision_pixels"] for row in found["rows"]]
    assert found["metric"] == "precision_pixels" and values == sorted(values, reverse=True)


def test_the_command_for_the_best_scores_it_anew(place: Path, made: Path, tmp_path: Path, monkeypatch) -> None:
    anew = shlex.split(written(made)["anew"])
    assert anew[:6] == ["python", "evaluate_fid.py", "--num-samples", "50000", "--seed", "4"]
    anew[anew.index("50000")] = "12"
    anew[anew.index("4")] = "3"
    monkeypatch.setattr("sys.argv", [*anew[1:], "--json", str(tmp_path / "anew.json")])
    evaluate_fid.main()
    scores = json.loads((tmp_path / "anew.json").read_text())["metrics"]
    assert scores == pytest.approx(written(made)["rows"][0]["metrics"])  # with the sweep's seed and number


def test_the_same_command_continues_and_may_have_other_values(place: Path, tmp_path: Path, monkeypatch) -> None:
    arguments, out = words(place, tmp_path / "out", "--metrics", "fd"), tmp_path / "out"
    drawn = []

    def kill_after_two(checkpoint: Path, folder: Path, *given: object, **options: object) -> None:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(folder.name)
        sample_to_directory(checkpoint, folder, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr("sit_atconv.study.sweep.command.sample_to_directory", kill_after_two)
        with pytest.raises(SystemExit) as stopped:
            sample.main(arguments)
    assert stopped.value.code == 130 and not (out / "sweep.json").exists()
    scored = []
    monkeypatch.setattr(
        "sit_atconv.study.table.scoring.evaluate",
        lambda given, *rest, evaluate=evaluate_fid.run.__globals__["evaluate"]: (
            scored.append(Path(given).parent.name) or evaluate(given, *rest)
        ),
    )
    sample.main(arguments)
    assert scored == POINTS[2:]
    before = written(out)
    more = ["--sweep", "guidance=1.5,4", "interval.high=0.6,1"]
    sample.main(words(place, out, "--metrics", "fd", sweep=more))
    assert scored == [*POINTS[2:], "guidance=4.0,interval.high=0.6", "guidance=4.0,interval.high=1.0"]
    known = {row["folder"]: row["metrics"] for row in before["rows"]}
    assert {row["folder"] for row in written(out)["rows"]} & set(known) == set(POINTS[1:3])
    assert all(row["metrics"] == known.get(row["folder"], row["metrics"]) for row in written(out)["rows"])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--num-samples", "1"], "--num-samples must be at least 2"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--metrics", "fid"], "fid is of the features inception"),
        (["--guidance", "2"], "--sweep guidance=… and --guidance set the same"),
        (["--labels", "7"], "7"),
        (["--guidance-channels", "5"], "--sweep guidance=1.5,interval.high=0.6: 5 channels cannot be guided"),
        (["--checkpoint-weights", "raw"], "there are no weights 'raw' beside it"),
    ],
)
def test_wrong_use_is_refused_before_any_work(place: Path, tmp_path: Path, capsys, more: list, expected: str) -> None:
    assert expected in refused(capsys, *words(place, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_missing_options_and_guidance_that_cannot_be_are_refused(place: Path, tmp_path: Path, capsys) -> None:
    bare = ["--checkpoint", str(place / "model"), "--out", str(tmp_path / "out")]
    assert "--reference" in refused(capsys, *SWEEP, *bare, *DRAWING)
    reference = ["--reference", str(place / "reference.npz")]
    assert "--num-samples is missing" in refused(capsys, *SWEEP, *bare, *reference, *SCORING)
    one = words(place, tmp_path / "out", sweep=["--sweep", "guidance=2"])
    assert "is one point" in refused(capsys, *one)
    free = words(place, tmp_path / "out", model="free")
    assert "--sweep guidance=1.5,interval.high=0.6: Guidance 1.5 needs a model with classes" in refused(capsys, *free)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(place: Path, made: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("")
    assert "holds no sweep" in refused(capsys, *words(place, tmp_path / "letters"))
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    said = refused(capsys, *words(place, made, "--metrics", "fd", "precision", "--seed", "4"))
    assert "drawing.seed: 3 -> 4" in said
    assert "scoring.kid: False -> True" in refused(capsys, *words(place, made, "--metrics", "fd", "precision", "--kid"))
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before


def test_a_weak_model_guides_where_there_is_guidance(place: Path, tmp_path: Path) -> None:
    weak = ["--weak-checkpoint", str(place / "free")]
    sample.main(words(place, tmp_path / "out", *weak, sweep=["--sweep", "guidance=1,2"], model="free"))
    rows = {row["folder"]: row for row in written(tmp_path / "out")["rows"]}
    assert rows["guidance=2.0"]["calls"] == {"evaluations": 4, "guided": 4, "total": 8}
    assert rows["guidance=1.0"]["calls"]["total"] == 4
    best = written(tmp_path / "out")
    assert ("--weak-checkpoint" in best["anew"]) == (best["best"] == {"guidance": 2.0})
