"""The lm-evaluation-harness on a task that is defined here, on data that is written here."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from invoking import invoke
from test_hf_model import folders_of
from tiny import random_tokens, word_tokenizer

from mopcompress.hf.continuations import score_continuations
from mopcompress.hf.model import MopForCausalLM

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{choices}
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
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    metric = "  - {metric: acc, aggregation: mean, higher_is_better: true}"
    (folder / "tiny_choice.yaml").write_text(
        TASK.format(
            name="tiny_choice",
            data=data,
            kind="multiple_choice",
            target="label",
            choices='doc_to_choice: "{{choices}}"',
            metrics=metric,
        )
    )
    return folder


def test_without_the_harness_it_says_what_to_install(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    base, _ = folders_of("mop", tmp_path)
    outcome = invoke("evaluate", base, "--lm-eval", "tiny_choice", "--lm-eval-path", tasks)
    assert outcome.code == 69
    assert "pip install 'mopcompress[lm-eval]'" in outcome.err


def need_harness() -> None:
    """It is in the extra `dev`: in CI its absence is a failure."""
    if importlib.util.find_spec("lm_eval") is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("lm_eval is not installed")


@pytest.mark.filterwarnings("ignore")  # of the harness and its data sets
def test_a_task_of_the_harness_is_scored_with_and_without_the_adapter(tasks: Path, tmp_path: Path) -> None:
    need_harness()
    base, adapter = folders_of("mop", tmp_path)
    words = ("evaluate", base, "--lm-eval", "tiny_choice", "--lm-eval-path", tasks, "--device", "cpu", "--json")
    model = MopForCausalLM.from_pretrained(base, adapter)
    tokenizer = word_tokenizer()
    for network, more in ((model.network, ()), (model, ("--adapter", adapter))):
        outcome = invoke(*words, *more)
        assert outcome.code == 0, outcome.err
        right = 0
        for row in ROWS:
            context = tokenizer(row["question"])["input_ids"]
            pairs = [(context, tokenizer(choice)["input_ids"]) for choice in row["choices"]]
            scores = score_continuations(network, pairs, batch_size=2, longest=64)
            chosen = torch.tensor([score.log_likelihood for score in scores]).argmax()
            right += int(chosen) == row["label"]
        assert outcome.json["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(ROWS))


def test_an_unknown_task_is_refused(tasks: Path, tmp_path: Path) -> None:
    need_harness()
    base, _ = folders_of("mop", tmp_path)
    assert invoke("evaluate", base, "--lm-eval", "no_such_task", "--lm-eval-path", tasks).code == 2
