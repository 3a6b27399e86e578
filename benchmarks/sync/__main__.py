"""Measures norms that share statistics, in processes on this machine.

    python -m benchmarks.sync [--processes 2 4] [--seconds 2]

With enough GPUs the processes communicate by NCCL, and `nn.SyncBatchNorm` is measured too.
Otherwise they communicate by Gloo on the CPU, where `nn.SyncBatchNorm` refuses to train. The
command prints the largest errors against one process on the whole batch in float64, and then what
a training step of one norm sends and how long it takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch.multiprocessing as multiprocessing

from .measure import measure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sync",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4], help="2 4")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each norm (%(default)s)")
    options = parser.parse_args(arguments)
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (processes, f"{folder}/store", options.seconds)
            multiprocessing.spawn(measure, arguments, processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
