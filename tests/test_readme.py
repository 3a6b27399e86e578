"""The README's code runs and prints what is shown, and its numbers are the planner's."""

import os
import re
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks import models, pictures
from benchmarks.shapes import BN_ADD_RELU, BN_RELU

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
OUTPUTS = [text for language, text in BLOCKS if not language]


def run(code, interpret):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tempfile.gettempdir(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_example_computes_what_its_comments_say():
    after = """
from torch.nn import functional as F

def batch_norm(x):
    return F.batch_norm(x, None, None, training=True)

torch.testing.assert_close(y, F.silu(batch_norm(F.relu(batch_norm(batch_norm(x)))) + x))
"""
    run(PYTHON[0] + after, interpret="0")


@pytest.mark.parametrize(("interpret", "output"), [*enumerate(OUTPUTS)], ids=["torch", "triton"])
def test_output_of_explain_is_real(interpret, output):
    assert run(PYTHON[2], str(interpret)) == output


def test_a_whole_model_is_fused_as_the_comment_says():
    printed = run(PYTHON[1], interpret="0").split("\n")
    claimed = re.search(r"# (\d+) norms: (\d+) .*, (\d+) .*, (\d+) plain", PYTHON[1])
    assert [line.split()[0] for line in printed[:4]] == list(claimed.groups())


def test_the_table_of_networks_is_the_benchmarks():
    known = {network.name: network.norms for network in models.NETWORKS}
    rows = re.findall(
        r"^\| (?:torchvision )?(.*?)(?:,.*)? ((?:\| \d+ ){4})\|$", README, re.MULTILINE
    )
    assert len(rows) == 6
    for name, cells in rows:
        act, both, add, plain = (int(cell) for cell in cells.split("|")[1:])
        assert (0, act, both, add, plain) == known[name], name


def numbers(cell):
    """Returns (forward, backward) from a cell such as "3 1/16 + 4"."""
    return tuple(sum(map(Fraction, part.split())) for part in cell.split("+"))


@pytest.mark.parametrize("epilogue", [BN_RELU, BN_ADD_RELU], ids=str)
def test_traffic_in_the_table_is_the_planners(epilogue):
    name = epilogue.name.replace("+", " + ")
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", README, re.MULTILINE)
    one, two, eager = map(numbers, line.split("|"))
    assert list(pictures.traffic(epilogue).values()) == [eager, two, one]


def test_programs_in_the_picture_start_once_channels_are_reduced():
    work = pictures.timeline()
    assert len(work) == 2 * pictures.SLICES * pictures.SLICE_GROUPS * pictures.SPLITS
    for slice in range(pictures.SLICES):
        reduced = [one.end for one in work if one.slice == slice and not one.applies]
        applied = [one.start for one in work if one.slice == slice and one.applies]
        assert len(reduced) == len(applied)
        assert sorted(applied)[len(applied) // 2] >= sorted(reduced)[len(reduced) // 2]
    assert all(one.start == one.drawn for one in work)  # as the README says, no program waits


def test_pictures_are_drawn_as_they_are_committed(tmp_path):
    assert pictures.main(["--out", str(tmp_path)]) == 0
    for name in ("traffic.png", "tickets.png"):
        assert f"benchmarks/images/{name}" in README
        drawn, committed = (folder / name for folder in (tmp_path, ROOT / "benchmarks" / "images"))
        assert drawn.stat().st_size == pytest.approx(committed.stat().st_size, rel=0.3)


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", *(f"{f}/README.md" for f in
             ("fastbn", "kernels", "benchmarks", "tests", "examples"))]
)  # fmt: skip
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([\w./-]+\.\w+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / path).parent / target).exists(), target


def test_versions_are_the_projects():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project
    assert '"torch>=2.11"' in project
    assert "triton>=3.6;" in project
    assert "Python 3.10, PyTorch 2.11 and Triton 3.6, or newer" in README
