"""The lm-evaluation-harness on a task that is defined here, on data that is written here."""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import invoke
from recovered_models import save_base_and_adapter
from tiny_models import random_tokens, tiny_model, word_tokenizer
from tokenizers.processors import TemplateProcessing

from mopcompress.hf.loglikelihood import score_continuations
from mopcompress.hf.model import MopForCausalLM

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
{metrics}
metadata: {{version: 1.0}}
"""


def text_of(count: int, seed: int) -> str:
    return str(word_tokenizer().decode(random_tokens(count, seed=seed).tolist()))


ROWS = [
    {"question": text_of(4 + row % 3, row), "choices": [text_of(2, 50 + row), text_of(3, 80 + row)], "label": row % 2}
    for row in range(6)
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    accuracy = "  - {metric: acc, aggregation: mean, higher_is_better: true}"
    choices = 'doc_to_choice: "{{choices}}"'
    return add_task(tmp_path, "tiny_choice", ROWS, "multiple_choice", target="label", more=choices, metrics=accuracy)


def add_task(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], kind: str, *, target: str, metrics: str, more: str = ""
) -> Path:
    """Write a task over `rows`, and return the folder of all tasks."""
    data = tmp_path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK.format(name=name, data=data, kind=kind, target=target, more=more, metrics=metrics)
    (tmp_path / "tasks" / f"{name}.yaml").write_text(task)
    return tmp_path / "tasks"


def test_without_the_harness_the_error_names_the_extra(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    base, _ = save_base_and_adapter("mop", tmp_path)
    outcome = invoke("evaluate", base, "--lm-eval", "tiny_choice", "--lm-eval-path", tasks)
    assert outcome.code == 69
    assert "pip install 'mopcompress[lm-eval]'" in outcome.err


def require_harness() -> None:
    """Skip without the harness, which is in the extra `dev`; fail in CI."""
    if importlib.util.find_spec("lm_eval") is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("lm_eval is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and its data sets
def test_a_task_is_scored_with_and_without_the_adapter(tasks: Path, tmp_path: Path) -> None:
    require_harness()
    base, adapter = save_base_and_adapter("mop", tmp_path)
    words = ("evaluate", base, "--lm-eval", "tiny_choice", "--lm-eval-path", tasks, "--device", "cpu", "--json")
    model = MopForCausalLM.from_pretrained(base, adapter)
    tokenizer = word_tokenizer()
    for network, more in ((model.network, ()), (model, ("--adapter", adapter))):
        outcome = invoke(*words, *more)
        assert outcome.code == 0, outcome.err
        correct = 0
        for row in ROWS:
            context = tokenizer(row["question"])["input_ids"]
            pairs = [(context, tokenizer(choice)["input_ids"]) for choice in row["choices"]]
            scores = score_continuations(network, pairs, batch_size=2, max_length=64)
            choice = torch.tensor([score.log_likelihood for score in scores]).argmax()
            correct += int(choice) == row["label"]
        assert outcome.json["results"]["tiny_choice"]["acc,none"] == pytest.approx(correct / len(ROWS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_text_without_a_context_is_scored_whole(tasks: Path, tmp_path: Path) -> None:
    require_harness()
    base, adapter = save_base_and_adapter("mop", tmp_path)
    metric = "  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}"
    add_task(tmp_path, "tiny_text", ROWS, "loglikelihood_rolling", target='"{{question}}"', metrics=metric)
    words = ("evaluate", base, "--lm-eval", "tiny_text", "--lm-eval-path", tasks, "--device", "cpu", "--json")
    model, tokenizer = MopForCausalLM.from_pretrained(base, adapter).eval(), word_tokenizer()
    perplexities = []
    for network, more in ((model.network, ()), (model, ("--adapter", adapter))):
        nll = 0.0
        for row in ROWS:
            text = tokenizer(row["question"])["input_ids"]
            tokens = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id, *text]])
            # the text's first token is all of its context, so a gate reads that
            mask = {"instruction_mask": torch.arange(tokens.shape[1])[None] == 0} if more else {}
            with torch.no_grad():
                logits = network(tokens, **mask).logits[0, :-1]
            nll += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        outcome = invoke(*words, *more)
        assert outcome.code == 0, outcome.err
        perplexities.append(outcome.json["results"]["tiny_text"]["word_perplexity,none"])
        words_in_all = sum(len(row["question"].split()) for row in ROWS)
        assert perplexities[-1] == pytest.approx(math.exp(nll / words_in_all), rel=1e-4)
    assert perplexities[0] != perplexities[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_answers_of_a_task_are_generated_greedily(tasks: Path, tmp_path: Path) -> None:
    require_harness()
    base, adapter = save_base_and_adapter("mop", tmp_path)
    model, tokenizer = MopForCausalLM.from_pretrained(base, adapter).eval(), word_tokenizer()
    answers = []
    for row in ROWS:
        tokens = torch.tensor([tokenizer(row["question"])["input_ids"]])
        answer = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
    # every third answer is changed, so that the fraction of matches is known
    rows = [
        {**row, "answer": "another" if index % 3 == 0 else text}
        for index, (row, text) in enumerate(zip(ROWS, answers, strict=True))
    ]
    metric = "  - {metric: exact_match, aggregation: mean, higher_is_better: true}"
    settings = "generation_kwargs: {do_sample: false, max_gen_toks: 4, until: []}"
    add_task(tmp_path, "tiny_answer", rows, "generate_until", target='"{{answer}}"', more=settings, metrics=metric)
    words = ("evaluate", base, "--lm-eval", "tiny_answer", "--lm-eval-path", tasks, "--device", "cpu", "--json")
    outcome = invoke(*words, "--adapter", adapter)
    assert outcome.code == 0, outcome.err
    assert outcome.json["results"]["tiny_answer"]["exact_match,none"] == pytest.approx(4 / 6)


@pytest.mark.slow
def test_an_unknown_task_raises(tasks: Path, tmp_path: Path) -> None:
    require_harness()
    base, _ = save_base_and_adapter("mop", tmp_path)
    assert invoke("evaluate", base, "--lm-eval", "no_such_task", "--lm-eval-path", tasks).code == 2


def test_special_tokens_are_those_of_the_harness() -> None:
    require_harness()
    from mopcompress.hf.lm_eval_model import HarnessModel

    tokenizer = word_tokenizer()
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begins
    model = HarnessModel(tiny_model().network, tokenizer, batch_size=2)
    assert model.tok_encode("w5 w6") == [1, 5, 6]
    assert model.tok_encode("<s> w5 w6") == [1, 5, 6]
    assert model.tok_encode("w5 w6", add_special_tokens=False) == [5, 6]
    assert model._encode_pair("w5 w6", " w7") == ([1, 5, 6], [7])
