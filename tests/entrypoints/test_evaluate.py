"""One measurement for `evaluate` and for every cell of a bench."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import saved, tiny_model

from mopcompress.data.dataset import EncodedDataset
from mopcompress.entrypoints.evaluate import measure
from mopcompress.entrypoints.inputs import SplitStates, load_dataset_for
from mopcompress.entrypoints.train_adapter import TrainingSetup, train_adapter, train_with_sweep
from mopcompress.evaluation.perplexity import macro_perplexity, micro_average, task_scores
from mopcompress.models.model_loading import open_model
from mopcompress.progress import silent
from mopcompress.recipe import PromptRecoveryModifier, RunSpec
from mopcompress.results import read_sweeps

ROWS = {"data": "skills", "train_rows": 24, "validation_rows": 6, "test_rows": 12, "max_length": 256}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> SplitStates:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = saved(tiny_model(max_position_embeddings=512), tmp_path_factory.mktemp("models") / "base")
        base = open_model(str(folder), device=torch.device("cpu"))
        dataset: EncodedDataset = load_dataset_for(base.model, RunSpec(**ROWS))
        dataset = replace(dataset, text=dataset.validation[:2])
        split_states = SplitStates(base, dataset, 4, silent)
        for split in (split_states.train, split_states.validation, split_states.test, split_states.text):
            split(2)
        yield split_states


def modifier(arm: str, **fields: object) -> PromptRecoveryModifier:
    quick = {"steps": 2, "train_batch_size": 4, "prompts_per_expert": 1, "gate_pretraining_steps": 2, "layer": 2}
    return PromptRecoveryModifier(**quick | {"arm": arm} | fields)


def setup_of(states: SplitStates) -> TrainingSetup:
    return TrainingSetup(states=states, seed=0, progress=silent)


def test_states_are_loaded_once_per_split_and_layer(states: SplitStates) -> None:
    assert states.test(2) is states.test(2)
    assert states.test(2) is not states.text(2)
    assert states.test(2).documents == states.dataset.test
    assert states.text(2).documents == states.dataset.text
    assert states.validation(2).documents == states.dataset.validation
    assert states.train(2).documents == states.dataset.train
    assert states.test(2).layer == 2


def test_a_measurement_summarises_its_scores(states: SplitStates) -> None:
    measurement = measure(states, 2)
    summary = measurement.summary()
    overall = micro_average(measurement.scores)
    assert summary["perplexity"] == overall.perplexity
    assert summary["perplexity_macro"] == macro_perplexity(measurement.scores)
    assert summary["exact_match"] == overall.exact_match
    assert (summary["documents"], summary["scored_tokens"]) == (12, sum(measurement.scores.scored_tokens))
    assert summary["per_task"] == task_scores(measurement.scores)
    assert (summary["gate"], summary["samples"], summary["rouge_l"], summary["rouge_l_macro"]) == (None, (), None, None)
    assert summary["text_perplexity"] > 1
    assert measurement.seconds > 0


def test_generation_adds_scores_of_answers(states: SplitStates) -> None:
    plain, generated = measure(states, 2), measure(states, 2, max_new_tokens=3)
    assert generated.summary()["perplexity"] == plain.summary()["perplexity"]
    assert generated.scores.written is not None
    assert len(generated.scores.written.answers) == 12
    assert len(generated.samples) == 3
    assert generated.summary()["rouge_l"] is not None


@pytest.mark.parametrize(("arm", "scores_text"), [("mop", True), ("single", True), ("oracle", False)])
def test_plain_text_is_left_out_for_arms_that_need_tasks(states: SplitStates, arm: str, scores_text: bool) -> None:
    trained = train_adapter(modifier(arm), setup_of(states))
    measurement = measure(states, 2, trained.adapter, trained.config)
    assert (measurement.text_perplexity is not None) is scores_text
    assert (measurement.gate is not None) is (arm == "mop")
    assert measurement.scores.nats != measure(states, 2).scores.nats


def test_gate_statistics_name_the_tasks_of_experts(states: SplitStates) -> None:
    trained = train_adapter(modifier("mop"), setup_of(states))
    gate = measure(states, 2, trained.adapter, trained.config).gate
    assert gate is not None
    assert tuple(gate.domains) == states.dataset.tasks


def test_without_a_sweep_the_arm_is_trained_at_its_rate(states: SplitStates) -> None:
    trained, sweep = train_with_sweep(modifier("single", learning_rate=0.1), setup_of(states))
    alone = train_adapter(modifier("single", learning_rate=0.1), setup_of(states))
    assert sweep is None
    assert [row.nll for row in trained.rows] == [row.nll for row in alone.rows]
    assert not any(parameter.requires_grad for parameter in trained.adapter.parameters())


def test_a_stored_sweep_gives_the_rate_and_is_not_repeated(
    states: SplitStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = modifier("single", sweep=True, sweep_steps=1, learning_rate=0.1)
    path = tmp_path / "sweeps" / "setting-single.json"
    trained, sweep = train_with_sweep(swept, setup_of(states), sweep_file=path)
    assert sweep is not None
    assert read_sweeps(path.parent) == {"setting-single": sweep}
    assert (sweep.steps, sweep.validation_rows) == (1, 6)
    assert len(trained.rows) == 2  # trained after shorter trials
    monkeypatch.setattr("mopcompress.entrypoints.train_adapter.sweep_rate", None)
    again, stored = train_with_sweep(swept, setup_of(states), sweep_file=path)
    assert stored == sweep
    assert [row.nll for row in again.rows] == [row.nll for row in trained.rows]
    at_rate = train_adapter(modifier("single", learning_rate=sweep.learning_rate), setup_of(states))
    assert [row.nll for row in at_rate.rows] == [row.nll for row in trained.rows]
