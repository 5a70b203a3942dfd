"""The sample directory: what it holds, what interrupts it, real processes, and sample.py as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_fixtures import PIXELS, images_of, require_same_images, tiny_model

import sample
from sit_atconv.errors import InputError
from sit_atconv.sampling import SamplerSettings, generate, sample_to_directory
from sit_atconv.sampling.grid import pick_for_grid, save_grid


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model(class_names=["zero", "one", "two"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def draw(checkpoint: Path, out: Path, **options: object) -> None:
    settings = options.pop("settings", SamplerSettings("euler", 3))
    sample_to_directory(checkpoint, out, options.pop("num_samples", 9), settings, **options)


def test_the_directory_holds_adms_npz_a_grid_and_pngs(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out", png=True)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (9, 8, 6, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [3, 3, 3]
    for i in range(9):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "png" / f"{i:06d}.png")), images[i])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"samples.npz", "grid.png", "settings.json", "png"}
    expected = images_of(tiny_model(), list(range(9)), SamplerSettings("euler", 3)).transpose(0, 2, 3, 1)
    require_same_images(images, expected)


def test_an_interrupted_directory_continues(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    draw(checkpoint, tmp_path / "whole")
    drawn = []

    def interrupted(model, autoencoder, indices, *args, **kwargs):
        for batch in generate(model, autoencoder, indices, *args, **kwargs):
            if len(drawn) == 4:
                raise KeyboardInterrupt
            drawn.extend(batch.indices)
            yield batch

    monkeypatch.setattr("sit_atconv.sampling.run.generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(checkpoint, tmp_path / "out", batch_size=2)
    assert not (tmp_path / "out" / "samples.npz").exists()
    drawn.append(-1)  # from now on nothing interrupts
    draw(checkpoint, tmp_path / "out", batch_size=2)
    assert sorted(drawn) == [-1, *range(9)]  # nothing was drawn twice
    require_same_images(*(np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("out", "whole")))
    before = (tmp_path / "out" / "samples.npz").stat().st_mtime_ns
    draw(checkpoint, tmp_path / "out", batch_size=2)  # complete: nothing is done
    assert (tmp_path / "out" / "samples.npz").stat().st_mtime_ns == before


def launch(processes: int, *words: object) -> subprocess.Popen:
    """sample.py under torch's launcher, in a process group of its own."""
    root = Path(sample.__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return subprocess.Popen(
        [str(word) for word in (*launcher, root / "sample.py", *words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_processes_and_another_number_of_them_draw_the_same_images(checkpoint: Path, tmp_path: Path) -> None:
    out, count = tmp_path / "out", 45
    words = ["--checkpoint", checkpoint, "--out", out, "--num-samples", count, "--solver", "sde", "--steps", 60]
    words += ["--guidance", 1.5, "--labels", "random", "--batch-size"]
    killed = launch(3, *words, 2)
    flags = out / "partial" / "done.npy"
    while not (flags.exists() and np.load(flags).sum() >= 4):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    rows = np.load(out / "partial" / "images.npy")[there := np.flatnonzero(np.load(flags))]
    assert 4 <= len(there) < count

    continued = launch(2, *words, 5)
    assert continued.wait() == 0, continued.stderr.read()
    settings = SamplerSettings("sde", 60, guidance=1.5)
    alone = images_of(tiny_model(), list(range(count)), settings, labels="random").transpose(0, 2, 3, 1)
    images = np.load(out / "samples.npz")["arr_0"]
    require_same_images(images, alone)
    assert np.array_equal(images[there], rows)  # what was there stayed as it was
    assert not (out / "partial").exists()


def test_png_files_can_be_asked_for_later(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    draw(checkpoint, tmp_path / "out")
    monkeypatch.setattr("sit_atconv.sampling.run.generate", lambda *_, **__: iter(()))  # nothing is drawn again
    draw(checkpoint, tmp_path / "out", png=True)
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "png" / "000008.png")), images[8])
    assert not (tmp_path / "out" / "partial").exists()


def test_a_full_disk_and_damaged_settings_are_named(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(InputError, match=r"9 images of 6x8 need 0\.0 GiB"):
        draw(checkpoint, tmp_path / "out")
    monkeypatch.undo()
    draw(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "settings.json").write_text('{"num_samples"')
    with pytest.raises(InputError, match=r"settings\.json is damaged"):
        draw(checkpoint, tmp_path / "out")


def test_other_settings_and_foreign_directories_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        draw(checkpoint, tmp_path / "out", seed=1)
    with pytest.raises(InputError, match="num_samples: 9 -> 10"):
        draw(checkpoint, tmp_path / "out", num_samples=10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        draw(checkpoint, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.register_to_config(latents=None)
    model.save_pretrained(tmp_path / "anonymous")
    with pytest.raises(InputError, match="--vae"):
        draw(tmp_path / "anonymous", tmp_path / "out")
    model.register_to_config(latents={**PIXELS.to_dict(), "scale": 0.5})
    model.save_pretrained(tmp_path / "scaled")
    with pytest.raises(InputError, match=r"scale: 0\.5 against 1\.0"):
        draw(tmp_path / "scaled", tmp_path / "out", vae="identity")
    assert not (tmp_path / "out").exists()


def test_grids_hold_a_class_a_row(tmp_path: Path) -> None:
    labels = torch.tensor([2, 0, 1, 0, 2, 1, 1, 0])
    assert pick_for_grid(labels, 8) == [1, 3, 2, 5, 0, 4]
    assert pick_for_grid(None, 3) == [0, 1, 2]
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8) * 60
    save_grid(images, 2, tmp_path / "grid.png")
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 48 + 6, 2 * 48 + 6, 3)
    assert [sheet[20, 20, 0], sheet[20, 80, 0], sheet[80, 20, 0], sheet[80, 80, 0]] == [0, 60, 120, 180]


def test_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "out", "--num-samples", 6, "--solver", "sde", "--steps", 3, "--guidance", 1.8]
    words += ["--checkpoint", checkpoint, "--interval", 0, 0.7, "--labels", "two,0"]
    sample.main(list(map(str, words)))
    assert np.load(tmp_path / "out" / "samples.npz")["arr_1"].tolist() == [2, 0, 2, 0, 2, 0]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["interval"] == [0.0, 0.7]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--labels", "7"], "Unknown label '7'"),
        (["--solver", "rk4"], "invalid choice: 'rk4'"),
        (["--stepz", "4"], "unrecognized arguments: --stepz"),
    ],
)
def test_mistakes_end_with_code_2_and_one_paragraph(checkpoint: Path, tmp_path: Path, words, message, capsys) -> None:
    always = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--num-samples", "2", "--steps", "2"]
    with pytest.raises(SystemExit) as exit_:
        sample.main(always + words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
