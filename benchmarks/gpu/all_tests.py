"""Runs the rest of the test suite, with its kernels on the GPU."""

from .step import Context
from .suite import run_tests


def run(context: Context) -> None:
    run_tests(context, "-m", "not gpu", *(["tests/test_plan.py"] if context.rehearse else []))
