"""Training against PEFT's prompt tuning: real tokens per second, fraction of the GEMM peak, seconds to the same loss.

    pip install peft
    python benchmarks/training_speed.py --model FOLDER --data FOLDER [--steps 16]

Arms take one step each in turn, each in a process of its own, on the same model and rows, 8 rows per step: `fit` with
one prompt of 80 tokens (`single`) and with 8 experts of 10 (`mop`); PEFT with 80 virtual tokens in a plain PyTorch loop
(AdamW, padded batches in random order), and once more with our batches of similar length. Only real tokens count:
no padding and no prompts.
Our time excludes validation, and work that is done once (the lower blocks' states, reported as `cache_seconds`).

The FLOPs needed by our arms are counted as if nothing were computed twice and nothing padded: in the upper
blocks, forward and the gradients of activations of every linear (not of q, k and v of the first one: the text below
the prompts has no gradient), the causal half of attention over text and all of it over prompts (backward: twice), the
prompts' own stream once per step, and the head on response tokens. Norms, rotary embeddings, softmax, the gate and the
optimiser count as nothing. The peak is the best of square float32 products between the steps. Prints one JSON object.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from compression_speed import gemm_peak
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn

from mopcompress.data.dataset import load_dataset
from mopcompress.data.encoding import Document
from mopcompress.entrypoints.from_recipe import adapter_init, first_layer, training_config
from mopcompress.environment import peak_bytes, provenance
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, micro_average
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model
from mopcompress.models.modules import Linear, weight_of
from mopcompress.recipe import RunSpec
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recover.adapter import AdapterConfig, AdapterInputs
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.training import fit

PROMPTS, EXPERTS, ROWS = 80, 8, 8
CPU = torch.device("cpu")
Run = Callable[[Callable[[], None]], dict[str, Any]]  # gets the function that hands over to the others


@dataclass
class Measured:
    """The measurements of one arm, step by step."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)  # seconds of training, validation nats per token

    def step(self, tokens: int, seconds: float) -> None:
        self.tokens.append(tokens)
        self.seconds.append(seconds)

    def validated(self, nats: float) -> None:
        self.losses.append((sum(self.seconds), nats))


def main() -> None:
    arguments = parse()
    arms = ("single", "mop") if arguments.ours_only else ("single", "mop", "peft", "peft, our batches")
    peaks = [gemm_peak()]
    results = run_in_turn(
        [partial(RUNS[arm], arm, arguments) for arm in arms], between=lambda: peaks.append(gemm_peak(repeats=2))
    )
    measured = {arm: Measured(**result["measured"]) for arm, result in zip(arms, results, strict=True)}
    flops = {arm: result.get("flops_a_token") for arm, result in zip(arms, results, strict=True)}
    shared = {name: fact for name, fact in results[0].items() if name not in ("measured", "flops_a_token")}
    summary = {
        "model": Path(arguments.model).name,  # a path says nothing on another machine
        **shared,
        "gemm_peak_gflops": max(peaks) / 1e9,
        "gemm_median_gflops": statistics.median(peaks) / 1e9,
        "arms": {arm: summarize(measured[arm], measured, flops[arm], max(peaks)) for arm in arms},
        **provenance(CPU),
    }
    print(json.dumps(summary, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default=str(Path(__file__).parents[2] / "shared" / "data" / "dolly15k"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--validation-rows", type=int, default=32)
    parser.add_argument("--validate-every", type=int, default=2)
    parser.add_argument("--peft-learning-rate", type=float, default=0.03)
    parser.add_argument("--ours-only", action="store_true")
    return parser.parse_args()


def run_in_turn(runs: Sequence[Run], *, between: Callable[[], None]) -> list[dict[str, Any]]:
    """Run each in a process of its own, so that they do not share threads and memory, and return their results.

    A run continues until it calls the function that it got; then the next one continues. `between` is called after each
    round.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in runs]
    for run, (_, inside) in zip(runs, pipes, strict=True):
        context.Process(target=run_in_process, args=(run, inside), daemon=True).start()
        inside.close()
    results: dict[int, dict[str, Any]] = {}
    while len(results) < len(runs):
        for index, (outside, _) in enumerate(pipes):
            if index not in results:
                outside.send(None)
                result = outside.recv()  # EOFError: that run failed and has printed its error
                if result is not None:
                    results[index] = result
        between()
    return [results[index] for index in range(len(runs))]


def run_in_process(run: Run, pipe: Connection) -> None:
    """Run in this process: wait for the first turn, and after each step for the next turn."""

    def hand_over() -> None:
        pipe.send(None)
        pipe.recv()

    pipe.recv()
    pipe.send(run(hand_over))


@dataclass(frozen=True)
class Prepared:
    """The model and the rows that every arm trains on."""

    model: LanguageModel
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    tasks: tuple[str, ...]


def prepare(arguments: argparse.Namespace) -> Prepared:
    model = load_model(resolve_model(arguments.model), device=CPU)
    counts = {"train_rows": arguments.rows, "validation_rows": arguments.validation_rows, "test_rows": 8}
    run = RunSpec(data=arguments.data, max_length=2048, skip_rows_longer_than=128, **counts)
    documents = load_dataset(run, model.tokenizer)
    return Prepared(model, documents.train, documents.validation, documents.tasks)


def train_ours(arm: str, arguments: argparse.Namespace, wait: Callable[[], None]) -> dict[str, Any]:
    """Train with `fit` as `recover` calls it, with its defaults."""
    prepared, measured = prepare(arguments), Measured()
    model, layer = prepared.model, first_layer("mop", None, prepared.model)
    start = time.perf_counter()
    train, validation = (
        HiddenStateDataset(model, rows, layer, batch_size=16) for rows in (prepared.train, prepared.validation)
    )
    cache_seconds = time.perf_counter() - start
    settings = PromptRecoveryModifier(arm=arm, steps=arguments.steps, train_batch_size=ROWS)
    config = AdapterConfig(
        arm=arm,
        experts=EXPERTS,
        prompts_per_expert=PROMPTS // EXPERTS,
        layer=train.layer,
        hidden_size=model.hidden_size,
        base_sha256="",
        tasks=prepared.tasks if len(prepared.tasks) == EXPERTS else (),
    )
    adapter = RECOVERY_METHODS[arm].initialize(
        config, AdapterInputs(model, train, prepared.tasks), adapter_init(settings, seed=0)
    )

    def after(row: Any) -> None:
        measured.step(row.tokens, row.seconds)
        print(f"{arm}: {row.tokens / row.seconds:.0f} tokens/s", file=sys.stderr)
        if row.step % arguments.validate_every == 0 or row.step == arguments.steps:
            scores = evaluate(model, validation, adapter.compile_for_inference(model), batch_size=16)
            measured.validated(math.log(micro_average(scores).perplexity))
        wait()

    assert settings.rate is not None  # for mypy
    fit(adapter, model, train, training_config(settings, settings.rate, seed=0), progress=after)
    return {
        "measured": asdict(measured),
        "rows": [len(prepared.train), len(prepared.validation)],
        "layer": layer,
        "tokens_of_a_row": statistics.mean(token_counts(prepared.train)),
        "padding": {
            name: padding_fraction(prepared.train, batches(prepared.train, bucketed=name == "ours"))
            for name in ("ours", "random")
        },
        "cache_seconds": cache_seconds,
        "peak_bytes": peak_bytes(),
        "flops_a_token": needed_flops(model, layer, prepared.train) / sum(token_counts(prepared.train)),
    }


def train_peft(arm: str, arguments: argparse.Namespace, wait: Callable[[], None]) -> dict[str, Any]:
    """Train with the loop of PEFT's own examples: warm-up and decay as in ours, no clipping."""
    prepared, measured = prepare(arguments), Measured()
    train, validation, network = prepared.train, prepared.validation, prepared.model.network
    order = batches(train, bucketed=arm != "peft")
    network.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    tuned = get_peft_model(
        network, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PROMPTS, num_layers=1)
    )
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=arguments.peft_learning_rate, weight_decay=0.0)
    warmup = max(1, round(0.1 * arguments.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))
    )
    for _ in range(arguments.steps):
        start = time.perf_counter()
        rows = next(order)
        loss = tuned(**pad([train[row] for row in rows])).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        tokens, seconds = sum(len(train[row].tokens) for row in rows), time.perf_counter() - start
        measured.step(tokens, seconds)
        print(f"PEFT: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
        wait()
    nats = scored = 0.0
    with torch.inference_mode():
        for rows in batches_by_length(validation, ROWS, generator=None):
            inputs = pad([validation[row] for row in rows])
            count = int((inputs["labels"] != -100).sum())
            nats, scored = nats + count * float(tuned(**inputs).loss), scored + count
    measured.validated(nats / scored)
    return {"measured": asdict(measured)}


RUNS: dict[str, Callable[[str, argparse.Namespace, Callable[[], None]], dict[str, Any]]] = {
    "single": train_ours,
    "mop": train_ours,
    "peft": train_peft,
    "peft, our batches": train_peft,
}


def pad(documents: Sequence[Document]) -> dict[str, Tensor]:
    """Return token ids, mask, and labels without the instruction, padded on the right."""

    def stacked(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

    return {
        "input_ids": stacked([document.tokens for document in documents], 0),
        "attention_mask": stacked([[1] * len(document.tokens) for document in documents], 0),
        "labels": stacked(
            [
                [-100] * document.context_tokens + [*document.tokens[document.context_tokens :]]
                for document in documents
            ],
            -100,
        ),
    }


def batches(documents: Sequence[Document], *, bucketed: bool) -> Iterator[list[int]]:
    """Yield the rows of each batch of endless epochs: batched by length as ours, or in random order."""
    generator = torch.Generator().manual_seed(0)
    while True:
        if bucketed:
            yield from batches_by_length(documents, ROWS, generator=generator)
        else:
            rows = torch.randperm(len(documents), generator=generator).tolist()
            yield from (rows[first : first + ROWS] for first in range(0, len(rows), ROWS))


def padding_fraction(documents: Sequence[Document], order: Iterator[list[int]]) -> float:
    """Return the fraction of positions of an epoch that are padding."""
    real = positions = 0
    for _ in range(-(-len(documents) // ROWS)):
        lengths = [len(documents[row].tokens) for row in next(order)]
        real, positions = real + sum(lengths), positions + max(lengths) * len(lengths)
    return 1 - real / positions


def needed_flops(model: LanguageModel, layer: int, documents: Sequence[Document]) -> float:
    """Count the FLOPs of an epoch of `single` or `mop`; a multiply-add is two."""
    modules = [module for block in model.blocks[layer:] for module in block.modules()]
    weights = sum(weight_of(module).numel() for module in modules if isinstance(module, Linear))
    first = model.blocks[layer].self_attn
    without_gradient = sum(linear.weight.numel() for linear in (first.q_proj, first.k_proj, first.v_proj))
    config, blocks = model.config, len(model.blocks) - layer
    width = config.num_attention_heads * config.head_dim
    lengths = token_counts(documents)
    scored = sum(len(document.tokens) - document.context_tokens for document in documents)
    steps = math.ceil(len(documents) / ROWS)
    linears = 2 * sum(lengths) * (2 * weights - without_gradient)
    pairs = sum(length * (length + 1) // 2 + length * PROMPTS for length in lengths)
    pairs += steps * PROMPTS * (PROMPTS + 1) // 2
    prompts = steps * PROMPTS * 4 * weights
    head = 4 * scored * config.vocab_size * config.hidden_size
    return linears + 3 * 4 * pairs * width * blocks + prompts + head


def token_counts(documents: Sequence[Document]) -> list[int]:
    return [len(document.tokens) for document in documents]


def summarize(
    arm: Measured, measured: dict[str, Measured], flops_per_token: float | None, peak: float
) -> dict[str, Any]:
    """Return the rates of an arm without its first step, which warms up."""
    seconds, tokens = sum(arm.seconds[1:]), sum(arm.tokens[1:])
    peft = measured.get("peft", Measured())
    rates: dict[str, Any] = {
        "tokens_per_second": tokens / seconds,
        "seconds_of_a_step": statistics.median(arm.seconds[1:]),
        "validation": arm.losses,
    }
    if peft.seconds:
        target = peft.losses[-1][1]
        rates["times_peft"] = tokens / seconds / (sum(peft.tokens[1:]) / sum(peft.seconds[1:]))
        rates["seconds_to_pefts_loss"] = next((spent for spent, nats in arm.losses if nats <= target), None)
    if flops_per_token is not None:
        rates["gflop_a_token"] = flops_per_token / 1e9
        rates["fraction_of_peak"] = flops_per_token * tokens / seconds / peak
    return rates


if __name__ == "__main__":
    main()
