"""The docstrings of the public names: their sections are complete and their examples run."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
from report_runs import small_run
from tiny_models import saved, tiny_model

import mopcompress
from mopcompress import errors

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECTIONS = ("Args:", "Returns:", "Raises:", "Example:")
# a class takes arguments and raises only where it has a constructor of its own; an error is raised, not called
WITHOUT = {
    "MopConfig": {"Returns:", "Raises:"},
    "MopForCausalLM": {"Returns:"},
    "MopError": {"Args:", "Returns:", "Raises:"},
}


def split_sections(documentation: str) -> dict[str, str]:
    """Return the text of each section by its title."""
    sections: dict[str, str] = {}
    title = ""
    for line in inspect.cleandoc(documentation).splitlines():
        title = line if line in SECTIONS else title
        sections[title] = sections.get(title, "") + (line + "\n" if line not in SECTIONS else "")
    return sections


def entries(section: str) -> list[str]:
    """Return the names that a section describes, which are indented by four spaces."""
    return re.findall(r"^    (\S+?):", section, flags=re.MULTILINE)


def parameters(name: str) -> list[str]:
    signature = inspect.signature(getattr(mopcompress, name))
    return [parameter for parameter in signature.parameters if parameter != "self"]


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what examples name: a small model and the folder of a bench."""
    saved(tiny_model(), tmp_path / "runs" / "model")
    (tmp_path / "runs" / "bench").mkdir()
    small_run(tmp_path / "runs" / "bench", {"none": 3.0, "single": 2.0, "mop": 1.9})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize("name", mopcompress.__all__)
def test_the_example_of_every_public_name_runs(name: str) -> None:
    documentation = inspect.cleandoc(getattr(mopcompress, name).__doc__)
    example = doctest.DocTestParser().get_doctest(documentation, {}, name, None, None)
    assert example.examples
    output: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=output.append)
    assert results.failed == 0, "".join(output)


@pytest.mark.parametrize("name", mopcompress.__all__)
def test_every_public_name_has_all_sections(name: str) -> None:
    sections = split_sections(getattr(mopcompress, name).__doc__)
    assert [title for title in sections if title] == [title for title in SECTIONS if title not in WITHOUT.get(name, ())]
    assert all(text.strip() for text in sections.values())
    assert ">>>" in sections["Example:"]


@pytest.mark.parametrize("name", [name for name in mopcompress.__all__ if "Args:" not in WITHOUT.get(name, ())])
def test_every_argument_is_described_once_and_in_order(name: str) -> None:
    text: str = split_sections(getattr(mopcompress, name).__doc__)["Args:"]
    described = [name.strip("*") for name in entries(text)]
    assert described == parameters(name)


@pytest.mark.parametrize("name", mopcompress.__all__)
def test_named_errors_are_errors_of_the_package(name: str) -> None:
    text = split_sections(getattr(mopcompress, name).__doc__).get("Raises:", "")
    assert all(issubclass(getattr(errors, error), mopcompress.MopError) for error in entries(text))
