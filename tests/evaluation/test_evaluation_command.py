"""The command as a user runs it, on one process and on several, and what it says about mistakes."""

import errno
import json
import os
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from sampling_fixtures import tiny_model

from evaluate_fid import open_stream as open_checkpoint
from sit_atconv.data.digits import load_digits
from sit_atconv.errors import InputError
from sit_atconv.evaluation import SampleStream, command
from sit_atconv.evaluation.command import parse, run
from sit_atconv.evaluation.digits import describe, score_digits
from sit_atconv.sampling import SamplerSettings, sample_to_directory
from sit_atconv.sampling.arguments import add_sampling_arguments

ROOT = Path(__file__).parents[2]
PIXELS = ["--features", "pixels", "--device", "cpu", "--workers", "0"]


def evaluate_fid(*arguments: str, stream: SampleStream | None = None) -> None:
    """The command in this process, with `stream` as what --checkpoint would draw."""
    run(parse(list(arguments), lambda parser: []), lambda options, device: stream)


def python(*arguments: str, stdout: IO[str] | int = subprocess.PIPE) -> subprocess.CompletedProcess:
    """Python in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """An npz like sample.py's: the training digits, in random order."""
    path = tmp_path_factory.mktemp("digits") / "samples.npz"
    images, labels = load_digits("train", 8)
    order = np.random.default_rng(0).permutation(len(images))
    np.savez(path, arr_0=np.repeat(images[order, ..., None], 3, axis=3), arr_1=labels[order])
    return path


# --- as a user


def test_table_and_json(digits, tmp_path, capsys):
    evaluate_fid(
        "--samples", str(digits), "--reference", "digits:heldout@8", "--json", str(tmp_path / "s.json"), *PIXELS
    )
    table, written = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert "FD-pixels" in table and "FID" not in table
    assert f"{written['metrics']['fd_pixels']:.4f}" in table
    assert written["samples"]["count"] == 901 and written["settings"]["processes"] == 1


def test_a_stream_in_place_of_samples(digits, capsys):
    images = torch.from_numpy(np.load(digits)["arr_0"]).permute(0, 3, 1, 2)
    stream = SampleStream(iter(images.split(100)), 0, len(images), {"path": "the model", "kind": "checkpoint"})
    evaluate_fid("--checkpoint", "model", "--reference", "digits:heldout@8", *PIXELS, stream=stream)
    streamed = capsys.readouterr().out
    evaluate_fid("--samples", str(digits), "--reference", "digits:heldout@8", *PIXELS)
    stored = capsys.readouterr().out
    assert "the model: 901 images of 8x8" in streamed
    assert streamed.split("\n\n")[1] == stored.split("\n\n")[1]


@pytest.mark.slow
def test_a_checkpoint_scores_as_the_samples_that_are_drawn_from_it(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images, arr_1=np.arange(30) % 3)
    settings = SamplerSettings("sde", 4, guidance=1.5, diffusion="linear", last_step="tweedie")
    sample_to_directory(tmp_path / "model", tmp_path / "out", 20, settings, seed=3)
    scoring = ["--reference", str(tmp_path / "reference.npz"), *PIXELS, "--classes", "per-class", "--json"]
    evaluate_fid("--samples", str(tmp_path / "out" / "samples.npz"), *scoring, str(tmp_path / "stored.json"))

    drawing = ["--checkpoint", str(tmp_path / "model"), "--num-samples", "20", "--seed", "3", "--solver", "sde"]
    drawing += ["--steps", "4", "--guidance", "1.5", "--diffusion", "linear", "--last-step", "tweedie"]
    result = python("evaluate_fid.py", *drawing, *scoring, str(tmp_path / "streamed.json"))
    assert result.returncode == 0, result.stderr
    streamed, stored = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("streamed", "stored"))
    assert streamed["metrics"] == pytest.approx(stored["metrics"], rel=1e-12)
    assert streamed["per_class"] == stored["per_class"] and len(stored["per_class"]) == 3
    assert streamed["samples"]["images_sha256"] == stored["samples"]["images_sha256"]
    assert streamed["samples"]["diffusion"] == "linear"  # what is needed to repeat it


@pytest.mark.slow
def test_one_two_and_three_processes_agree(digits, tmp_path):
    command = ["--samples", str(digits), "--reference", "digits:heldout@8", "--features", "pixels", "--workers", "0"]
    command += ["--kid", "--classes", "1,7", "--batch-size", "50", "--json"]
    evaluate_fid(*command, str(tmp_path / "1.json"), "--device", "cpu")
    for processes in ("2", "3"):  # 901 and 896 images do not divide evenly
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        result = python(*launcher, "evaluate_fid.py", *command, str(tmp_path / f"{processes}.json"))
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("FD-pixels") == 1
    one, *others = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2, 3))
    for processes, scores in enumerate(others, start=2):
        assert scores["settings"]["processes"] == processes
        assert scores["metrics"] == pytest.approx(one["metrics"], rel=1e-9)
        assert scores["samples"] == one["samples"] and scores["reference"] == one["reference"]
        assert scores["per_class"]["7"] == pytest.approx(one["per_class"]["7"], rel=1e-9)


@pytest.mark.slow
def test_two_processes_agree_with_one_in_several_spaces(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.pth")
    generator = np.random.default_rng(0)
    for name, count in (("samples", 21), ("reference", 18)):
        np.savez(tmp_path / f"{name}.npz", arr_0=generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    command = ["--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz")]
    command += ["--features", "pixels", "timm:test_vit", "--weights", f"timm:test_vit={tmp_path / 'vit.pth'}"]
    command += ["--metrics", "fd", "kid", "mind", "precision", "fdr", "--fdr-divisors", "own", "--workers", "0"]
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        path = tmp_path / f"{len(found)}.json"
        result = python(*launcher, "evaluate_fid.py", *command, "--json", str(path), "--device", "cpu")
        assert result.returncode == 0, result.stderr
        found.append(json.loads(path.read_text()))
    one, two = found
    assert two["settings"]["processes"] == 2 and len(one["metrics"]) == 11
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-9)
    assert two["ratios"].keys() == {"pixels", "timm:test_vit"}


@pytest.mark.slow
def test_mistakes_end_in_one_paragraph_and_code_2(tmp_path):
    result = python("evaluate_fid.py", "--samples", "absent.npz", "--reference", "digits", *PIXELS)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "'absent.npz' does not exist" in result.stderr


# --- mistakes


EVALUATE = ["--samples", "digits@8", "--reference", "digits@8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "absent.npz", "--reference", "digits@8"], "does not exist"),
        (["--samples", "digits@8", "--reference", "absent"], "does not exist"),
        ([*EVALUATE, "--metrics", "fid"], "fid is of the features inception"),
        ([*EVALUATE, "--metrics", "fd", "minds"], "no metric 'minds': did you mean 'mind"),
        ([*EVALUATE, "--metrics", "fdr"], "FDr needs its divisors"),
        ([*EVALUATE, "--metrics", "fdr", "--fdr-divisors", "pixels=0"], "a number above 0"),
        ([*EVALUATE, "--metrics", "fdr", "--fdr-divisors", "inception=2"], "inception is none of them"),
        ([*EVALUATE, "--statistics", "ref.npz"], "expected NAME=VALUE"),
        ([*EVALUATE, "--features", "pixels", "pixels"], "given twice"),
        ([*EVALUATE, "--weights", "inception=w.pth"], "the features are pixels"),
        ([*EVALUATE, "--classes", '"a,b'], "is no list of labels"),
        ([*EVALUATE, "--bootstrap", "1"], "at least two resamples"),
        ([*EVALUATE, "--weights", "w.pth"], "Pixels have no network"),
        ([*EVALUATE, "--device", "gpu9"], "device 'gpu9'"),
        (["reference", "digits@8", "out.txt"], "is an npz"),
    ],
)
def test_what_cannot_be_done(arguments, message):
    first, rest = (arguments[:1], arguments[1:]) if arguments[0] == "reference" else ([], arguments)
    with pytest.raises(InputError, match=message):
        evaluate_fid(*first, *PIXELS, *rest)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--samples", "a"],
        ["--reference", "a"],
        ["--samples", "a", "--checkpoint", "b", "--reference", "c"],
        ["reference"],
        [*EVALUATE, "--batch-size", "0"],
        [*EVALUATE, "--batch-size", "1" + "0" * 30],
        [*EVALUATE, "--batch-size", "9" * 5_000],
        [*EVALUATE, "--workers", "-1"],
        [*EVALUATE, "--workers", "1025"],
        [*EVALUATE, "--bootstrap", "1" + "0" * 12],
        ["reference", "digits@8", "out.npz", "--images", "1" + "0" * 30],
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate_fid(*arguments)
    (paragraph,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and paragraph.startswith("error: ") and len(paragraph) < 300
    assert paragraph.split("All options: ")[1].startswith("evaluate_fid.py")


def test_a_report_that_cannot_be_written_is_found_before_the_work(tmp_path):
    with pytest.raises(InputError, match="give the name of a file"):
        evaluate_fid("--samples", "absent", "--reference", "absent", "--json", str(tmp_path), *PIXELS)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.npz", tmp_path / "file" / "folder" / "x.npz"):
        for asked in ((*EVALUATE, "--json"), ("reference", "digits@8")):
            with pytest.raises(InputError, match=rf"{out}: {out.parent} is not a folder; give the name of a file"):
                evaluate_fid(*asked, str(out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference", "absent", "out.npz"], "'absent' does not exist"),
        (["reference", "digits:tran", "out.npz"], "split of the digits"),
        (["--samples", "absent", "--reference", "digits@8"], "'absent' does not exist"),
        (["--samples", "digits@8", "--reference", "absent.npz"], "'absent.npz' does not exist"),
        (["--checkpoint", "absent", "--reference", "digits@8"], "no model"),
    ],
)
def test_what_is_not_there_is_found_before_weights_are_fetched(arguments, message, tmp_path, monkeypatch):
    def fetch(*_: object) -> None:
        raise AssertionError("went for the weights")

    def open_stream(*_: object) -> SampleStream:
        raise InputError("no model")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "open_features", fetch)
    with pytest.raises(InputError, match=message):
        run(parse([*arguments, "--device", "cpu"], lambda parser: []), open_stream)


def test_a_checkpoint_has_to_draw_two_samples(tmp_path):
    arguments = ["--checkpoint", str(tmp_path), "--reference", "digits@8", "--num-samples", "1"]
    options = parse(arguments, add_sampling_arguments)
    with pytest.raises(InputError, match="--num-samples must be at least 2, not 1"):
        run(options, open_checkpoint)


def test_a_full_disk_leaves_no_file_and_costs_no_numbers(digits, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    report = tmp_path / "scores.json"
    with pytest.raises(OSError, match=r"No space left.*scores\.json"):
        evaluate_fid("--samples", str(digits), "--reference", "digits:heldout@8", "--json", str(report), *PIXELS)
    assert not list(tmp_path.iterdir()) and "FD-pixels" in capsys.readouterr().out


def test_scores_go_into_a_pipe_and_through_a_link(digits, tmp_path):
    pipe, link, read = tmp_path / "pipe", tmp_path / "link", []
    os.mkfifo(pipe)
    link.symlink_to("scores.json")
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    for path in (pipe, link):
        evaluate_fid("--samples", str(digits), "--reference", "digits:heldout@8", "--json", str(path), *PIXELS)
    reader.join(60)
    scores = json.loads(read[0])["metrics"]
    assert scores == json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert pipe.is_fifo() and link.is_symlink()


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_mistake(digits, tmp_path):
    arguments = ["--samples", str(digits), "--reference", "digits:heldout@8", "--json", str(tmp_path / "s.json")]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        result = python("evaluate_fid.py", *arguments, *PIXELS, stdout=gone)
    assert result.returncode == 0 and "Traceback" not in result.stderr and "Broken" not in result.stderr
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["fd_pixels"] > 0


def test_the_library_needs_neither_torch_fidelity_nor_scikit_learn():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch_fidelity', 'sklearn', 'scipy'));"
        "import torch; from sit_atconv.evaluation import InceptionFeatures, evaluate, create_features;"
        "create_features('pixels')(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)); InceptionFeatures('x.pth')"
    )
    result = python("-c", code)
    assert "InputError: Inception features need torch-fidelity: pip install 'sit-atconv[eval]'" in result.stderr


# --- the report of the quickstart


def test_real_digits_pass(digits):
    report = score_digits(str(digits))
    assert report.passed and report.label_agreement > 0.99 and 0.8 < report.fd_pixels_ratio < 1.2
    assert report.classifier_accuracy > 0.95 and report.equal_count % 10 == 0
    assert "passed" in describe(report)


@pytest.mark.parametrize("fault", ["labels", "noise", "collapse"])
def test_faulty_digits_fail(digits, tmp_path, fault):
    with np.load(digits) as file:
        images, labels = file["arr_0"], file["arr_1"]
    generator = np.random.default_rng(0)
    if fault == "labels":
        labels = (labels + (generator.random(len(labels)) < 0.1)) % 10
    elif fault == "noise":
        images = np.clip(images + generator.normal(0, 30, images.shape), 0, 255).astype(np.uint8)
    else:
        images = images[[np.flatnonzero(labels == label)[0] for label in labels]]
    np.savez(tmp_path / "bad.npz", arr_0=images, arr_1=labels)
    report = score_digits(str(tmp_path / "bad.npz"))
    assert not report.passed and "FAILED" in describe(report)
    assert (report.label_agreement < 0.95) == (fault == "labels")


def test_digits_that_cannot_be_scored(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)

    def refused(message: str, **arrays: np.ndarray) -> None:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(InputError, match=message):
            score_digits(str(tmp_path / "bad.npz"))

    refused("no labels", arr_0=images)
    refused("2 or more of each digit", arr_0=images, arr_1=np.arange(40) % 9)
    refused("2 or more of each digit", arr_0=images, arr_1=np.arange(40) % 11)
    refused("digits are square", arr_0=images[:, :, :6], arr_1=np.arange(40) % 10)
    assert isinstance(parse(["reference", "a", "b"], lambda parser: []), Namespace)
