"""Proves fastbn on a GPU, settles the planner's decisions and measures it, in ten minutes.

At the end it prints a table of at most 80 lines, the most important first. It writes all
figures to gpu.json, and needs the folder tests/ of the repository. Its steps are:
"""

from __future__ import annotations

import argparse
import signal
import sys

from ..command_line import parse_with_out
from .digest import digest, ended_well
from .session import Session
from .steps import BUDGET, STEPS


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a step or a result failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__ + "\n".join(f"  {step.name:11} {step.what}" for step in STEPS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all steps (%(default).0f)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", choices=[step.name for step in STEPS],
        help="run these steps alone, with all the time",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true",
        help="run everything on the CPU at tiny sizes, to see that it works; figures mean nothing",
    )  # fmt: skip
    options = parse_with_out(parser, arguments, "gpu.json")
    if not options.rehearse and not _has_gpu():
        parser.error("no GPU is to be had here; --rehearse runs everything on the CPU")
    steps = [step for step in STEPS if options.only is None or step.name in options.only]
    session = Session(options.out, options.budget, options.rehearse)
    # A run that is stopped from outside prints the table of what it has found.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        session.run(steps)
    except KeyboardInterrupt:
        print("stopped from outside")
    found = session.as_dict()
    print("\n".join(digest(found, session.unsaved)), flush=True)
    return 0 if ended_well(found) and len(found["steps"]) == len(steps) else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
