"""Formats of picture files that Pillow reads in some installations, and what is said where it does not."""

import io

import numpy as np
import pytest
from PIL import Image, features
from test_data_sources import CLASSES, picture, write_tree

from sit_atconv.data.pictures import formats
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.data.sources import files, open_source
from sit_atconv.errors import InputError

SUFFIXES = {".webp": ("webp", True), ".avif": ("avif", True), ".gif": (None, False)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats_are_read_and_known_to_be_lossy_or_not(tmp_path, suffix):
    needed, lossy = SUFFIXES[suffix]
    if needed and needed not in features.get_supported():
        pytest.skip(f"this Pillow reads no {suffix}")
    smooth = np.zeros((32, 48, 3), np.uint8) + np.arange(48, dtype=np.uint8)[None, :, None] * 4
    smooth[:16] = 255 - smooth[:16]
    Image.fromarray(smooth).save(tmp_path / f"x{suffix}")
    source = open_source(tmp_path, convert=True)
    assert source.lossy is lossy
    assert np.abs(source[0].image.astype(int) - smooth).mean() < 4


def test_of_an_animated_gif_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 10, 10), (10, 250, 10))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert open_source(tmp_path, convert=True)[0].image[0, 0].tolist() == [250, 10, 10]
    with pytest.raises(InputError, match=r"x\.gif is not an RGB picture"):
        open_source(tmp_path)[0]


def test_what_this_pillow_cannot_read_is_said_with_what_it_needs(tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    monkeypatch.setattr(files, "IMAGE_SUFFIXES", formats.IMAGE_SUFFIXES - {".heic", ".heif"})
    monkeypatch.setattr(files, "UNREADABLE", {".heic": "pillow-heif"})
    assert len(open_source(write_tree(tmp_path / "x", {**CLASSES, "a/y.HEIC": b""}))) == 3
    assert "left out (1 .heic; .heic needs pillow-heif)" in caplog.text
    write_tree(tmp_path / "only", {"a.heic": b""})
    with pytest.raises(SystemExit) as end:
        prepare([str(tmp_path / "only"), str(tmp_path / "out"), "--resolution", "8", "--vae", "identity"])
    assert end.value.code == 2 and "1 .heic; .heic needs pillow-heif" in capsys.readouterr().err


def test_a_picture_under_another_name_is_read_by_its_contents(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).save(buffer, "PNG")
    (tmp_path / "x.gif").write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(open_source(tmp_path)[0].image, picture(1))
    (tmp_path / "x.gif").write_bytes(b"GIF89a" + bytes(20))
    with pytest.raises(InputError, match=r"Cannot decode .*x\.gif"):
        open_source(tmp_path, convert=True)[0]


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(np.full((16, 16, 3), 120, np.uint8))).save(tmp_path / "x.heic")
    source = open_source(tmp_path)
    assert source.lossy and abs(int(source[0].image.mean()) - 120) < 4
