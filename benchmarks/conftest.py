"""Makes benchmarks run one at a time, since the test suite runs in parallel by default."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if config.option.benchmark_only and hasattr(config.option, "numprocesses"):
        config.option.numprocesses = 0
