"""mypy finds no error in the package, and in a user's code all the errors that are there."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_mypy_finds_only_the_marked_errors(tmp_path):
    """Checks the package as users have it, with the kernels inside."""
    shutil.copytree(ROOT / "fastbn", tmp_path / "fastbn")
    shutil.copytree(ROOT / "kernels", tmp_path / "fastbn" / "kernels")
    shutil.copy(ROOT / "tests" / "typed_usage.py", tmp_path)
    # The cache is kept from run to run, since most of the time goes into PyTorch's own types.
    settings = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
    command = ["-m", "mypy", *settings, "fastbn", "typed_usage.py"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
