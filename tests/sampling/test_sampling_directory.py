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
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from sampling_fixtures import PIXELS, images_of, require_same_images, tiny_model

import sample
from sit_atconv.errors import InputError
from sit_atconv.sampling import SamplerSettings, generate, sample_to_directory
from sit_atconv.sampling.writing.directory import _readable
from sit_atconv.sampling.writing.grid import pick_for_grid, save_grid


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


@pytest.mark.parametrize("leftover", ["settings.unfinished", ".unfinished-settings.json.partial"])
def test_what_a_kill_left_is_no_one_elses_sample(checkpoint: Path, tmp_path: Path, leftover: str) -> None:
    """The first name is that of an earlier version."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / leftover).write_text("{")
    draw(checkpoint, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"samples.npz", "grid.png", "settings.json"}


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
    digests = out / "partial" / "digests.npy"
    while not (digests.exists() and digests.stat().st_size > 128 and np.load(digests).any(1).sum() >= 4):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    rows = np.load(out / "partial" / "images.npy")[there := np.flatnonzero(np.load(digests).any(1))]
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
    with pytest.raises(InputError, match=r"9 images of 6x8 need 2\.5 KiB in .*, and 100 bytes are free"):
        draw(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # not claimed: fewer may be drawn there
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 2 * 9 * 8 * 6 * 3))
    with pytest.raises(InputError, match=r"need 3\.8 KiB in .*, and 2\.5 KiB are free"):
        draw(checkpoint, tmp_path / "out", png=True)
    draw(checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match=r"need 1\.3 KiB"):
        monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 1000))
        draw(checkpoint, tmp_path / "out", png=True)
    monkeypatch.undo()
    for damaged in ('{"num_samples"', "[]", '{"num_samples": 9}', '{"num_samples": 9, "sha256": 4}'):
        (tmp_path / "out" / "settings.json").write_text(damaged)
        with pytest.raises(InputError, match=r"settings\.json"):
            draw(checkpoint, tmp_path / "out")


def test_sizes_are_told_in_units_that_show_them() -> None:
    sizes = (0, 1023, 1024, 5 * 2**20, 3.26 * 2**30, 5000 * 2**30)
    assert [_readable(size) for size in sizes] == ["0 bytes", "1023 bytes", "1 KiB", "5 MiB", "3.3 GiB", "5000 GiB"]


def touch_weights(folder: Path) -> None:
    """Other weights in the same place."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("finished", [True, False])
def test_other_weights_in_the_same_place_are_refused(checkpoint: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    draw(checkpoint, out)
    if not finished:
        (out / "samples.npz").unlink()
    kept = shutil.copytree(checkpoint, tmp_path / "kept")
    touch_weights(checkpoint)
    message = f"The model at {checkpoint} is not the one that the samples in {out} were drawn from: "
    with pytest.raises(InputError, match=message + r"diffusion_pytorch_model.safetensors changed.*another --out"):
        draw(checkpoint, out)
    shutil.copytree(kept, checkpoint, dirs_exist_ok=True)
    draw(checkpoint, out)  # as it was: nothing stands in the way
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "class_names": ["a", "b", "c"]}))
    with pytest.raises(InputError, match=r"drawn from: config\.json changed since"):
        draw(checkpoint, out)


def test_a_weak_model_and_a_decoder_of_other_weights_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(latent_channels=1, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **parts)
    vae.save_pretrained(tmp_path / "vae")
    model = tiny_model(latents=None)
    model.save_pretrained(tmp_path / "run" / "model")  # a checkpoint that holds one
    model.save_pretrained(tmp_path / "weak")
    options = {"settings": SamplerSettings("euler", 2, guidance=2.0), "vae": str(tmp_path / "vae"), "num_samples": 2}
    for name in ("weak", "vae", "run/model"):
        out = tmp_path / f"without-{name[:3]}"
        draw(tmp_path / "run", out, weak_checkpoint=tmp_path / "weak", **options)
        draw(tmp_path / "run", out, weak_checkpoint=tmp_path / "weak", **options)
        touch_weights(tmp_path / name)
        with pytest.raises(InputError, match=rf"The model at {tmp_path / name.split('/')[0]} is not the one"):
            draw(tmp_path / "run", out, weak_checkpoint=tmp_path / "weak", **options)


def test_a_damaged_or_foreign_npz_is_not_complete(checkpoint: Path, tmp_path: Path) -> None:
    npz = tmp_path / "out" / "samples.npz"
    draw(checkpoint, npz.parent)
    whole = npz.read_bytes()
    images, labels = np.load(npz)["arr_0"], np.load(npz)["arr_1"]
    for count in (0, len(whole) // 2, len(whole) - 10):
        npz.write_bytes(whole[:count])
        with pytest.raises(InputError, match=r"samples\.npz.*Remove it, and the same command draws"):
            draw(checkpoint, npz.parent)
        assert npz.stat().st_size == count  # nothing was changed
    for other in (images[:8], images[:, :4], images.astype(np.int16)):
        np.savez(npz, arr_0=other, arr_1=labels[: len(other)])
        with pytest.raises(InputError, match=r"expected uint8 \(9, 8, 6, 3\)\. Remove it"):
            draw(checkpoint, npz.parent)
    npz.unlink()
    draw(checkpoint, npz.parent)
    require_same_images(np.load(npz)["arr_0"], images)


def test_a_lost_grid_and_lost_pngs_are_remade(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    draw(checkpoint, out, png=True)
    lost = [out / "grid.png", out / "png" / "000004.png"]
    before = [path.read_bytes() for path in lost]
    kept = (out / "png" / "000005.png").stat().st_mtime_ns
    monkeypatch.setattr("sit_atconv.sampling.run.generate", lambda *_, **__: iter(()))  # nothing is drawn again
    for some in (lost, lost[:1], lost[1:]):
        for path in some:
            path.unlink()
        draw(checkpoint, out, png=True)
        assert [path.read_bytes() for path in lost] == before
    assert (out / "png" / "000005.png").stat().st_mtime_ns == kept
    assert {p.name for p in out.iterdir()} == {"samples.npz", "grid.png", "settings.json", "png"}


def test_a_second_program_is_kept_out(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hold = f"""
from pathlib import Path
from accelerate import PartialState
from sit_atconv.runtime.lock import locked
with locked(Path({str(out)!r}), PartialState(cpu=True), "sampled into", "--out"):
    print(flush=True)
    input()
"""
    root, pipe = str(Path(sample.__file__).parent), subprocess.PIPE
    words, env = [sys.executable, "-c", hold], {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, env=env) as holder:
        holder.stdout.readline()  # it holds the lock
        with pytest.raises(InputError, match=rf"out is sampled into by process {holder.pid} on .*another --out"):
            draw(checkpoint, out)
        assert [p.name for p in out.iterdir()] == [".lock"]
        holder.communicate(b"\n")
    (out / ".lock").touch()  # what a killed program leaves
    draw(checkpoint, out)
    assert {p.name for p in out.iterdir()} == {"samples.npz", "grid.png", "settings.json"}


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
        (["--seed", "-1"], "-1 is not a seed"),
        (["--num-samples", "0"], "0 is not a valid number: give a whole number from 1 to"),
        (["--num-samples", "1" + "0" * 30], "0 is not a valid number"),
        (["--num-samples", "9" * 5000], "invalid count value"),
        (["--batch-size", "-1"], "-1 is not a valid number"),
        (["--guidance", "-1"], "finite number >= 0, not -1.0"),
        (["--guidance", "2", "--interval", "0.7", "0.2"], "low <= high <= 1, not 0.7 0.2"),
        (["--solver", "sde", "--diffusion-scale", "nan"], "not nan"),
    ],
)
def test_mistakes_end_with_code_2_and_one_paragraph(checkpoint: Path, tmp_path: Path, words, message, capsys) -> None:
    always = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--num-samples", "2", "--steps", "2"]
    with pytest.raises(SystemExit) as exit_:
        sample.main(always + words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
