"""A limit on the size of files (`ulimit -f`): one line that names the file, or says what else it may be."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_fixtures import tiny_model

ROOT = Path(__file__).parents[2]
SAMPLE = "sample.py --checkpoint model --out out --num-samples 400 --steps 1 --solver euler --png"
PREPARE = "-m sit_atconv.data.prepare digits out --resolution 8 --vae identity --workers {}"
EVALUATE = "evaluate_fid.py --samples digits:train@8 --reference digits:heldout@8 --features pixels --cache out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kibibytes", "message"),
    [
        (SAMPLE, 4, r"File too large: 'out/partial/images\.npy' Raise the limit on the size of files \(ulimit -f\)"),
        (PREPARE.format(0), 8, r"File too large: 'out/shard-00000\.safetensors' Raise the limit"),
        (f"{EVALUATE} --workers 0", 8, r"File too large: 'out/.*\.safetensors' Raise the limit"),
        (SAMPLE, 0, r"No usable temporary directory.*ulimit -f"),
        (PREPARE.format(0), 0, r"No usable temporary directory.*ulimit -f"),
        # 4 KiB: torch 2.8 writes a file of 2 KiB when it is imported.
        # Shared memory counts as a file: DataLoader would wait for good for what could not be sent.
        (PREPARE.format(1), 4, r"A process that loads data \(pid \d+\) ended unexpectedly.*ulimit -f"),
    ],
)
def test_a_limit_on_the_size_of_files(tmp_path: Path, words: str, kibibytes: int, message: str) -> None:
    tiny_model().save_pretrained(tmp_path / "model")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes * 1024,) * 2)

    command = [str(ROOT / word) if word.endswith(".py") else word for word in words.split()]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    assert re.search(message, lines[0]), lines[0]
