"""benchmarks/sync/README.md says what the model says, and the commands in it run."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.sync import model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "benchmarks" / "sync" / "README.md").read_text()


def test_the_readme_shows_the_models_table():
    assert model.table() in PAGE


def test_the_choice_follows_from_the_model():
    for channels in (64, 2048):
        for ranks in model.RANKS:
            gathered, reduced = model.gathered(ranks, channels), model.reduced(ranks, channels)
            assert (gathered < reduced) == (ranks <= 32)
    assert model.gathered(8, 256) < 0.6 * model.reduced(8, 256)
    # The number of GPUs at which the two cost the same hardly depends on the bandwidth.
    slow = model.Network(bytes_between=50e9)
    assert model.all_gather(32, 2048, slow) < 2 * model.all_reduce(32, 1024, slow)


def test_the_picture_is_drawn(tmp_path):
    assert model.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "sync.png").stat().st_size > 20_000


def test_the_command_measures_two_processes():
    """The messages have 3 C + 1 and 2 C numbers, and errors are no larger than rounding makes."""
    command = [sys.executable, "-m", "benchmarks.sync", "--processes", "2", "--seconds", "0"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"a process | 2 | {4 * (5 * 64 + 1):,} |" in done.stdout
    (line,) = [
        line for line in done.stdout.splitlines() if line.startswith("| float64, some empty")
    ]
    assert all(float(cell) < 1e-13 for cell in line.split("|")[2:-1])
