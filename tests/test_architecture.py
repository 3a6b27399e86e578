"""The house of the code: who may import whom, and where kernels are launched."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module of fastbn and the siblings that it may import: only ones below it.
BELOW = {
    "layout": {"kernels"},
    "reference": set(),
    "backend": set(),
    "counters": set(),
    "launch": {"kernels", "counters"},
    "calls": {"kernels", "launch", "layout"},
    "run": {"calls", "counters"},
    "ops": {"calls", "run", "layout"},
    "recall": {"calls", "backend", "layout"},
    "autograd": {"calls", "run", "ops", "recall", "backend", "reference", "layout"},
    "functional": {"autograd", "backend", "reference"},
    "modules": {"functional"},
    "explain": {"kernels", "backend", "launch", "calls", "autograd", "functional", "modules"},
    "__init__": {"backend", "explain", "functional", "modules"},
}


def imports(path):
    """Names of all modules that a file imports; relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module.strip("."):
                yield module
                yield from (f"{module}.{alias.name}" for alias in node.names if module == "fastbn")
            else:
                yield from (module + alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "fastbn").glob("*.py")), ids=lambda p: p.stem)
def test_imports_go_downward(path):
    siblings = {name[1:].split(".")[0] for name in imports(path) if name.startswith(".")}
    assert siblings <= BELOW[path.stem]


def test_nothing_is_above_itself():
    done = set()
    for name, below in BELOW.items():
        assert below <= done | {"kernels"}, name
        done.add(name)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_triton_and_nothing_else(path):
    allowed = {"triton", "__future__", "dataclasses", "functools", "math"}
    for name in imports(path):
        assert name.startswith(".") or name.split(".")[0] in allowed, name
        assert not name.startswith("..")


@pytest.mark.parametrize("name", ["plan", "tiling", "device", "__init__"])
def test_the_planner_needs_no_triton(name):
    assert not any("triton" in module for module in imports(ROOT / "kernels" / f"{name}.py"))


def test_one_way_to_the_kernels():
    """Kernels go to launchers, launchers to calls, which operators and autograd run."""
    for path in (ROOT / "fastbn").glob("*.py"):
        names = set(imports(path))
        assert ("_fwd_kernel" in path.read_text()) == (path.stem == "calls"), path
        assert (".launch" in names) == (path.stem in ("calls", "explain")), path
        assert (".run" in names) == (path.stem in ("ops", "autograd")), path


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_examples_and_benchmarks_use_the_public_api(folder):
    private = {
        "run",
        "calls",
        "counters",
        "ops",
        "recall",
        "autograd",
        "backend",
        "launch",
        "layout",
        "modules",
        "reference",
    }
    # Whoever forces a strategy makes fastbn forget the calls that were planned without.
    except_for = {("forced", "fastbn.recall")}
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            private_parts = parts[0] == "fastbn" and private & set(parts)
            assert not private_parts or (path.stem, name) in except_for, f"{path}: {name}"
