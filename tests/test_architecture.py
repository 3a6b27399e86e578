"""The structure of the code: who may import whom, and where kernels are launched."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module of fastbn and the modules that it may import, all of which come earlier.
# "kernels" stands for the whole folder, which imports nothing of fastbn.
BELOW = {
    "activations": set(),
    "backend": set(),
    "strategy": {"backend"},
    "reference": {"activations"},
    "tracking": {"reference"},
    "runtime.__init__": set(),
    "runtime.support": {"backend"},
    "runtime.layout": {"kernels"},
    "runtime.device": {"kernels"},
    "runtime.workspace": set(),
    "runtime.launcher": {"runtime.device", "runtime.workspace"},
    "runtime.execution_plan": {
        "kernels",
        "runtime.device",
        "runtime.launcher",
        "runtime.layout",
        "strategy",
    },
    "runtime.execution": {"runtime.execution_plan", "runtime.workspace"},
    "runtime.plan_cache": {"runtime.execution_plan", "runtime.layout", "runtime.support"},
    "runtime.torch_ops": {"runtime.execution", "runtime.execution_plan", "runtime.layout"},
    "runtime.sync_ops": {
        "runtime.execution",
        "runtime.execution_plan",
        "runtime.layout",
        "runtime.torch_ops",
        "runtime.workspace",
    },
    "native": {"reference", "runtime.layout", "runtime.support"},
    "autograd": {
        "activations",
        "reference",
        "runtime.execution",
        "runtime.execution_plan",
        "runtime.layout",
        "runtime.plan_cache",
        "runtime.support",
        "runtime.torch_ops",
        "strategy",
    },
    "functional": {
        "activations",
        "autograd",
        "backend",
        "native",
        "runtime.execution",
        "runtime.execution_plan",
        "runtime.plan_cache",
        "runtime.support",
        "runtime.torch_ops",
        "strategy",
        "tracking",
    },
    "fx": {"activations"},
    "recomputation": set(),
    "act_layers": {"activations"},
    "modules": {"act_layers", "activations", "functional", "fx", "recomputation"},
    "sync.collectives": set(),
    "sync.steps": {"activations", "reference", "runtime.layout"},
    "sync.autograd": {
        "activations",
        "reference",
        "runtime.layout",
        "runtime.support",
        "runtime.sync_ops",
        "sync.collectives",
        "sync.steps",
    },
    "sync.functional": {
        "activations",
        "functional",
        "runtime.support",
        "runtime.sync_ops",
        "sync.autograd",
        "sync.collectives",
        "sync.steps",
    },
    "sync.modules": {"modules", "sync.functional"},
    "sync.convert": {"modules", "sync.modules"},
    "sync.__init__": {"sync.convert", "sync.modules"},
    "models.generated": set(),
    "models.kinds": {"activations", "models.generated", "modules"},
    "models.fused": {"activations", "models.generated", "models.kinds", "modules"},
    "models.frozen": {"modules"},
    "models.norm_types": {"models.frozen", "models.generated", "modules"},
    "models.freezing": {"models.frozen", "models.generated", "models.norm_types"},
    "models.watching": set(),
    "models.tracing": {"models.kinds", "models.watching"},
    "models.steps": {"models.fused", "models.kinds"},
    "models.chains": {"models.fused", "models.kinds", "models.steps"},
    "models.graph_modules": {"models.chains", "models.fused", "models.steps"},
    "models.sequential": {"models.fused", "models.kinds", "models.generated"},
    "models.variants": {
        "models.chains",
        "models.fused",
        "models.kinds",
        "models.steps",
        "models.tracing",
        "models.watching",
    },
    "models.owners": {
        "models.fused",
        "models.kinds",
        "models.generated",
        "models.tracing",
        "models.variants",
    },
    "models.report": {
        "activations",
        "kernels",
        "models.chains",
        "models.fused",
        "models.kinds",
        "models.generated",
        "models.owners",
        "models.sequential",
        "modules",
        "runtime.layout",
    },
    "models.__init__": {
        "models.freezing",
        "models.graph_modules",
        "models.generated",
        "models.norm_types",
        "models.owners",
        "models.sequential",
        "sync.convert",
    },
    "explain": {
        "activations",
        "backend",
        "functional",
        "kernels",
        "models.report",
        "modules",
        "runtime.device",
        "runtime.layout",
        "runtime.support",
        "strategy",
        "sync.modules",
    },
    "__init__": {
        "backend",
        "explain",
        "functional",
        "models.__init__",
        "modules",
        "recomputation",
        "strategy",
        "sync.__init__",
    },
    "keras.requirements": set(),
    "keras.activations": {"keras.requirements"},
    "keras.layer": {"functional", "keras.activations", "keras.requirements"},
    "keras.conversion": {"keras.activations", "keras.layer", "keras.requirements"},
    "keras.__init__": {"keras.conversion", "keras.layer"},
}

# Public names of fastbn that are modules too.
PUBLIC = {"fastbn.explain", "fastbn.functional", "fastbn.keras"}


def modules(folder):
    """(dotted name, path) of all Python files in a folder and the folders below it."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT / folder).with_suffix("").parts), path


def files(folder):
    return pytest.mark.parametrize(
        ("name", "path"), [pytest.param(*found, id=found[0]) for found in modules(folder)]
    )


def imports(name, path, package):
    """Absolute names of everything that a file of a package imports.

    Of `from a import b` these are both `a` and `a.b`, since `b` may be a module.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = [package, *name.split(".")][: -node.level]
                assert parents, f"{path} imports from outside of its package"
                module = ".".join([*parents, *filter(None, [module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_modules(name, path):
    """The modules of fastbn, as `BELOW` names them, that one of its files imports."""
    for module in imports(name, path, "fastbn"):
        parts = module.split(".")
        if parts[0] != "fastbn":
            continue
        if parts[1:2] == ["kernels"]:
            yield "kernels"
        elif ".".join(parts[1:]) in BELOW:
            yield ".".join(parts[1:])
        elif parts[1:] in (["models"], ["sync"]) and not name.startswith(f"{parts[1]}."):
            yield f"{parts[1]}.__init__"


def test_every_module_has_its_place():
    assert {name for name, _ in modules("fastbn")} == set(BELOW)


@files("fastbn")
def test_imports_go_downward(name, path):
    assert set(imported_modules(name, path)) <= BELOW[name]


def test_no_module_is_above_itself():
    done = {"kernels"}
    for name, below in BELOW.items():
        assert below <= done, name
        done.add(name)


@files("kernels")
def test_kernels_import_triton_and_nothing_else(name, path):
    allowed = {"triton", "__future__", "dataclasses", "functools", "math", "typing", "kernels"}
    for module in imports(name, path, "kernels"):
        assert module.split(".")[0] in allowed, module


@pytest.mark.parametrize(
    "name",
    ["plan", "schedules", "prediction", "passes", "instructions", "tiling", "device", "__init__"],
)
def test_planner_needs_no_triton(name):
    found = imports(name, ROOT / "kernels" / f"{name}.py", "kernels")
    assert not any("triton" in module for module in found)


def test_one_way_to_the_kernels():
    """Plans hold launchers of kernels; operators, dispatch and autograd run plans, nobody else."""
    for name, path in modules("fastbn"):
        found = set(imported_modules(name, path))
        planner = name == "runtime.execution_plan"
        assert ("_fwd_kernel" in path.read_text()) == planner, path
        assert ("runtime.launcher" in found) == planner, path
        runs = name in ("runtime.torch_ops", "runtime.sync_ops", "autograd", "functional")
        assert ("runtime.execution" in found) == runs, path


# A case is planned as a tensor of its sizes would be.
EXCEPTIONS = {("plans", "fastbn.runtime.layout")}


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_examples_and_benchmarks_use_the_public_api(folder):
    """All but `benchmarks.gpu`, which proves what it times by the tests' own means."""
    private = {f"fastbn.{name}" for name in BELOW} - PUBLIC
    for name, path in modules(folder):
        if folder == "benchmarks" and name.startswith("gpu."):
            continue
        assert not any(module.startswith("tests") for module in imports(name, path, folder))
        found = private & set(imports(name, path, folder))
        assert all((name, module) in EXCEPTIONS for module in found), f"{path}: {found}"
