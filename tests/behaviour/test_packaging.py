"""The package imports on systems without POSIX modules, and its distributions are small, whole and runnable."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import mopcompress

ROOT = Path(__file__).parents[2]
SDIST_BYTES = 2_000_000
# Blocks POSIX modules for mopcompress alone: the standard library of this system needs them for itself.
IMPORT_ALL = """
import builtins, importlib, pkgutil, signal
import torch, transformers, datasets, filelock, matplotlib.pyplot, typer, lm_eval.api.model

BLOCKED = {"fcntl", "grp", "pwd", "readline", "resource", "termios"}
original = builtins.__import__

def without_posix(name, globals=None, *arguments, **more):
    if name in BLOCKED and (globals or {}).get("__name__", "").startswith("mopcompress"):
        raise ModuleNotFoundError(name)
    return original(name, globals, *arguments, **more)

builtins.__import__ = without_posix
del signal.SIGPIPE, signal.SIGKILL
import mopcompress
names = [module.name for module in pkgutil.walk_packages(mopcompress.__path__, "mopcompress.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


@pytest.mark.slow
def test_every_module_imports_without_the_modules_that_windows_lacks():
    imported = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=ROOT)
    assert imported.returncode == 0, imported.stderr
    assert int(imported.stdout) > 150


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist and the wheel that `python -m build` makes from it, with the build tools of this environment."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_sdist_is_small_and_has_what_a_packager_needs(distributions):
    sdist, _ = distributions
    assert sdist.stat().st_size < SDIST_BYTES
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "Makefile",
        "recipes/default.yaml",
        "tests/conftest.py",
    } <= names
    assert {Path(name).suffix for name in names if name.startswith("benchmarks/results/")} <= {"", ".svg"}  # a picture
    assert not [name for name in names if name.startswith(("runs", ".venv", "docs/_build"))]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_templates_alone(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"mopcompress/py.typed", "mopcompress/report/report.html.jinja", "mopcompress/report/report.css"} <= {*names}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mopcompress"}


@pytest.mark.slow
def test_an_installed_wheel_plans_a_bench_in_a_clean_environment(distributions, tmp_path):
    """Its dependencies are those of this environment, so that nothing is downloaded; the package is the wheel's."""
    _, wheel = distributions
    venv.create(tmp_path / "venv", with_pip=False)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    (clean,) = run(python, "import sysconfig; print(sysconfig.get_path('purelib'))", tmp_path)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(install, check=True, capture_output=True, env=environment)
    (here,) = run(Path(sys.executable), "import sysconfig; print(sysconfig.get_path('purelib'))", tmp_path)
    # A path alone: its own .pth files, among them that of an editable installation, are not read.
    (Path(clean) / "dependencies.pth").write_text(here)

    facts = "import mopcompress; print(mopcompress.__version__); print(mopcompress.__file__)"
    version, file = run(python, facts, tmp_path)
    assert version == mopcompress.__version__
    assert Path(file).is_relative_to(clean)
    planned = [scripts / "mopcompress", "bench", "--dry-run"]
    shown = subprocess.run(planned, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "sparsegpt" in shown.stdout
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        load = f"from pathlib import Path; from mopcompress import load_recipe; load_recipe(Path({str(recipe)!r}))"
        run(python, load, tmp_path)


def run(python: Path, code: str, folder: Path) -> list[str]:
    """The lines that `code` prints in a Python that sees no environment variables for Python."""
    command = [python, "-I", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout.splitlines()


def test_the_version_stands_in_one_place():
    assert f'__version__ = "{mopcompress.__version__}"' in (ROOT / "mopcompress" / "__init__.py").read_text()
    assert mopcompress.__version__ not in (ROOT / "pyproject.toml").read_text().split("[tool.ruff]")[0]


def test_the_citation_is_yaml_without_a_second_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "version" not in citation


def test_no_recipe_names_a_path_outside_the_repository():
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert "../" not in recipe.read_text(), recipe.name
