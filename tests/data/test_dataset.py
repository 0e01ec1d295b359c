"""The rows of a run after filtering, and the tokens that compression is calibrated on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import saved, tiny_model, word_tokenizer

from mopcompress.data.dataset import encode_splits
from mopcompress.data.encoding import encode
from mopcompress.data.splits import Example, Splits, assemble
from mopcompress.entrypoints.compress import compress_into
from mopcompress.entrypoints.inputs import CalibrationSet, load_calibration, load_dataset_for
from mopcompress.errors import DataError
from mopcompress.progress import silent
from mopcompress.recipe import RunSpec, load_recipe
from mopcompress.recipe.recipe import DEFAULTS


def rows(count: int, *, first: int = 3, task: str = "add", words: int = 4) -> list[Example]:
    return [
        Example(task, " ".join(f"w{3 + (first + row + word) % 60}" for word in range(words)), "", f"w{3 + row % 60}")
        for row in range(count)
    ]


def splits(**parts: list[Example]) -> Splits:
    default = {"train": rows(20), "validation": rows(4, words=5), "test": rows(6, words=6)}
    return assemble("made", **default | parts)


def test_rows_that_are_too_long_are_passed_over_and_counted() -> None:
    mixed = [row for pair in zip(rows(10), rows(10, words=20), strict=True) for row in pair]
    run = RunSpec(train_rows=8, validation_rows=2, test_rows=3, skip_rows_longer_than=10)
    documents = encode_splits(splits(train=mixed), run, word_tokenizer())
    assert len(documents.train) == 8
    assert max(len(document.tokens) for document in documents.train) <= 10
    assert 1 <= documents.facts["passed_over_rows"] <= 10
    assert documents.facts["dropped_rows"] == 0
    everything = RunSpec(train_rows=None, validation_rows=2, test_rows=3, skip_rows_longer_than=10)
    assert encode_splits(splits(train=mixed), everything, word_tokenizer()).facts["passed_over_rows"] == 10
    limited = RunSpec(train_rows=None, validation_rows=2, test_rows=3, max_length=10)
    assert encode_splits(splits(train=mixed), limited, word_tokenizer()).facts["dropped_rows"] == 10


def test_rows_without_tasks_and_texts_are_different_tasks(tmp_path: Path) -> None:
    """A column with the same task in every row names a task; no column names none."""
    run = RunSpec(train_rows=8, validation_rows=2, test_rows=3)
    parts = {"train": rows(20, task="all"), "validation": [], "test": rows(6, words=6, task="all")}
    unlabelled = encode_splits(splits(**parts), run, word_tokenizer())
    assert (unlabelled.tasks, unlabelled.facts["tasks"]) == ((), ["all"])
    assert encode_splits(splits(), run, word_tokenizer()).tasks == ("add",)
    (tmp_path / "text.txt").write_text("w4 w5 w6 w7 " * 200)
    run_with_text = RunSpec(train_rows=8, test_rows=3, train_text=str(tmp_path / "text.txt"), train_text_samples=2)
    assert encode_splits(splits(**parts), run_with_text, word_tokenizer()).tasks == ("all", "plain text")


def test_a_task_of_the_rows_is_not_that_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w4 w5 w6 w7 " * 200)
    named = {"train": rows(8, task="plain text"), "validation": [], "test": rows(3, task="plain text")}
    run = RunSpec(train_rows=8, test_rows=3)
    assert encode_splits(splits(**named), run, word_tokenizer()).tasks == ("plain text",)
    run_with_text = RunSpec(train_rows=8, test_rows=3, train_text=str(tmp_path / "text.txt"), train_text_samples=2)
    with pytest.raises(DataError, match=r"rows have the task 'plain text', which is that of the windows"):
        encode_splits(splits(**named), run_with_text, word_tokenizer())


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({}, "rows.jsonl: a row of 71 tokens exceeds the model's context of 64 tokens; lower --max-length"),
        (
            {"max_length": 40, "text": True},
            "run.eval_text: a window of 256 tokens exceeds the model's context of 64 tokens",
        ),
    ],
)
def test_rows_beyond_learned_positions_are_refused(field: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Rotary positions have no end, so the same rows load there."""
    lines = [{"instruction": " ".join(["w5"] * words), "output": f"w{4 + words % 7}"} for words in [*range(6, 30), 68]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if "text" in field:
        (tmp_path / "text.txt").write_text("w4 w5 w6 w7 " * 600)
        field = field | {"text": str(tmp_path / "text.txt"), "text_samples": 2}
    run = RunSpec(data=str(tmp_path / "rows.jsonl"), train_rows=None, test_rows=None, validation_rows=None, **field)
    with pytest.raises(DataError, match=re.escape(message)):
        load_dataset_for(tiny_model("gpt2"), run)
    assert load_dataset_for(tiny_model(), run).train


def test_text_that_a_model_samples_fits_its_learned_positions() -> None:
    from mopcompress.models.sampling import sample_text

    assert sample_text(tiny_model("gpt2"), samples=1, length=64, seed=0).shape == (1, 64)
    with pytest.raises(DataError, match=r"calibration text of 65 tokens exceeds .* lower --max-seq-length"):
        sample_text(tiny_model("gpt2"), samples=1, length=65, seed=0)


@pytest.mark.parametrize("modifier", [DEFAULTS["magnitude"], DEFAULTS["structured"]])
def test_calibration_text_beyond_learned_positions_is_refused(modifier: Any, tmp_path: Path) -> None:
    base = saved(tiny_model("gpt2"), tmp_path / "base")
    recipe = load_recipe(None, {"model": str(base), "device": "cpu"})
    with pytest.raises(DataError, match="calibration text of 65 tokens exceeds"):
        compress_into(
            tmp_path / "out", base, [modifier], CalibrationSet(torch.full((2, 65), 5), {}), recipe, progress=silent
        )
    assert not (tmp_path / "out").exists()


def test_answers_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    lines = [{"instruction": " ".join(["w5"] * words), "output": f"w{4 + words % 7}"} for words in range(6, 30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fields = {"data": str(tmp_path / "rows.jsonl"), "train_rows": None, "test_rows": None, "validation_rows": None}
    assert load_dataset_for(tiny_model(), RunSpec(**fields, max_new_tokens=20)).test
    with pytest.raises(DataError, match="an answer of 60 exceed the model's context of 64"):
        load_dataset_for(tiny_model(), RunSpec(**fields, max_new_tokens=60))


def test_nothing_short_enough_is_an_error() -> None:
    with pytest.raises(DataError, match="no train row of at most 8 tokens"):
        encode_splits(splits(train=rows(5, words=20)), RunSpec(skip_rows_longer_than=8), word_tokenizer())


def test_more_rows_extend_fewer() -> None:
    few, many = (
        encode_splits(splits(), RunSpec(train_rows=count, validation_rows=2, test_rows=3), word_tokenizer())
        for count in (5, 15)
    )
    assert many.train[:5] == few.train
    assert many.test == few.test


def test_the_facts_count_the_documents_of_the_run() -> None:
    documents = encode_splits(splits(), RunSpec(train_rows=5, validation_rows=2, test_rows=3), word_tokenizer())
    scored = sum(len(document.tokens) - document.context_tokens for document in documents.test)
    assert documents.facts["scored_tokens"] == scored > 0
    assert [documents.facts[f"{name}_rows"] for name in ("train", "validation", "test")] == [5, 2, 3]
    assert documents.tasks == ("add",)


def test_a_test_task_without_training_rows_is_refused() -> None:
    with pytest.raises(DataError, match="sort"):
        encode_splits(splits(test=rows(3, task="sort", words=6)), RunSpec(), word_tokenizer())


def test_the_hash_of_the_scored_tokens_sees_every_token() -> None:
    run = RunSpec(train_rows=5, validation_rows=2, test_rows=None)
    test = rows(6, words=6)
    changed = [*test[:-1], Example("add", test[-1].instruction, "", "w62")]
    hashes = {
        encode_splits(splits(test=part), run, word_tokenizer()).facts["scored_sha256"] for part in (test, changed)
    }
    assert len(hashes) == 2


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    return saved(tiny_model(), tmp_path / "model")


def test_own_text_is_sampled_once_and_depends_on_the_seed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunSpec(calibration="self", num_calibration_samples=3, max_seq_length=8)
    first = load_calibration(run, source, "hash", silent)
    assert first.tokens.shape == (3, 8)
    assert not set(first.tokens.flatten().tolist()) & set(word_tokenizer().all_special_ids)
    other = load_calibration(run.model_copy(update={"seed": 1}), source, "hash", silent)
    assert not torch.equal(first.tokens, other.tokens)
    monkeypatch.setattr("mopcompress.entrypoints.inputs.sample_text", None)  # a second sampling would fail
    again = load_calibration(run, source, "hash", silent)
    assert torch.equal(first.tokens, again.tokens)
    assert first.metadata == again.metadata


def test_own_text_follows_the_models_distribution() -> None:
    """The mean log-likelihood of sampled tokens is minus the model's mean entropy, up to sampling noise."""
    from mopcompress.models.sampling import sample_text

    model = tiny_model()
    tokens = sample_text(model, samples=64, length=32, seed=0)
    with torch.no_grad():
        logits = model.network(input_ids=tokens).logits[:, :-1]
    logits[..., model.tokenizer.all_special_ids] = -torch.inf  # never drawn
    log_probs = logits.log_softmax(-1)
    drawn = log_probs.gather(-1, tokens[:, 1:, None]).mean()
    entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1).mean()
    assert abs(float(drawn + entropy)) < 0.1
    assert float(entropy) < 4.1  # and it is not the uniform distribution


def test_training_rows_and_text_files_calibrate(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + index % 60}" for index in range(40)))
    run = RunSpec(calibration=str(text), num_calibration_samples=4, max_seq_length=8)
    calibration = load_calibration(run, source, "hash", silent)
    assert calibration.tokens[0].tolist() == list(range(3, 11))
    assert calibration.metadata["source"] == str(text)
    run = RunSpec(calibration="data", data="skills", train_rows=30, num_calibration_samples=2, max_seq_length=8)
    tokens = load_calibration(run, source, "hash", silent).tokens
    from mopcompress.data.examples import load_examples, subset

    train = subset(load_examples("skills", rename={}, seed=0).train, 30, seed=0)
    first = encode(train, word_tokenizer(), max_length=512).documents[0]
    assert tokens[0].tolist() == list(first.tokens[:8])


WORDS = " ".join(f"w{3 + number % 60}" for number in range(400))


def with_text(tmp_path: Path, **fields: object) -> RunSpec:
    (tmp_path / "text.txt").write_text(WORDS)
    limits = {"train_rows": 5, "validation_rows": 2, "test_rows": 3, "skip_rows_longer_than": 40}
    return RunSpec.model_validate({**limits, "train_text": str(tmp_path / "text.txt"), **fields})


def test_windows_of_text_are_training_rows_of_another_task(tmp_path: Path) -> None:
    without = encode_splits(splits(), with_text(tmp_path, train_text=None), word_tokenizer())
    documents = encode_splits(splits(), with_text(tmp_path, train_text_samples=4), word_tokenizer())
    assert documents.tasks == (*without.tasks, "plain text")
    assert documents.train[: len(without.train)] == without.train
    windows = documents.train[len(without.train) :]
    whole = tuple(word_tokenizer()(WORDS, add_special_tokens=False)["input_ids"])
    assert [window.tokens for window in windows] == [whole[start : start + 40] for start in (0, 40, 80, 120)]
    assert {(window.task, window.context_tokens) for window in windows} == {("plain text", 20)}
    assert (documents.validation, documents.test, documents.text) == (without.validation, without.test, ())
    assert documents.facts["train_text"]["windows"] == 4
    assert "train_text" not in without.facts


def test_a_text_that_is_too_short_is_named_by_its_field(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text of run.train_text has 10 window\(s\) .* lower run.train_text_samples"):
        encode_splits(splits(), with_text(tmp_path, train_text_samples=11), word_tokenizer())
    with pytest.raises(DataError, match=r"text of run.eval_text has 1 window\(s\) .* lower run.eval_text_samples"):
        encode_splits(splits(), with_text(tmp_path, train_text=None, text=str(tmp_path / "text.txt")), word_tokenizer())


def test_text_that_is_scored_is_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_text: the same as eval_text"):
        with_text(tmp_path, text=str(tmp_path / "text.txt"))
