"""The members of a plain tar: where each begins, so that one can be read without unpacking the others."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from sit_atconv.errors import InputError

_BLOCK = 512
_LOOKED_AT = 1 << 20  # bytes after the end that must be zeros
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class Member(NamedTuple):
    """A member of a tar: its name, and the range of its bytes in the file."""

    name: str
    start: int
    size: int
    is_folder: bool


def refuse_compressed(file: BinaryIO, path: str) -> None:
    """Raise `InputError` for a compressed tar: to read one picture, everything before it would be unpacked."""
    begin = file.read(6)
    for magic, program in _COMPRESSED.items():
        if begin.startswith(magic):
            raise InputError(
                f"{path} is compressed, so single pictures cannot be read from it. Unpack it to a plain tar once, "
                f"which is hardly larger: {program} -k {path}"
            )


def read_members(file: BinaryIO, where: str) -> Iterator[Member]:
    """Files and folders of a tar in their order; of a tar within it, those that it holds, in a folder called like it.

    `where` names it in errors. Raises `InputError` when it is truncated or damaged, when another tar was joined to it,
    and for links and members of other kinds, which are not files with all their bytes.
    """
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # where it would keep all of them
                if info.issparse() or not (info.isreg() or info.isdir()):
                    raise InputError(
                        f"{where}: {info.name} is a link or another file without all its bytes. Write the tar again, "
                        "with tar's options --dereference --hard-dereference and without --sparse."
                    )
                if not info.name.endswith(".tar"):
                    yield Member(info.name, info.offset_data, info.size, info.isdir())
                    continue
                for name, start, size, is_folder in read_members(tar.extractfile(info), f"{where}/{info.name}"):
                    inner = f"{info.name.removesuffix('.tar')}/{name}"
                    yield Member(inner, info.offset_data + start, size, is_folder)
            _require_end(file, tar.offset, where)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is no tar, truncated or damaged ({error}). Was its download complete?") from error


def _require_end(file: BinaryIO, offset: int, where: str) -> None:
    """A tar ends with a block of zeros, after which only zeros may follow; tarfile also ends at a damaged header."""
    file.seek(offset)
    rest = file.read(_LOOKED_AT)
    if len(rest) < _BLOCK:
        raise InputError(f"{where} is truncated: it lacks its end. Was its download complete?")
    if rest[:_BLOCK].strip(b"\0"):
        raise InputError(f"{where} is damaged: byte {offset:,} begins no member. Fetch or write it again.")
    if rest.strip(b"\0"):
        raise InputError(
            f"{where} goes on after its end: several tars were joined, of which the first alone would be read. Give "
            "them one by one, or join them by tar --concatenate."
        )
