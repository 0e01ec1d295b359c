"""One policy for outputs that are there already, whatever the command."""

import json
from pathlib import Path

import pytest

from mopcompress.entrypoints.preflight import IRRELEVANT_FIELDS, completed_by_same_recipe
from mopcompress.entrypoints.resume_policy import confirm_finished, read_finished
from mopcompress.errors import DataError, InputNotFoundError, OutputError
from mopcompress.recipe import load_recipe, recipe_to_dict
from mopcompress.storage import artifacts


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    target = tmp_path / "out"
    with artifacts.publish(target, {"kind": "test", "recipe": recipe_to_dict(load_recipe(None))}) as scratch:
        (scratch / "file").write_text("content")
    return target


@pytest.mark.parametrize("resumable", [True, False])
def test_a_finished_output_is_read(finished: Path, resumable: bool) -> None:
    for resume in ("auto", "required"):
        manifest = read_finished(finished, resume, resumable=resumable)
        assert manifest is not None
        assert manifest["kind"] == "test"
    with pytest.raises(OutputError, match="exists already and --resume is never"):
        read_finished(finished, "never", resumable=resumable)


@pytest.mark.parametrize("resumable", [True, False])
def test_nothing_there_is_work_to_do(tmp_path: Path, resumable: bool) -> None:
    for resume in ("auto", "never"):
        assert read_finished(tmp_path / "out", resume, resumable=resumable) is None
    with pytest.raises(InputNotFoundError, match="--resume required: nothing finished"):
        read_finished(tmp_path / "out", "required", resumable=resumable)


def test_interrupted_work_counts_when_it_is_resumable(tmp_path: Path) -> None:
    artifacts.job_folder(tmp_path / "out").mkdir()
    for resume in ("auto", "required"):
        assert read_finished(tmp_path / "out", resume, resumable=True) is None
    with pytest.raises(OutputError, match=r"is begun in .* --resume is never"):
        read_finished(tmp_path / "out", "never", resumable=True)
    assert read_finished(tmp_path / "out", "never", resumable=False) is None
    with pytest.raises(InputNotFoundError):
        read_finished(tmp_path / "out", "required", resumable=False)


def test_another_folder_or_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("folder", "file"):
        with pytest.raises(OutputError, match="holds no result of this"):
            read_finished(tmp_path / name, "auto", resumable=True)


def test_a_confirmed_output_is_the_same_and_undamaged(finished: Path) -> None:
    messages: list[str] = []
    with pytest.raises(OutputError, match="is another thing"):
        confirm_finished(finished, messages.append, same=False)
    confirm_finished(finished, messages.append, same=True)
    assert messages == [f"done already: {finished}"]
    (finished / "file").write_text("changed")
    with pytest.raises(DataError, match="differs from its hash"):
        confirm_finished(finished, messages.append, same=True)


def test_the_fields_that_change_no_folder_are_these() -> None:
    """By the names that stored recipes have."""
    assert {*IRRELEVANT_FIELDS} == {
        *("ratios", "methods", "bits", "joint", "group_size", "arms", "dense_arms", "seeds", "output_dir"),
        *("max_fallback", "batch_size", "backend_python", "write_tokens"),
    }
    assert {*IRRELEVANT_FIELDS} <= recipe_to_dict(load_recipe(None))["run"].keys()


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        ({}, True),
        ({"ratios": "0.25", "seeds": "3", "eval_batch_size": "2", "max_new_tokens": "5", "model": "other"}, True),
        ({"seed": "1"}, False),
        ({"train_rows": "7"}, False),
    ],
)
def test_an_output_is_completed_by_an_equal_recipe(finished: Path, flags: dict[str, str], same: bool) -> None:
    recipe = load_recipe(None, flags)
    if same:
        assert completed_by_same_recipe(finished, recipe, "auto")
    else:
        with pytest.raises(OutputError, match=r"was made with other settings \(run\.(seed|train_rows) was"):
            completed_by_same_recipe(finished, recipe, "auto")
    assert not completed_by_same_recipe(finished.parent / "new", recipe, "auto")


def test_a_damaged_manifest_is_an_error(finished: Path) -> None:
    (finished / "manifest.json").write_text(json.dumps([1])[:1])
    with pytest.raises(DataError, match="is not a JSON object"):
        read_finished(finished, "auto", resumable=True)
