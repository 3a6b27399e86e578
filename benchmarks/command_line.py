"""The parts that commands share: the option `--out`, and the text of an error in one line."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_with_out(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, files: str
) -> argparse.Namespace:
    """Parses options after adding `--out`, the folder for these files, and makes the folder."""
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results",
        help=f"folder for {files} (%(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"argument --out: expected a folder, not {options.out}: {problem.strerror}")
    return options


def in_one_line(problem: BaseException) -> str:
    """Returns an exception's type and the first line of what it says."""
    return f"{type(problem).__name__}: {(str(problem).strip() or 'no message').splitlines()[0]}"
