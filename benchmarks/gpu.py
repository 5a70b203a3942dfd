"""Everything that only a GPU can tell, in one command: `make gpu`, or `python -m benchmarks.gpu`.

Runs the tests marked gpu and the benchmarks, each in a process of its own with a limit on its time, and ends after
eight minutes at most. Run again, it goes on: finished parts are not repeated. A part that fails, or whose packages are
missing, is named, and the others go on. Installs nothing. Without a GPU it says so, and that is no failure.

OUT/PART.json and OUT/PART.log are of one part, OUT/parts.json says what became of each, and OUT/gpu.md is all of it as
tables for docs/performance.md.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_tables import write_tables
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.runtime.whole_files import write_json

ROOT = Path(__file__).parents[1]
SECONDS = 460  # eight minutes with what starting and writing take
_LEAST = 20  # seconds that are left, with which no part is begun: most of them import for half of it
_MISSING = re.compile(r"No module named '([\w.]+)'")


@dataclass(frozen=True)
class Part:
    """A command, without "python", and the seconds after which it has failed. OUT stands for the output folder.

    needs: a file without which the part is skipped.
    """

    words: str
    seconds: int
    needs: Path | None = None


def all_parts(weights: Path | None) -> dict[str, Part]:
    """The parts in order; `weights`: of Inception, if there are any.

    Sizes are for an H200: at 40 % of its 989 TFLOP/s, XL/2 takes 0.04 s forward and 0.12 s a step for 64 latents of
    32×32, so that starting Python, building models and compiling take most of some six minutes in all.
    """
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    tests = shlex.join(str(path.relative_to(ROOT)) for path in marked)
    three = "SiT-{0} SiT-Hybrid-{0} SiT-ATConv-{0}"
    parts = {
        "tests": Part(f"-m pytest -p no:cacheprovider -m gpu {tests}", 100),
        # bf16 is what models are trained and sampled in; without --dtypes it takes three times as long.
        "backends": Part("-m benchmarks.backends --dtypes bfloat16 --turns 9 --write --json OUT/backends.json", 170),
        "operator": Part("-m benchmarks.operator --turns 5 --json OUT/operator.json", 60),
        "block": Part("-m benchmarks.block --turns 5 --json OUT/block.json", 60),
        "model": Part("-m benchmarks.model --sizes B/2 XL/2 --latents 32 64 --turns 3 --json OUT/model.json", 90),
        "training": Part(
            "-m benchmarks.training --models SiT-XL/2 SiT-ATConv-XL/2 --settings plain --turns 5 "
            "--json OUT/training.json",
            100,
        ),
        "sampling": Part(
            "-m benchmarks.sampling --model SiT-ATConv-XL/2 --input-size 32 --batch-size 64 --labels 64 --steps 10 "
            "--json OUT/sampling.json",
            90,
        ),
        "evaluation": Part("-m benchmarks.evaluation --neighbours 50000 10000 --json OUT/evaluation.json", 60),
        "costs": Part(
            f"-m sit_atconv.study costs --models {three.format('B/2')} --mixers --turns 3 --json OUT/costs.json", 120
        ),
    }
    if weights is not None:
        file = shlex.quote(str(weights.resolve()))
        words = f"-m benchmarks.evaluation --weights {file} --count 512 --json OUT/inception.json"
        parts["inception"] = Part(words, 60, weights)
    return parts


def run_parts(parts: dict[str, Part], out: Path, gpu: str, seconds: float) -> dict[str, dict]:
    """Run the parts that are not done, within `seconds` in all, and note in OUT/parts.json what became of each.

    A part is "done", "failed", "skipped" or, where the time was up, "waiting". Raises `InputError` when the folder
    holds the results of another GPU.
    """
    until = time.monotonic() + seconds
    found = _read(out, gpu)
    for name, part in parts.items():
        command = f"python {part.words}"
        if found.get(name, {}).get("state") == "done" and found[name]["command"] == command:
            print(f"{name}: done before")
            continue
        print(f"{name}: {command}", flush=True)
        began = time.monotonic()
        found[name] = {"command": command, **_run(name, part, out, until)}
        found[name]["seconds"] = round(time.monotonic() - began, 1)
        print(f"{name}: {found[name]['state']} after {found[name]['seconds']} s. {found[name]['note']}", flush=True)
        write_json(out / "parts.json", {"gpu": gpu, "parts": found})
    return {name: found[name] for name in parts}


def _read(out: Path, gpu: str) -> dict[str, dict]:
    """What became of the parts before."""
    path = out / "parts.json"
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text())
        before, found = known["gpu"], dict(known["parts"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no file of this program ({error}). Remove it, or choose another --out.") from error
    if before != gpu:
        raise InputError(f"{out} holds the results of {before}, and this is {gpu}: choose another --out.")
    return found


def _run(name: str, part: Part, out: Path, until: float) -> dict[str, str]:
    """Run one part; its state, and a note with the reason or its last line."""
    if part.needs is not None and not part.needs.is_file():
        return {"state": "skipped", "note": f"There is no file {part.needs}."}
    left = until - time.monotonic()
    if left < _LEAST:
        return {"state": "waiting", "note": "The time is up: run the same command again."}
    words = [sys.executable, *shlex.split(part.words.replace("OUT/", f"{shlex.quote(str(out.resolve()))}/"))]
    log = out / f"{name}.log"
    with open(log, "wb") as file, _group(words, file) as process:
        try:
            code = process.wait(min(part.seconds, left))
        except subprocess.TimeoutExpired:
            if left < part.seconds:
                return {"state": "waiting", "note": "The time was up: run the same command again."}
            return {"state": "failed", "note": f"It took longer than {part.seconds} s."}
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    if code == 0:
        return {"state": "done", "note": lines[-1].strip()}
    if missing := _MISSING.search(lines[-1]):
        return {
            "state": "skipped",
            "note": f"The package {missing[1]} is missing: docs/performance.md says what to do.",
        }
    return {"state": "failed", "note": f"{lines[-1].strip()[:300]} (all of it: {log})"}


@contextlib.contextmanager
def _group(words: Sequence[str], output: object) -> Iterator[subprocess.Popen]:
    """A process that is killed at the end with all that it has started, such as a compiler's workers."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", metavar="DIR")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"end after these ({SECONDS}) at the latest")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="Inception's, to measure its features, too")
    options = parser.parse_args(argv)
    with exit_on_input_error():
        if not torch.cuda.is_available():
            print("There is no GPU here that torch can use, so there is nothing to measure.")
            return
        gpu = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        options.out.mkdir(parents=True, exist_ok=True)
        found = run_parts(all_parts(options.weights), options.out, gpu, options.seconds)
        write_tables(options.out, gpu, found)
        states = [part["state"] for part in found.values()]
        print(f"\n{', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))}: {options.out / 'gpu.md'}")
        sys.exit(1 if "failed" in states else 0)


if __name__ == "__main__":
    main()
