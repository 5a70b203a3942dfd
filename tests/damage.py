"""Damage what commands read, drawn from a seed, and see whether they end as they should.

    OMP_NUM_THREADS=1 python tests/damage.py --cases 500 --seed 1 [--only NAME …]

JSON and YAML get wrong types, values out of range, missing keys and broken text; other files flipped, missing and
added bytes; arrays and tensors other types, shapes and values. Whatever reads them (`damage_targets.py`) must end with
code 0, or with code 2 and one paragraph, within a minute. Each case is a process of its own. Exits with 1 when one is
not so.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from tqdm import tqdm

from sit_atconv.errors import exit_on_input_error

Damage = Callable[[bytes, np.random.Generator], bytes]
SECONDS, LONGEST = 60, 3_000  # of a case; of a paragraph

WRONG: list[Any] = [
    None, True, -1, 0, 1, 3, 10**9, 10**30, -0.5, 1e-300, 1e308, float("nan"), float("inf"), "", "x", "\x00", "../..",
    [], [1], [[]], ["x", None], {}, {"x": 1}, [3, 3], [[1, "x"]],
]  # fmt: skip
DEEP = b"[" * 100_000 + b"]" * 100_000
TEXTS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"\xff\xfe{}",
    b'{"a": NaN}',
    b"9" * 5_000,
    DEEP,
    b'{"a":' + DEEP + b"}",
]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within nested sections and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def damaged(value: Any, random: np.random.Generator) -> Any:
    """A copy in which one value is wrong or missing."""
    copy = json.loads(json.dumps(value))
    found = list(places(copy))
    *path, key = found[random.integers(len(found))]
    inner = copy
    for step in path:
        inner = inner[step]
    if random.random() < 0.15 and isinstance(inner, dict):
        del inner[key]
    else:
        inner[key] = WRONG[random.integers(len(WRONG))]
    return copy


def damaged_text(content: bytes, random: np.random.Generator) -> bytes:
    """JSON in which one value is wrong or missing or, one time in four, what is no such JSON at all."""
    if random.random() < 0.25:
        return TEXTS[random.integers(len(TEXTS))]
    return json.dumps(damaged(json.loads(content), random)).encode()


def damaged_bytes(content: bytes, random: np.random.Generator) -> bytes:
    """Bits flipped, a part cut out, zeroed or added, or the end missing; half the time near one of the two ends."""
    if random.random() < 0.05:
        return TEXTS[random.integers(len(TEXTS))]
    changed, size = bytearray(content), len(content)
    near = [range(min(400, size)), range(max(0, size - 400), size), range(size), range(size)][random.integers(4)]
    place = int(random.choice(near)) if size else 0
    length = int(random.integers(1, 64))
    match random.integers(5):
        case 0:
            return content[:place]
        case 1:
            changed[place : place + length] = b""
        case 2:
            changed[place : place + length] = bytes(length)
        case 3:
            changed[place:place] = random.bytes(length)
        case _:
            for at in random.choice(near, min(length, len(near))):
                changed[at] ^= 1 << int(random.integers(8))
    return bytes(changed)


_VALUES = [np.nan, np.inf, -1, 0, 10**18, 3e38]


def changed_array(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One of another type or shape, or with other values."""
    changes: list[Callable[[], np.ndarray]] = [
        lambda: array.astype(random.choice(["f2", "f4", "f8", "i1", "i8", "u8", "?", "c8", "M8[s]", "S3", "U3"])),
        lambda: array.astype(object),
        lambda: np.zeros(array.shape, random.choice(["U0", "V0", "V5"])),
        lambda: np.array(random.choice(_VALUES)),
        lambda: array[..., None],
        lambda: array.reshape(-1),
        lambda: array.T,
        lambda: np.atleast_1d(array)[:0],
        lambda: np.atleast_1d(array)[:1],
        lambda: np.concatenate([array.reshape(-1)] * 2),
        lambda: array.astype(array.dtype.newbyteorder()),
        lambda: np.full(array.shape, random.choice(_VALUES)),
        lambda: np.asfortranarray(array),
    ]
    return changes[random.integers(len(changes))]()


def damaged_array(content: bytes, random: np.random.Generator) -> bytes:
    """An npz in which one array is another, or missing."""
    arrays = dict(np.load(io.BytesIO(content)))
    name = str(random.choice(sorted(arrays)))
    arrays[name] = changed_array(arrays[name], random)
    if random.random() < 0.1:
        del arrays[name]
    file = io.BytesIO()
    (np.savez if random.random() < 0.5 else np.savez_compressed)(file, **arrays)
    return file.getvalue()


def rewritten_array(content: bytes, random: np.random.Generator) -> bytes:
    """An npy that holds another array."""
    file = io.BytesIO()
    np.save(file, changed_array(np.load(io.BytesIO(content)), random))
    return file.getvalue()


_KINDS = [torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
_KINDS += [torch.float8_e4m3fn, torch.uint8]


def changed_tensor(tensor: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """One of another type or shape, or with other values."""
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.to(_KINDS[random.integers(len(_KINDS))]),
        lambda: torch.full(tensor.shape, float(random.choice(_VALUES))),
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.t() if tensor.ndim == 2 else tensor.flatten()[:1],
        lambda: tensor[:0],
        lambda: tensor[:-1],
        lambda: torch.tensor(1.5),
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        lambda: torch.where(torch.from_numpy(random.random(tensor.shape) < 0.1), torch.nan, tensor.float()),
    ]
    return changes[random.integers(len(changes))]()


def damaged_tensors(content: bytes, random: np.random.Generator) -> bytes:
    """A safetensors file in which one tensor is another, missing, or called otherwise."""
    tensors = load(content)
    name = str(random.choice(sorted(tensors)))
    tensor = tensors.pop(name)
    match random.integers(6):
        case 0:
            pass
        case 1:
            tensors[f"{name}.x"] = tensor
        case _:
            tensors[name] = changed_tensor(tensor, random)
    return save({key: value.contiguous() for key, value in tensors.items()})


def damaged_release(content: bytes, random: np.random.Generator) -> bytes:
    """A checkpoint of torch in which a tensor, an argument or the whole is something else."""
    values = torch.load(io.BytesIO(content), weights_only=True)
    part = values[str(random.choice(["ema", "ema", "ema", "args"]))]
    name = str(random.choice(sorted(part)))
    others: list[Callable[[], Any]] = [
        lambda: part[name].to_sparse(),
        lambda: torch.empty(part[name].shape, device="meta"),
        lambda: torch.ones(1).expand(10**6, 10**6),
        lambda: torch.nn.Parameter(part[name].double()),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: WRONG[random.integers(len(WRONG))],
        lambda: changed_tensor(part[name], random),
        lambda: changed_tensor(part[name], random),
        lambda: changed_tensor(part[name], random),
    ]
    if not isinstance(part[name], torch.Tensor):
        part[name] = WRONG[random.integers(len(WRONG))]
    elif random.random() < 0.2:
        part[str(random.choice([f"{name}.x", "blocks.x.y", "blocks.10000000000.attn.qkv.weight", ""]))] = part.pop(name)
    else:
        part[name] = others[random.integers(len(others))]()
    if random.random() < 0.1:
        values[str(random.choice(sorted(values)))] = WRONG[random.integers(len(WRONG))]
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=bool(random.random() < 0.7))
    return file.getvalue()


def damage(target: Any, random: np.random.Generator) -> str:
    """Damage the file of a `Target`, or one of those in its folder; returns what was done."""
    files = sorted(path for path in target.file.rglob("*") if path.is_file()) if target.file.is_dir() else [target.file]
    file = files[random.integers(len(files))]
    change = target.damages[random.integers(len(target.damages))]
    file.write_bytes(change(file.read_bytes(), random))
    return f"{change.__name__} of {file.name}"


def complaint(code: int | None, error: str) -> str | None:
    """What is wrong with how a command ended (None: it did not); None where nothing is."""
    if code is None:
        return f"not done after {SECONDS} seconds"
    if code not in (0, 2) or "Traceback" in error:
        return f"code {code}"
    said = [line for line in error.splitlines() if "error: " in line]
    if code == 2 and not (said and len(said[-1]) < LONGEST):
        return "code 2 without a paragraph"
    return None


def _run(make: Callable[[Path], Any], folder: Path, seed: tuple[int, int]) -> None:
    with (folder / "stderr").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        (folder / "place").mkdir()
        target = make(folder / "place")
        done = damage(target, np.random.default_rng(seed))
        (folder / "done").write_text(done)
        os.truncate(file.fileno(), 0)
        try:
            with exit_on_input_error():
                target.use()
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None


def try_case(make: Callable[[Path], Any], seed: tuple[int, int], folder: Path) -> str | None:
    """Damage and use what `make` makes, in a process of its own; what is to be complained of, or None."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(make, folder, seed))
    process.start()
    process.join(2 * SECONDS)
    code, error = process.exitcode, (folder / "stderr").read_text(errors="replace")
    process.kill()
    found = complaint(code, error)
    done = (folder / "done").read_text() if (folder / "done").exists() else "before the damage"
    return found and f"{done}: {found}\n{error[-2_000:]}"


def main() -> None:
    """The command."""
    from damage_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=500, help="of all kinds together (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[make.__name__ for make in TARGETS], metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets = [make for make in TARGETS if make.__name__ in options.only]
    tried, failed, begun = Counter(), Counter(), time.monotonic()
    for make in targets:  # undamaged, all of it works; and what is imported now is there for every case
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder)).use()
    for number in tqdm(range(options.cases), unit="input"):
        make = targets[number % len(targets)]
        tried[make.__name__] += 1
        with tempfile.TemporaryDirectory() as folder:
            if found := try_case(make, (options.seed, number), Path(folder)):
                failed[make.__name__] += 1
                sys.stdout.write(f"{make.__name__}, case {number}: {found}\n")
                sys.stdout.flush()
    for name, count in tried.items():
        sys.stdout.write(f"{name:<24} {count} damaged inputs, {failed[name]} ended badly\n")
    sys.stdout.write(f"{options.cases} in {time.monotonic() - begun:.0f} s: {failed.total()} ended badly\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
