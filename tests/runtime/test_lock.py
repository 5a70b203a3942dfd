"""The lock of a folder: what cannot be one."""

from pathlib import Path

import pytest

from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import lock_folder


@pytest.mark.parametrize("name", ["file", "file/below/it"])
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("somebody's")
    refused = pytest.raises(InputError, match=r"--out .* cannot be a folder, since .*/file is a file")
    with refused, lock_folder(tmp_path / name, "written", "--out"):
        pass
    assert (tmp_path / "file").read_text() == "somebody's"
