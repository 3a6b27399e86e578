"""Runs the tests that only a GPU can run."""

from .step import Context
from .suite import run_tests


def run(context: Context) -> None:
    # A rehearsal can only check that such tests are found and skipped.
    files = ["tests/test_torch_ops.py", "tests/test_addressing.py"] if context.rehearse else []
    run_tests(context, "-m", "gpu", *files)
