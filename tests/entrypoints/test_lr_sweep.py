import json
import math
from dataclasses import replace

import pytest
import torch
from cli_runner import TINY, invoke, set_fields, write_data
from safetensors.torch import load_file
from tiny_models import random_documents

from mopcompress.data.dataset import EncodedDataset
from mopcompress.entrypoints.bench.protocol import protocol
from mopcompress.entrypoints.bench.runner import bench
from mopcompress.entrypoints.lr_sweep import check_validation, describe_sweep, read_trials, sweep_rate, write_trials
from mopcompress.entrypoints.train_adapter import train_adapter
from mopcompress.errors import DataError, NumericalError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.recipe import PromptRecoveryModifier, load_recipe
from mopcompress.recipe.overrides import override_recovery
from mopcompress.recover.adapter import AdapterConfig, TrainedAdapter
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.results import Trial, read_rows

LAYER = 2


@pytest.fixture(scope="module")
def validation(tiny_llama):
    return HiddenStateDataset(tiny_llama, random_documents(6), LAYER, batch_size=4)


def prompt(number):
    drawn = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(number))
    return MixtureOfPrompts(drawn, LAYER, None)


def recovered(adapter):
    config = AdapterConfig(
        arm="single", experts=1, prompts_per_expert=2, layer=LAYER, hidden_size=32, base_sha256="", tasks=()
    )
    return TrainedAdapter(adapter, config, [], 2.5)


def sweep_and_winner(
    model, validation, trained, *, known=None, keep=lambda trials: None, agreed=lambda trial: trial, **fields
):
    modifier = PromptRecoveryModifier(**{"arm": "single", "sweep": True, "sweep_steps": 7} | fields)

    def train(one):
        return recovered(trained(one))

    return sweep_rate(modifier, model, validation, train, batch_size=4, known=known, keep=keep, agreed=agreed)


def swept(model, validation, trained, **fields):
    return sweep_and_winner(model, validation, trained, **fields)[0]


def loss_of(model, states, adapter):
    scores = evaluate(model, states, adapter.compile_for_inference(model), batch_size=6)
    return math.fsum(scores.nats) / sum(scores.scored_tokens)


def test_the_rate_with_the_lowest_loss_on_the_validation_rows_wins(tiny_llama, validation):
    drawn = [prompt(number) for number in range(3)]
    best, worse, worst = sorted(drawn, key=lambda adapter: loss_of(tiny_llama, validation, adapter))
    adapters = [worst, best, worse]
    losses = [loss_of(tiny_llama, validation, adapter) for adapter in adapters]
    left = iter(adapters)
    found = swept(tiny_llama, validation, lambda modifier: next(left), learning_rate=0.3)
    assert [trial.validation_nats for trial in found.trials] == pytest.approx(losses, rel=1e-5)
    assert [trial.learning_rate for trial in found.trials] == pytest.approx([0.1, 0.3, 0.9])
    assert found.learning_rate == pytest.approx(0.3)
    assert not found.at_edge
    assert [trial.seconds for trial in found.trials] == [2.5, 2.5, 2.5]
    assert found.seconds == 7.5


@pytest.mark.parametrize(("way", "best"), [(1, 2.7), (-1, 0.1 / 3)])
def test_a_best_rate_at_the_edge_makes_the_grid_grow_there(tiny_llama, validation, way, best):
    drawn = [prompt(number) for number in range(5)]
    ranked = sorted(drawn, key=lambda adapter: loss_of(tiny_llama, validation, adapter))
    place = {-1: 3, 0: 2, 1: 1, 2: 0, 3: 4}  # better and better, until the second rate past the first three

    def nearer(modifier):
        return ranked[place[way * round(math.log(modifier.learning_rate / 0.3, 3))]]

    found = swept(tiny_llama, validation, nearer, learning_rate=0.3)
    assert found.learning_rate == pytest.approx(best)
    assert [trial.learning_rate for trial in found.trials] == sorted(trial.learning_rate for trial in found.trials)
    assert len(found.trials) == 5
    assert not found.at_edge


def test_a_grid_that_never_ends_is_cut_and_says_so(tiny_llama, validation):
    found = swept(tiny_llama, validation, lambda modifier: prompt(0), learning_rate=0.3)
    assert len(found.trials) == 6
    assert found.at_edge
    assert "edge of the grid" in describe_sweep(found)


def test_each_trial_is_the_same_arm_as_short_as_asked_for(tiny_llama, validation):
    seen = []
    swept(tiny_llama, validation, lambda modifier: seen.append(modifier) or prompt(0), steps=1000)
    assert [modifier.steps for modifier in seen] == [7] * 6
    assert {modifier.arm for modifier in seen} == {"single"}
    assert len({modifier.learning_rate for modifier in seen}) == 6


def ranked_by_rate(model, states, *, best):
    """Trainings whose loss on the validation rows is the greater the farther their rate is from `best`."""
    drawn = [prompt(number) for number in range(6)]
    ranked = sorted(drawn, key=lambda adapter: loss_of(model, states, adapter))
    return lambda modifier: ranked[abs(round(math.log(modifier.learning_rate / best, 3)))]


@pytest.mark.parametrize("best", [0.1, 0.3, 0.9])
def test_a_trial_as_long_as_the_training_is_the_training(tiny_llama, validation, best):
    trained = ranked_by_rate(tiny_llama, validation, best=best)
    for steps in ({"sweep_steps": None, "steps": 5}, {"sweep_steps": 5, "steps": 5}):
        found, winner = sweep_and_winner(tiny_llama, validation, trained, learning_rate=0.3, **steps)
        assert (found.steps, found.learning_rate) == (5, pytest.approx(best))
        assert winner.adapter is trained(PromptRecoveryModifier(learning_rate=best))
    _, winner = sweep_and_winner(tiny_llama, validation, trained, learning_rate=0.3, sweep_steps=4, steps=5)
    assert winner is None


def test_a_sweep_that_was_stopped_goes_on_with_the_next_rate(tiny_llama, validation):
    kept, trained = [], ranked_by_rate(tiny_llama, validation, best=0.3)
    whole = swept(tiny_llama, validation, trained, learning_rate=0.3, keep=kept.append)
    assert [len(trials) for trials in kept] == [1, 2, 3]
    seen = []

    def train(modifier):
        seen.append(modifier)
        return trained(modifier)

    for trials in kept:
        known = {trial.learning_rate: trial for trial in trials}
        found, winner = sweep_and_winner(tiny_llama, validation, train, learning_rate=0.3, known=known)
        assert [trial.validation_nats for trial in found.trials] == [trial.validation_nats for trial in whole.trials]
        assert winner is None
    assert len(seen) == 2 + 1 + 0


def test_the_winner_that_another_run_trained_is_not_at_hand(tiny_llama, validation):
    trained = ranked_by_rate(tiny_llama, validation, best=0.3)
    best = swept(tiny_llama, validation, trained, learning_rate=0.3).trials[1]
    known = {best.learning_rate: best}
    found, winner = sweep_and_winner(tiny_llama, validation, trained, learning_rate=0.3, steps=7, known=known)
    assert (found.learning_rate, winner) == (best.learning_rate, None)


def test_without_a_rate_in_the_recipe_the_grid_is_around_the_arms_own(tiny_llama, validation):
    found = swept(tiny_llama, validation, lambda modifier: prompt(0))
    assert PromptRecoveryModifier(arm="single").rate in [trial.learning_rate for trial in found.trials]


def broken(modifier, *, above):
    if modifier.learning_rate > above:
        raise NumericalError("the loss is nan")
    return prompt(0)


def test_a_rate_that_breaks_down_is_noted_and_not_chosen(tiny_llama, validation):
    found = swept(tiny_llama, validation, lambda one: broken(one, above=0.5), learning_rate=0.3)
    assert [trial.learning_rate for trial in found.trials if trial.validation_nats is None] == pytest.approx([0.9])
    assert found.learning_rate < 0.9
    assert "0.9: broke down" in describe_sweep(found)


def test_a_sweep_may_try_more_than_a_recipe_may_ask_for(tiny_llama, validation):
    found = swept(tiny_llama, validation, lambda one: broken(one, above=950.0), learning_rate=900.0)
    assert [trial.learning_rate for trial in found.trials if trial.validation_nats is None] == pytest.approx([2700.0])


def test_what_all_processes_agree_on_is_what_counts(tiny_llama, validation):
    """Another one's trial of the same rate, as it would come from the first process."""
    nats = {0.1: 2.0, 0.3: 1.0, 0.9: 3.0}
    found, _ = sweep_and_winner(
        tiny_llama,
        validation,
        lambda modifier: prompt(0),
        learning_rate=0.3,
        agreed=lambda trial: replace(trial, validation_nats=nats[round(trial.learning_rate, 9)]),
    )
    assert [trial.validation_nats for trial in found.trials] == [2.0, 1.0, 3.0]
    assert found.learning_rate == 0.3


def test_when_all_rates_break_down_the_sweep_says_so(tiny_llama, validation):
    with pytest.raises(NumericalError, match=r"no rate from 0\.0037037 to 0\.9"):
        swept(tiny_llama, validation, lambda one: broken(one, above=0.0), learning_rate=0.3)


def test_without_validation_rows_there_is_nothing_to_choose_by():
    swept = [PromptRecoveryModifier(arm=arm, sweep=True) for arm in ("mop", "oracle")]
    with pytest.raises(DataError, match="validation rows, and there are none"):
        check_validation(documents_of((), tasks=("add",)), "skills", swept)
    strange = documents_of(random_documents(3), tasks=("add", "sort"))
    with pytest.raises(DataError, match=r"validation rows are of 'tell'.* oracle has no expert"):
        check_validation(strange, "skills", swept)
    check_validation(strange, "skills", swept[:1])
    check_validation(strange, "skills", [one.model_copy(update={"sweep": False}) for one in swept])
    check_validation(documents_of(random_documents(3), tasks=("add", "sort", "tell")), "skills", swept)


def documents_of(validation, *, tasks):
    return EncodedDataset(train=(), validation=tuple(validation), test=(), text=(), tasks=tasks, facts={})


def test_recover_trains_with_the_rate_that_it_found_and_keeps_what_it_tried(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "adapter"
    flags = ["--arm", "single", "--sweep", "--steps", 1, *set_fields("recovery", sweep_steps=1, prompts_per_expert=1)]
    outcome = invoke("recover", stories, "--data", write_data(tmp_path), "--output-dir", target, "--json", *flags)
    assert outcome.code == 0, outcome.stderr
    manifest = json.loads((target / "manifest.json").read_text())
    rates = {trial["learning_rate"]: trial["validation_nats"] for trial in manifest["sweep"]["trials"]}
    assert manifest["learning_rate"] == manifest["sweep"]["learning_rate"] == min(rates, key=rates.__getitem__)
    assert manifest["sweep"]["steps"] == 1
    assert manifest["train_steps"] == 1


def test_the_adapter_of_a_whole_sweep_is_that_of_its_rate_alone(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    data, flags = write_data(tmp_path), ["--arm", "mop", "--steps", 2, *set_fields("recovery", prompts_per_expert=1)]
    common = ["recover", stories, "--data", data, *flags]
    assert invoke(*common, "--sweep", "--output-dir", tmp_path / "swept").code == 0
    rate = json.loads((tmp_path / "swept" / "manifest.json").read_text())["learning_rate"]
    assert invoke(*common, "--learning-rate", rate, "--output-dir", tmp_path / "alone").code == 0
    swept, alone = (load_file(tmp_path / name / "adapter.safetensors") for name in ("swept", "alone"))
    assert all(torch.equal(swept[name], alone[name]) for name in alone)


def test_a_bench_sweeps_each_arm_once_for_all_seeds(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    calls = []

    def counted(modifier, *rest, **named):
        calls.append(modifier.arm)
        return sweep_rate(modifier, *rest, **named)

    monkeypatch.setattr("mopcompress.entrypoints.bench.runner.sweep_rate", counted)
    recipe = recipe_of(stories, seeds=(0,))
    bench(recipe, tmp_path / "run")
    bench(recipe_of(stories, seeds=(0, 1)), tmp_path / "run")
    assert calls == ["single", "mop"]
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {name: found["arm"] for name, found in manifest["sweeps"].items()} == {
        "sparsegpt-50-single": "single",
        "sparsegpt-50-mop": "mop",
    }
    assert any("validation rows" in line for line in manifest["protocol"])
    assert {row.train_steps for row in read_rows(tmp_path / "run" / "rows.jsonl") if row.arm != "none"} == {2}


def recipe_of(stories, **run):
    recipe = load_recipe(TINY, {"model": str(stories), "group_size": "4", **run})
    return override_recovery(recipe, {"sweep": True, "sweep_steps": 1, "steps": 2})


def test_a_bench_that_was_stopped_in_a_sweep_does_not_repeat_its_trials(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    whole = override_recovery(recipe_of(stories, seeds=(0,)), {"sweep_steps": 2})
    rates, train = [], train_adapter

    def stopped(modifier, **named):
        rates.append(modifier.learning_rate)
        if len(rates) == 3:
            raise KeyboardInterrupt
        return train(modifier, **named)

    monkeypatch.setattr("mopcompress.entrypoints.bench.runner.train_arm", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(whole, tmp_path / "run")
    bench(whole, tmp_path / "run")
    tried = rates[: rates.index(rates[2], 3) + 1]
    assert len(tried) == 4  # two, the one that was stopped, and that one again


@pytest.mark.parametrize("text", ["{half", "[1]", "1"])
def test_damaged_trials_are_told(text, tmp_path):
    trial = Trial(learning_rate=0.5, validation_nats=2.25, seconds=3.0)
    write_trials([trial], tmp_path)
    assert read_trials(tmp_path) == {0.5: trial}
    next(tmp_path.iterdir()).write_text(text)
    with pytest.raises(DataError, match=r"is damaged .*; without it the trials are trained again"):
        read_trials(tmp_path)


def test_arms_have_the_rates_that_a_recipe_gives_them() -> None:
    given = PromptRecoveryModifier(learning_rate=0.1, learning_rates={"mop": 0.2})
    assert [given.with_arm(arm).rate for arm in ("single", "mop", "eora")] == [0.1, 0.2, None]
    assert given.at_rate(0.7).rate == 0.7
    recipe = override_recovery(load_recipe(None), {"learning_rates": {"mop": 0.2}})
    assert recipe.recovery.rate == 0.2
    assert override_recovery(recipe, {"learning_rate": 0.3}).recovery.rate == 0.3
    assert "(mop 0.2)" in " ".join(protocol(recipe, ("add",)))
