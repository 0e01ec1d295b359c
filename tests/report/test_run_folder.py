"""Reading and checking of run folders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import add_row, answered_run, arm_sweep, bench_row, document_scores, small_run, write_sweeps

from mopcompress.errors import DataError, InputNotFoundError, RefusedError
from mopcompress.report import write_report
from mopcompress.report.run_folder import read_run
from mopcompress.results import append_row, write_documents


def test_arms_of_two_models_are_not_compared(tmp_path: Path) -> None:
    for arm, sha256 in (("none", None), ("single", "a"), ("mop", "a")):
        scores = document_scores(2.0, seed=1)
        add_row(tmp_path, scores, arm=arm, seed=0, model_sha256=sha256)
    read_run(tmp_path)
    add_row(tmp_path, scores, arm="mop", seed=1, model_sha256="b")
    with pytest.raises(DataError, match=r"rows\.jsonl: the rows of wanda 50% are of 2 models .*; keep the rows of one"):
        read_run(tmp_path)


def test_arms_of_two_revisions_are_not_averaged(tmp_path: Path) -> None:
    for seed, revision in ((0, 1), (1, 1), (2, 2)):
        scores = document_scores(2.0, seed=1)
        add_row(tmp_path, scores, arm="mop", seed=seed, revision=revision)
        if revision == 1:
            read_run(tmp_path)
    with pytest.raises(
        DataError, match=r"rows\.jsonl: the rows of mop are of revisions 1 and 2, which behave differently"
    ):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"arm": "mop"}'])
def test_a_file_that_is_not_a_sweep_is_refused_by_name(tmp_path: Path, text: str) -> None:
    small_run(tmp_path, {"mop": 2.5})
    write_sweeps(tmp_path, arm_sweep("mop"))
    (tmp_path / "sweeps" / "wanda-50-mop.json").write_text(text)
    with pytest.raises(DataError, match=r"wanda-50-mop\.json: not a sweep"):
        read_run(tmp_path)


def test_an_empty_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no finished row"):
        write_report(tmp_path)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    row = small_run(tmp_path, {"single": 2.0}).rows[0]
    row_tokens = document_scores(2.0, seed=1).scored_tokens
    for broken, message in (
        (replace(document_scores(2.0, seed=1), tasks=["other"] * 120), "not the test tokens of"),
        (document_scores(2.0, seed=1, count=119), "not the test tokens of"),
        (replace(document_scores(2.0, seed=1), scored_tokens=list(reversed(row_tokens))), "not the test tokens of"),
    ):
        (tmp_path / "rows.jsonl").write_text("")
        append_row(row, tmp_path / "rows.jsonl")
        add_row(tmp_path, broken, arm="mop")
        with pytest.raises(DataError, match=message):
            write_report(tmp_path)
    more = replace(document_scores(2.0, seed=1), scored_tokens=[count + 1 for count in row_tokens])
    for other in (document_scores(2.0, seed=1, count=118), more):
        write_documents(other, tmp_path / "documents/wanda-0.5-None-mop-0.json")
        with pytest.raises(DataError, match="does not belong to its row"):
            write_report(tmp_path)
    append_row(row, tmp_path / "rows.jsonl")
    (tmp_path / "documents/wanda-0.5-None-mop-0.json").unlink()
    with pytest.raises(InputNotFoundError, match="copy the whole run folder"):
        write_report(tmp_path)


def test_two_rows_of_one_cell_are_refused(tmp_path: Path) -> None:
    append_row(small_run(tmp_path, {"single": 2.0}).rows[0], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="two rows for wanda 50%, single, seed 0"):
        write_report(tmp_path)


def test_documents_outside_the_folder_are_refused(tmp_path: Path) -> None:
    row = bench_row(document_scores(2.0, seed=1), arm="mop")
    append_row(replace(row, documents_file="../../etc/passwd"), tmp_path / "rows.jsonl")
    with pytest.raises(RefusedError, match="outside the run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    small_run(tmp_path, {"single": 2.0})
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json"):
        write_report(tmp_path)


def test_rows_with_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = answered_run(tmp_path)
    assert run.rows[0].samples[0].instruction == "say <b>it</b> | once"
    assert run.rows[0].per_task["reverse"].rouge_l is not None
    written = run.documents[run.rows[0].cell].written
    assert written is not None
    assert written.rouge_l[3] == pytest.approx(0.06)


def test_answers_of_other_documents_are_refused(tmp_path: Path) -> None:
    run = answered_run(tmp_path)
    path = tmp_path / run.rows[0].documents_file
    fields = json.loads(path.read_text())
    fields["written"]["rouge_l"].pop()
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="does not belong to its row"):
        read_run(tmp_path)
