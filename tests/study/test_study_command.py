"""The command as a user runs it: a cell that is killed, goes on, and is collected."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sit_atconv.runtime.lock import lock_folder
from sit_atconv.study.collect import collect
from sit_atconv.study.plan import read_plan

ROOT = Path(__file__).parents[2]
FILE = f"""
config: {ROOT / "configs" / "quickstart.yaml"}
set:
  model.hidden_size: 16
  model.depth: 2
  model.num_heads: 2
  training.batch_size: 8
  log.every: 1
  log.checkpoint_every: 1
  preview.every: null
  data.heldout: digits:heldout@16
  evaluation.loss: true
rows: {{atconv: {{model.name: SiT-ATConv-S/4}}}}
seeds: [0]
budgets: {{steps: 30}}
sampling: {{num-samples: 20, solver: euler, steps: 2}}
scores: [{{reference: 'digits:heldout@16', features: pixels}}]
"""


@pytest.mark.slow
def test_a_cell_that_was_killed_goes_on_and_is_collected(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(FILE)
    out = tmp_path / "out"
    at = out / "cells" / "atconv" / "steps-0"
    words = [sys.executable, "-m", "sit_atconv.study", str(tmp_path / "study.yaml"), "--out", str(out)]
    words += ["--cell", "atconv/steps-0"]
    there = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **there) as killed:
        while not (at / "run" / "checkpoints" / "latest").exists() and killed.poll() is None:
            time.sleep(0.02)
        killed.kill()
    with lock_folder(at, "run", "--out"):
        pass

    for again in range(2):
        done = subprocess.run(words, **there, check=True)
        assert f"atconv/steps-0 is done{' already' if again else ''}." in done.stderr
    said = (at / "log.txt").read_text()
    assert said.count("train.py") == 2 and "Continuing" in said
    assert said.count("evaluate_fid.py") == 1
    (cell,) = collect(read_plan(out / "study.yaml"), out, "").cells
    assert (cell.state, cell.steps, [point.step for point in cell.curve]) == ("done", 30, list(range(1, 31)))
    assert cell.heldout_loss == cell.curve[-1].heldout_loss is not None
    assert set(cell.scores) == {"fd_pixels", "precision_pixels", "recall_pixels"}
