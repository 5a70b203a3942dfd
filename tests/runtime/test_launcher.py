"""What a launcher was told and does not hand on is read from its command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from sit_atconv.runtime.launcher import _told

ROOT = Path(__file__).parents[2]
OPTION = "gradient_accumulation_steps"
CHILD = (
    "from sit_atconv.runtime.launcher import Setting, require_same_from_launcher\n"
    f"require_same_from_launcher(Setting('{OPTION}', '1', 'training.accumulation', 2))"
)
LAUNCHER = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {CHILD!r}]).returncode)"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (f"/bin/python /bin/accelerate launch --{OPTION} 4 train.py", "4"),
        ("/bin/python /bin/accelerate-launch --cpu --gradient-accumulation-steps=4 train.py", "4"),
        (f"python -m accelerate.commands.launch --multi_gpu --{OPTION} 4 train.py --run r", "4"),
        (f"python /x/accelerate/commands/launch.py --{OPTION} 4 train.py", "4"),
        (f"python /bin/accelerate launch --{OPTION}", None),
        ("python /bin/accelerate launch train.py", None),
        (f"python /bin/accelerate test --{OPTION} 4", None),
        (f"bash launch --{OPTION} 4", None),
        ("", None),
    ],
)
def test_the_command_line_of_a_launcher(words: str, told: str | None) -> None:
    assert _told(OPTION, words.split()) == told


def test_micro_batches_that_the_launcher_was_told_are_compared(tmp_path: Path) -> None:
    script = tmp_path / "accelerate"  # its name and words are what a process sees of its parent
    script.write_text(LAUNCHER)
    command = [sys.executable, str(script), "launch", f"--{OPTION}", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and f"told --{OPTION} 4" in done.stderr and "which is 2 here" in done.stderr
