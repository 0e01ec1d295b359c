import pkgutil
import subprocess
import sys

import pytest

import mopcompress


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("name", mopcompress.__all__)
def test_every_public_name_resolves_to_what_can_be_called(name):
    assert callable(getattr(mopcompress, name))
    assert getattr(mopcompress, name).__name__ == name


def test_no_public_name_is_also_a_module():
    """Importing a module would put it in the place of the name."""
    modules = {module.name for module in pkgutil.iter_modules(mopcompress.__path__)}
    assert not modules & set(mopcompress.__all__)


def test_the_public_names_are_these():
    assert mopcompress.__all__ == [
        "bench",
        "compress_model",
        "evaluate",
        "fit",
        "load_examples",
        "load_model",
        "load_recipe",
        "MopConfig",
        "MopError",
        "MopForCausalLM",
        "write_report",
    ]


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mopcompress.nonsense  # noqa: B018


def test_the_package_costs_nothing_to_import():
    heavy = {"torch", "transformers", "datasets", "pydantic", "matplotlib"}
    assert not heavy & set(python("import sys, mopcompress; print(*sys.modules)"))


def test_recipes_rows_and_reports_never_load_torch():
    modules = "mopcompress.recipe, mopcompress.results, mopcompress.storage.artifacts, mopcompress.report"
    code = f"import sys, {modules}; print(*sys.modules)"
    assert not {"torch", "transformers", "datasets"} & set(python(code))
