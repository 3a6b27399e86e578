"""The wheel that users install is complete, and works beside a package named `kernels`."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).parent.parent
BUILD = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"


def build(kind, source, out):
    subprocess.run(
        [sys.executable, "-c", BUILD, kind, out], cwd=source, check=True, capture_output=True
    )
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds a wheel from the unpacked sdist, as an installer does that finds no wheel."""
    tmp = tmp_path_factory.mktemp("build")
    source = tmp / "source"
    source.mkdir()
    for name in ("fastbn", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # These folders lie beside the package and must not get into the wheel.
    for name in ("tests", "benchmarks", "build"):
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (tmp / "sdist").mkdir()
    (tmp / "wheel").mkdir()
    with tarfile.open(build("sdist", source, tmp / "sdist")) as sdist:
        sdist.extractall(tmp / "unpacked", filter="data")
    (unpacked,) = (tmp / "unpacked").iterdir()
    return build("wheel", unpacked, tmp / "wheel")


def test_the_wheel_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"fastbn-{fastbn.__version__}.dist-info/METADATA").decode()
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastbn").rglob("*.py")}
    expected |= {f"fastbn/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert names == expected | {"fastbn/py.typed"}
    assert f"Version: {fastbn.__version__}\n" in metadata
    assert "Requires-Dist: torch>=2.11\n" in metadata
    assert "License-File: LICENSE" in metadata


def test_the_wheel_works_beside_a_package_named_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("name = 'the other one'\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import kernels, fastbn, fastbn.kernels.plan, torch\n"
        "bn = fastbn.FusedBatchNorm2d(3)\n"
        "print(kernels.name, fastbn.__file__, bn(torch.randn(2, 3, 4, 4)).shape, sep='\\n')\n"
        "print(fastbn.explain(bn, torch.randn(2, 3, 4, 4)).backend)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(site), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "the other one",
        str(site / "fastbn" / "__init__.py"),
        "torch.Size([2, 3, 4, 4])",
        "triton",
    ], done.stderr
