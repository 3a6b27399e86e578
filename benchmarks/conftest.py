"""Benchmarks run one at a time: the test suite's parallel default is not for them."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if config.option.benchmark_only and hasattr(config.option, "numprocesses"):
        config.option.numprocesses = 0
