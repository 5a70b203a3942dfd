"""A sample directory that is continued after damage, and what is found out before anything is drawn."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sampling_fixtures import PIXELS, tiny_model

import sample
from sit_atconv import create_model
from sit_atconv.sampling import generate, inversion

COUNT = 9


def command(out: Path, *words: object) -> list[str]:
    given = ["--checkpoint", out.parent / "model", "--out", out, "--num-samples", COUNT, "--solver", "euler"]
    return [str(word) for word in (*given, "--steps", 3, "--batch-size", 2, *words)]


@pytest.fixture
def whole(tmp_path: Path) -> np.ndarray:
    """All samples of a checkpoint, as they are drawn without interruption."""
    tiny_model().save_pretrained(tmp_path / "model")
    sample.main(command(tmp_path / "whole"))
    return np.load(tmp_path / "whole" / "samples.npz")["arr_0"]


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Numbers of the samples drawn; the first call of generate ends after four of them."""
    drawn = []

    def interrupted(*args, **kwargs):
        first = not drawn
        for batch in generate(*args, **kwargs):
            if first and len(drawn) == 4:
                raise KeyboardInterrupt
            drawn.extend(batch.indices)
            yield batch

    monkeypatch.setattr("sit_atconv.sampling.run.generate", interrupted)
    return drawn


def begin(out: Path, *words: object) -> Path:
    """Draw four samples; returns the directory of what is unfinished."""
    with pytest.raises(SystemExit) as exit_:
        sample.main(command(out, *words))
    assert exit_.value.code == 130
    return out / "partial"


ROW = 8 * 6 * 3
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], list[int]]] = {
    "nothing": (lambda images, digests: None, []),
    "truncated": (lambda images, digests: cut(images, 128 + 2 * ROW + 5), [2, 3]),
    "truncated in its header": (lambda images, digests: cut(images, 60), [0, 1, 2, 3]),
    "empty": (lambda images, digests: cut(images, 0), [0, 1, 2, 3]),
    "gone": (lambda images, digests: images.unlink(), [0, 1, 2, 3]),
    "too long": (lambda images, digests: images.write_bytes(images.read_bytes() + b"more"), []),
    "a flipped bit": (lambda images, digests: flip(images, 128 + ROW + 7), [1]),
    "a damaged header": (lambda images, digests: flip(images, 30), []),
    "no array": (lambda images, digests: images.write_bytes(b"\0" * images.stat().st_size), [0, 1, 2, 3]),
    "floats": (lambda images, digests: np.save(images, np.zeros((COUNT, 8, 6, 3))), [0, 1, 2, 3]),
    "another shape": (lambda images, digests: np.save(images, np.zeros((2, 3), np.uint8)), [0, 1, 2, 3]),
    "digests truncated": (lambda images, digests: cut(digests, 128 + 16 + 3), [1, 2, 3]),
    "digests gone": (lambda images, digests: digests.unlink(), [0, 1, 2, 3]),
    "digests flipped": (lambda images, digests: flip(digests, 128 + 3 * 16), [3]),
    "digests of objects": (lambda images, digests: np.save(digests, np.array([{}, None])), [0, 1, 2, 3]),
    "digests of rows that are not there": (lambda images, digests: np.save(digests, fours()), list(range(4))),
}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, position: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 4
    path.write_bytes(damaged)


def fours() -> np.ndarray:
    return np.full((COUNT, 16), 4, np.uint8)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_as_it_was_written_is_drawn_again(damage: str, whole, drawn, tmp_path, caplog) -> None:
    partial = begin(tmp_path / "out")
    change, lost = DAMAGE[damage]
    change(partial / "images.npy", partial / "digests.npy")
    drawn.clear()
    drawn.append(-1)  # nothing interrupts from now on
    sample.main(command(tmp_path / "out"))
    assert drawn[1:] == [*lost, 4, 5, 6, 7, 8]
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], whole)
    told = [record.message for record in caplog.records if "are damaged" in record.message]
    assert len(told) == (damage != "digests gone" and len(lost) > 0)
    assert not partial.exists()


def test_a_directory_of_the_version_before_is_drawn_again(whole, drawn, tmp_path, caplog) -> None:
    """It noted which rows are there, and nothing of what is in them."""
    partial = begin(tmp_path / "out")
    (partial / "digests.npy").unlink()
    np.save(partial / "done.npy", np.arange(COUNT) < 4)
    sample.main(command(tmp_path / "out"))
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], whole)
    assert "out was begun by an earlier version, without digests: its samples are drawn again." in caplog.text


def test_pictures_of_an_interrupted_run_are_written_from_the_rows(whole, drawn, tmp_path) -> None:
    partial = begin(tmp_path / "out", "--png")
    cut(partial / "png" / "000001.png", 40)
    sample.main(command(tmp_path / "out", "--png"))
    for i in range(COUNT):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "png" / f"{i:06d}.png")), whole[i])


# --- before anything is drawn


@pytest.mark.parametrize("words", [[], ["--png"]])
def test_room_is_looked_at_before_memory_is_filled(words: list[str], tmp_path, monkeypatch, capsys) -> None:
    count = 10**12
    tiny_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(SystemExit) as exit_:
        sample.main([*command(tmp_path / "out"), "--num-samples", str(count), *words])
    assert exit_.value.code == 2
    assert f"{count} images of 6x8 need" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- a full disk


@pytest.mark.parametrize(("name", "written"), [("samples.npz", "numpy.savez"), ("grid.png", "PIL.Image.Image.save")])
def test_a_full_disk_is_named_by_sample(name: str, written: str, whole, drawn, tmp_path, capsys, monkeypatch) -> None:
    begin(tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(written, full)
    with pytest.raises(SystemExit) as exit_:
        sample.main(command(tmp_path / "out"))
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"No space left on device: '{tmp_path / 'out' / name}' Make room" in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["inversion.npz", "grid.png"])
def test_a_full_disk_is_named_by_inversion(name: str, tmp_path, capsys) -> None:
    create_model(
        "SiT-S/2",
        input_size=8,
        in_channels=1,
        num_classes=10,
        hidden_size=16,
        depth=1,
        num_heads=2,
        latents=PIXELS.to_dict(),
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to("/dev/full")
    words = ["--checkpoint", tmp_path / "model", "--data", "digits@8", "--out", tmp_path / "out", "--steps", 2]
    with pytest.raises(SystemExit) as exit_:
        inversion.main([str(word) for word in (*words, "--num-images", 2)])
    assert exit_.value.code == 2
    assert f"No space left on device: '{tmp_path / 'out' / name}'" in capsys.readouterr().err
