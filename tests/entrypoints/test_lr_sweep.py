import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

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
from mopcompress.recover.distributed import Workers
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.results import Trial, read_rows

LAYER = 2


@pytest.fixture(scope="module")
def validation(tiny_llama):
    return HiddenStateDataset(tiny_llama, random_documents(6), LAYER, batch_size=4)


def random_prompt(number):
    prompts = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(number))
    return MixtureOfPrompts(prompts, LAYER, None)


def trained_adapter(adapter):
    config = AdapterConfig(
        arm="single", experts=1, prompts_per_expert=2, layer=LAYER, hidden_size=32, base_sha256="", tasks=()
    )
    return TrainedAdapter(adapter, config, [], 2.5)


def sweep_and_winner(model, validation, adapter_of, *, folder=None, workers=None, **fields):
    modifier = PromptRecoveryModifier(**{"arm": "single", "sweep": True, "sweep_steps": 7} | fields)

    def train(trial):
        return trained_adapter(adapter_of(trial))

    return sweep_rate(modifier, model, validation, train, batch_size=4, folder=folder, workers=workers)


def sweep_of(model, validation, adapter_of, **fields):
    return sweep_and_winner(model, validation, adapter_of, **fields)[0]


def loss_of(model, states, adapter):
    scores = evaluate(model, states, adapter.compile_for_inference(model), batch_size=6)
    return math.fsum(scores.nats) / sum(scores.scored_tokens)


def test_the_rate_with_the_lowest_validation_loss_wins(tiny_llama, validation):
    prompts = [random_prompt(number) for number in range(3)]
    best, worse, worst = sorted(prompts, key=lambda adapter: loss_of(tiny_llama, validation, adapter))
    adapters = [worst, best, worse]
    losses = [loss_of(tiny_llama, validation, adapter) for adapter in adapters]
    queue = iter(adapters)
    sweep = sweep_of(tiny_llama, validation, lambda modifier: next(queue), learning_rate=0.3)
    assert [trial.validation_nats for trial in sweep.trials] == pytest.approx(losses, rel=1e-5)
    assert [trial.learning_rate for trial in sweep.trials] == pytest.approx([0.1, 0.3, 0.9])
    assert sweep.learning_rate == pytest.approx(0.3)
    assert not sweep.at_edge
    assert [trial.seconds for trial in sweep.trials] == [2.5, 2.5, 2.5]
    assert sweep.seconds == 7.5


@pytest.mark.parametrize(("direction", "best"), [(1, 2.7), (-1, 0.1 / 3)])
def test_the_grid_grows_where_its_edge_is_best(tiny_llama, validation, direction, best):
    prompts = [random_prompt(number) for number in range(5)]
    ranked = sorted(prompts, key=lambda adapter: loss_of(tiny_llama, validation, adapter))
    rank = {-1: 3, 0: 2, 1: 1, 2: 0, 3: 4}  # better and better, until the second rate past the first three

    def nearer(modifier):
        return ranked[rank[direction * round(math.log(modifier.learning_rate / 0.3, 3))]]

    sweep = sweep_of(tiny_llama, validation, nearer, learning_rate=0.3)
    assert sweep.learning_rate == pytest.approx(best)
    assert [trial.learning_rate for trial in sweep.trials] == sorted(trial.learning_rate for trial in sweep.trials)
    assert len(sweep.trials) == 5
    assert not sweep.at_edge


def test_a_sweep_has_at_most_six_trials(tiny_llama, validation):
    sweep = sweep_of(tiny_llama, validation, lambda modifier: random_prompt(0), learning_rate=0.3)
    assert len(sweep.trials) == 6
    assert sweep.at_edge
    assert "edge of the grid" in describe_sweep(sweep)


def test_trials_have_the_steps_of_the_sweep(tiny_llama, validation):
    seen = []
    sweep_of(tiny_llama, validation, lambda modifier: seen.append(modifier) or random_prompt(0), steps=1000)
    assert [modifier.steps for modifier in seen] == [7] * 6
    assert {modifier.arm for modifier in seen} == {"single"}
    assert len({modifier.learning_rate for modifier in seen}) == 6


def ranked_by_rate(model, states, *, best):
    """Trainings whose loss on the validation rows is the greater the farther their rate is from `best`."""
    prompts = [random_prompt(number) for number in range(6)]
    ranked = sorted(prompts, key=lambda adapter: loss_of(model, states, adapter))
    return lambda modifier: ranked[abs(round(math.log(modifier.learning_rate / best, 3)))]


@pytest.mark.parametrize("best", [0.1, 0.3, 0.9])
def test_a_trial_of_full_length_is_the_training(tiny_llama, validation, best):
    trained = ranked_by_rate(tiny_llama, validation, best=best)
    for steps in ({"sweep_steps": None, "steps": 5}, {"sweep_steps": 5, "steps": 5}):
        sweep, winner = sweep_and_winner(tiny_llama, validation, trained, learning_rate=0.3, **steps)
        assert (sweep.steps, sweep.learning_rate) == (5, pytest.approx(best))
        assert winner.adapter is trained(PromptRecoveryModifier(learning_rate=best))
    _, winner = sweep_and_winner(tiny_llama, validation, trained, learning_rate=0.3, sweep_steps=4, steps=5)
    assert winner is None


def test_a_resumed_sweep_repeats_no_trial(tiny_llama, validation, tmp_path):
    ranked = ranked_by_rate(tiny_llama, validation, best=0.3)
    whole = sweep_of(tiny_llama, validation, ranked, learning_rate=0.3)
    assert len(whole.trials) == 3
    for finished in (0, 1, 2, 3):
        folder, rates = tmp_path / str(finished), []
        folder.mkdir()

        def train(modifier, limit=finished, rates=rates):
            rates.append(modifier.learning_rate)
            if len(rates) > limit:
                raise KeyboardInterrupt
            return ranked(modifier)

        with nullcontext() if finished == 3 else pytest.raises(KeyboardInterrupt):
            sweep_of(tiny_llama, validation, train, learning_rate=0.3, folder=folder)
        assert sorted(read_trials(folder)) == sorted(rates[:finished])  # written after each trial
        rates.clear()

        def resume(modifier, rates=rates):
            rates.append(modifier.learning_rate)
            return ranked(modifier)

        sweep, winner = sweep_and_winner(tiny_llama, validation, resume, learning_rate=0.3, folder=folder)
        assert [trial.validation_nats for trial in sweep.trials] == [trial.validation_nats for trial in whole.trials]
        assert winner is None
        assert len(rates) == 3 - finished


def test_a_winner_of_another_run_is_not_returned(tiny_llama, validation, tmp_path):
    ranked = ranked_by_rate(tiny_llama, validation, best=0.3)
    best = sweep_of(tiny_llama, validation, ranked, learning_rate=0.3).trials[1]
    write_trials([best], tmp_path)
    sweep, winner = sweep_and_winner(tiny_llama, validation, ranked, learning_rate=0.3, steps=7, folder=tmp_path)
    assert (sweep.learning_rate, winner) == (best.learning_rate, None)


def test_the_grid_is_around_the_default_rate_of_the_arm(tiny_llama, validation):
    sweep = sweep_of(tiny_llama, validation, lambda modifier: random_prompt(0))
    assert PromptRecoveryModifier(arm="single").rate in [trial.learning_rate for trial in sweep.trials]


def breaks_down(modifier, *, above):
    if modifier.learning_rate > above:
        raise NumericalError("the loss is nan")
    return random_prompt(0)


def test_a_rate_without_finite_loss_is_never_chosen(tiny_llama, validation):
    sweep = sweep_of(tiny_llama, validation, lambda modifier: breaks_down(modifier, above=0.5), learning_rate=0.3)
    assert [trial.learning_rate for trial in sweep.trials if trial.validation_nats is None] == pytest.approx([0.9])
    assert sweep.learning_rate < 0.9
    assert "0.9: broke down" in describe_sweep(sweep)


def test_a_sweep_may_exceed_the_rates_of_recipes(tiny_llama, validation):
    sweep = sweep_of(tiny_llama, validation, lambda modifier: breaks_down(modifier, above=950.0), learning_rate=900.0)
    assert [trial.learning_rate for trial in sweep.trials if trial.validation_nats is None] == pytest.approx([2700.0])


@dataclass(frozen=True)
class SecondWorker(Workers):
    """A worker that gets other losses from the first one than it measured."""

    def same_for_all(self, value):
        losses = {0.1: 2.0, 0.3: 1.0, 0.9: 3.0}
        if isinstance(value, Trial):
            return replace(value, validation_nats=losses[round(value.learning_rate, 9)])
        return value


def test_the_trials_of_the_first_worker_count(tiny_llama, validation):
    sweep = sweep_of(
        tiny_llama, validation, lambda modifier: random_prompt(0), learning_rate=0.3, workers=SecondWorker()
    )
    assert [trial.validation_nats for trial in sweep.trials] == [2.0, 1.0, 3.0]
    assert sweep.learning_rate == 0.3


def test_finished_trials_are_those_of_the_first_worker(tiny_llama, validation):
    @dataclass(frozen=True)
    class Late(Workers):
        def same_for_all(self, value):
            return {0.3: Trial(learning_rate=0.3, validation_nats=0.5, seconds=1.0)} if value == {} else value

    sweep = sweep_of(tiny_llama, validation, lambda modifier: random_prompt(0), learning_rate=0.3, workers=Late())
    assert sweep.trials[1] == Trial(learning_rate=0.3, validation_nats=0.5, seconds=1.0)


def test_a_sweep_without_any_finite_loss_is_an_error(tiny_llama, validation):
    with pytest.raises(NumericalError, match=r"no rate from 0\.0037037 to 0\.9"):
        sweep_of(tiny_llama, validation, lambda modifier: breaks_down(modifier, above=0.0), learning_rate=0.3)


def test_a_sweep_without_validation_rows_is_an_error():
    swept = [PromptRecoveryModifier(arm=arm, sweep=True) for arm in ("mop", "oracle")]
    with pytest.raises(DataError, match="validation rows, and there are none"):
        check_validation(documents_of((), tasks=("add",)), "skills", swept)
    strange = documents_of(random_documents(3), tasks=("add", "sort"))
    with pytest.raises(DataError, match=r"validation rows are of 'tell'.* oracle has no expert"):
        check_validation(strange, "skills", swept)
    check_validation(strange, "skills", swept[:1])
    check_validation(strange, "skills", [modifier.model_copy(update={"sweep": False}) for modifier in swept])
    check_validation(documents_of(random_documents(3), tasks=("add", "sort", "tell")), "skills", swept)


def documents_of(validation, *, tasks):
    return EncodedDataset(train=(), validation=tuple(validation), test=(), text=(), tasks=tasks, facts={})


def test_recover_stores_its_sweep_and_trains_at_its_rate(stories, tmp_path, monkeypatch):
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


def test_a_swept_adapter_equals_one_trained_at_its_rate(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    data, flags = write_data(tmp_path), ["--arm", "mop", "--steps", 2, *set_fields("recovery", prompts_per_expert=1)]
    common = ["recover", stories, "--data", data, *flags]
    assert invoke(*common, "--sweep", "--output-dir", tmp_path / "swept").code == 0
    rate = json.loads((tmp_path / "swept" / "manifest.json").read_text())["learning_rate"]
    assert invoke(*common, "--learning-rate", rate, "--output-dir", tmp_path / "alone").code == 0
    swept, alone = (load_file(tmp_path / name / "adapter.safetensors") for name in ("swept", "alone"))
    assert all(torch.equal(swept[name], alone[name]) for name in alone)


@pytest.mark.slow
def test_a_bench_sweeps_each_arm_once_for_all_seeds(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    calls = []

    def counted(modifier, *rest, **named):
        calls.append(modifier.arm)
        return sweep_rate(modifier, *rest, **named)

    monkeypatch.setattr("mopcompress.entrypoints.train_adapter.sweep_rate", counted)
    recipe = recipe_of(stories, seeds=(0,))
    bench(recipe, tmp_path / "run")
    bench(recipe_of(stories, seeds=(0, 1)), tmp_path / "run")
    assert calls == ["single", "mop"]
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {name: sweep["arm"] for name, sweep in manifest["sweeps"].items()} == {
        "sparsegpt-50-single": "single",
        "sparsegpt-50-mop": "mop",
    }
    assert any("validation rows" in line for line in manifest["protocol"])
    assert {row.train_steps for row in read_rows(tmp_path / "run" / "rows.jsonl") if row.arm != "none"} == {2}


def recipe_of(stories, **run):
    recipe = load_recipe(TINY, {"model": str(stories), "group_size": "4", **run})
    return override_recovery(recipe, {"sweep": True, "sweep_steps": 1, "steps": 2})


def test_a_bench_stopped_in_a_sweep_repeats_no_trial(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    whole = override_recovery(recipe_of(stories, seeds=(0,)), {"sweep_steps": 2})
    rates, train = [], train_adapter

    def stopped(modifier, setup):
        rates.append(modifier.learning_rate)
        if len(rates) == 3:
            raise KeyboardInterrupt
        return train(modifier, setup)

    monkeypatch.setattr("mopcompress.entrypoints.train_adapter.train_adapter", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(whole, tmp_path / "run")
    bench(whole, tmp_path / "run")
    tried = rates[: rates.index(rates[2], 3) + 1]
    assert len(tried) == 4  # two, the one that was stopped, and that one again


@pytest.mark.parametrize("text", ["{half", "[1]", "1"])
def test_damaged_trials_are_an_error(text, tmp_path):
    trial = Trial(learning_rate=0.5, validation_nats=2.25, seconds=3.0)
    write_trials([trial], tmp_path)
    assert read_trials(tmp_path) == {0.5: trial}
    next(tmp_path.iterdir()).write_text(text)
    with pytest.raises(DataError, match=r"is damaged .*; without it the trials are trained again"):
        read_trials(tmp_path)


def test_a_recipe_can_give_each_arm_its_rate() -> None:
    given = PromptRecoveryModifier(learning_rate=0.1, learning_rates={"mop": 0.2})
    assert [given.with_arm(arm).rate for arm in ("single", "mop", "eora")] == [0.1, 0.2, None]
    assert given.at_rate(0.7).rate == 0.7
    recipe = override_recovery(load_recipe(None), {"learning_rates": {"mop": 0.2}})
    assert recipe.recovery.rate == 0.2
    assert override_recovery(recipe, {"learning_rate": 0.3}).recovery.rate == 0.3
    assert "(mop 0.2)" in " ".join(protocol(recipe, ("add",)))
