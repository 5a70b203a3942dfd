"""Checkpoints with more in them than weights, and those of DiT, which has the tensors of a SiT."""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from released_sources import random_state
from test_convert import REPA, SIT, require_equal

from sit_atconv.convert import load_released
from sit_atconv.convert.__main__ import main
from sit_atconv.convert.checkpoint import read_released
from sit_atconv.errors import InputError
from sit_atconv.models import SiT


def test_what_programs_keep_beside_weights_is_read(tmp_path: Path) -> None:
    """numpy's scalars, paths and default dictionaries are as harmless as numbers, text and dictionaries."""
    rates = defaultdict(list, lr=[np.float64(1e-4), np.float32(2.5)])
    arguments = argparse.Namespace(
        data_path=Path("/data"), num_classes=np.int64(5), image_size=np.int64(64), seed=np.array([3, 4])
    )
    state = random_state(REPA)
    for zipped in (True, False):
        content = {"ema": state, "args": arguments, "log": rates, "best": np.float64(7.5)}
        torch.save(content, tmp_path / "0400000.pt", _use_new_zipfile_serialization=zipped)
        require_equal(load_released(tmp_path / "0400000.pt", 4), REPA, state)
        read = read_released(tmp_path / "0400000.pt").arguments
        assert (str(read["data_path"]), read["num_classes"], list(read["seed"])) == ("/data", 5, [3, 4])


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "003-DiT-B-4/checkpoints/0400000.pt", "fast_dit_S2.pt"])
def test_a_dit_is_refused_by_the_name_of_its_file(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(random_state(SIT), path)
    with pytest.raises(SystemExit) as error:
        main([str(path), str(tmp_path / "out"), "--num-heads", "4"])
    assert error.value.code == 2 and "checkpoint of DiT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main([str(path), str(tmp_path / "out"), "--num-heads", "4", "--layout", "sit"])
    require_equal(SiT.from_pretrained(tmp_path / "out"), SIT, random_state(SIT))


def test_a_dit_is_refused_by_its_arguments_which_know_better_than_the_file(tmp_path: Path) -> None:
    for model, named in (("DiT-L/2", True), ("SiT-L/2", False)):
        content = {"ema": random_state(SIT), "args": argparse.Namespace(model=model)}
        torch.save(content, tmp_path / "DiT-L-2.pt")
        for source in (content, tmp_path / "DiT-L-2.pt"):
            if named:
                with pytest.raises(InputError, match=r"its arguments name the model DiT-L/2.*--layout"):
                    load_released(source, 4)
            else:
                require_equal(load_released(source, 4), SIT, random_state(SIT))


def test_a_zip_whose_end_is_damaged_is_named(tmp_path: Path) -> None:
    """Python's zipfile raises an error for it where it is asked whether the file is a zip."""
    path = tmp_path / "released.pt"
    torch.save(random_state(SIT), path)
    content = bytearray(path.read_bytes())
    locator = content.index(b"PK\x06\x07")  # of the end of a zip64: the last four bytes are its number of disks
    content[locator + 16 : locator + 20] = b"\x09\x00\x00\x00"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"released\.pt is damaged"):
        load_released(path, 4)
