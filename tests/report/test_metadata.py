"""The facts about a run, with gaps too."""

from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import answered_run, run_manifest, small_run

from mopcompress.recipe.arms import ARM_DEFAULTS, NO_ADAPTER
from mopcompress.report import write_report
from mopcompress.report.metadata import command, data_facts, definitions, protocol_facts, recipe_text, title
from mopcompress.report.pivot import make_result_grid
from mopcompress.report.run_folder import read_run


def test_a_run_without_a_manifest_names_the_gaps(tmp_path: Path) -> None:
    small_run(tmp_path, {"mop": 2.0})
    markdown = write_report(tmp_path)[1].read_text()
    assert markdown.startswith("# not recorded on not recorded\n")
    assert "**Commit**: not recorded\n" in markdown
    assert "| dense | none | - | - |" in markdown
    assert "No setting has rows of both the mixture of prompts" in markdown


@pytest.mark.parametrize("empty", [None, {}, "", 0])
@pytest.mark.parametrize("part", sorted(run_manifest()))
def test_every_part_of_the_manifest_may_be_missing(tmp_path: Path, part: str, empty: object) -> None:
    run = replace(small_run(tmp_path, {"mop": 2.0}), manifest=run_manifest(**{part: empty}))
    assert make_result_grid(run.rows, run.spec).arms
    facts = [title(run), *data_facts(run), *protocol_facts(run), recipe_text(run.manifest), command(run.manifest)]
    assert all(facts) or part == "command"


def test_the_arms_of_the_run_are_defined_from_the_registry(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"mop+": 2.0, "none": 3.0, "idp": 2.5, "unknown": 2.0})
    sentence = dict(definitions(run))["arm"]
    arms = {"none": NO_ADAPTER, "mop+": ARM_DEFAULTS["mop+"], "idp": ARM_DEFAULTS["idp"]}
    assert sentence.endswith(" ".join(f"{arm}: {defaults.summary}." for arm, defaults in arms.items()))
    assert "lora:" not in sentence


def test_answer_columns_are_defined_where_they_are_shown(tmp_path: Path, folder: Path) -> None:
    assert "ROUGE-L" not in dict(definitions(read_run(folder)))
    (tmp_path / "answers").mkdir()
    assert "ROUGE-L" in dict(definitions(answered_run(tmp_path / "answers")))
