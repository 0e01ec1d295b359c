"""Tokens per second and perplexity: the dense model against structured pruning, all through stock transformers in fp32.

    python benchmarks/structured_speed.py [--settings 0.25,0.5,0.25+0.34] [--rounds 7] [--samples 24]

A setting is the fraction of MLP channels removed from SmolLM2 and, after a plus, that of key-value heads. Calibration:
windows of 512 tokens of WikiText-2 validation; perplexity: 12 x 512 tokens of its test, both in tokenised form with
replacements as in `sparsegpt_reference`. Every pruned network is written to a folder and loaded from there by
`from_pretrained`. Prefill is one forward of 1 x 32 and 1 x 256 tokens, generation greedy with a cache at batch 1, as in
`csr_runtime`; all networks are in this process and take turns, after one turn each that is not counted. Prints one JSON
object, medians with the least and greatest, and on stderr a table.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from csr_runtime import PREFILLS, generation_seconds, prefill_seconds, random_tokens
from sparsegpt_reference import detokenized, perplexity
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mopcompress.compress.structured import StructuredConfig, prune_structured
from mopcompress.data.text_windows import text_windows
from mopcompress.environment import provenance
from mopcompress.models.model_loading import load_model, resolve_model

CPU = torch.device("cpu")
DATA = Path(__file__).parents[2] / "shared" / "data" / "lm"


def main() -> None:
    arguments = parse()
    source = resolve_model("smollm2")
    tokenizer = load_model(source, device=CPU).tokenizer
    calibration = text_windows(detokenized(arguments.calibration), tokenizer, samples=arguments.samples, length=512)
    test = text_windows(detokenized(arguments.test), tokenizer, samples=arguments.test_samples, length=512)
    networks: dict[str, PreTrainedModel] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in ("dense", *arguments.settings.split(",")):
        networks[name], facts[name] = pruned_network(source, name, calibration, test)
        print(f"{name:12} perplexity {facts[name]['perplexity']:.2f}", file=sys.stderr)
    with torch.inference_mode():
        rows = [
            row for task in tasks(arguments.new_tokens) for row in measure(networks, *task, rounds=arguments.rounds)
        ]
    sizes = {"calibration_tokens": list(calibration.shape), "test_tokens": list(test.shape), "rounds": arguments.rounds}
    print(json.dumps({"models": facts, "rows": rows, **sizes, **provenance(CPU)}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", default="0.25,0.5,0.25+0.34")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--test-samples", type=int, default=12)
    parser.add_argument("--calibration", type=Path, default=DATA / "wikitext2_tokens_valid.txt")
    parser.add_argument("--test", type=Path, default=DATA / "wikitext2_tokens_test.txt")
    return parser.parse_args()


def pruned_network(
    source: Path, setting: str, calibration: Tensor, test: Tensor
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the stock network of a setting with its perplexity, sizes and seconds."""
    model = load_model(source, device=CPU)
    start, sizes = time.perf_counter(), {}
    if setting != "dense":
        channels, _, heads = setting.partition("+")
        config = StructuredConfig(mlp_sparsity=float(channels), head_sparsity=float(heads or 0))
        sizes = prune_structured(model, calibration, config).sizes
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        model.network.save_pretrained(folder)
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    facts = {"perplexity": perplexity(model, test), "parameters": stock.num_parameters(), "sizes": sizes}
    return stock, facts | {"compress_seconds": seconds}


def tasks(new_tokens: int) -> list[tuple[str, int, Callable[[PreTrainedModel], float]]]:
    """List the name of each task, its tokens, and the function that times it."""
    prefills = [
        (f"prefill {length}", length, lambda network, length=length: prefill_seconds(network, random_tokens(length)))
        for length in PREFILLS
    ]
    return [*prefills, ("generation", new_tokens, lambda network: generation_seconds(network, new_tokens))]


def measure(
    networks: Mapping[str, PreTrainedModel],
    task: str,
    tokens: int,
    seconds: Callable[[PreTrainedModel], float],
    *,
    rounds: int,
) -> list[dict[str, Any]]:
    taken: dict[str, list[float]] = {name: [] for name in networks}
    for round_number in range(rounds + 1):
        for name, network in networks.items():
            elapsed = seconds(network)
            if round_number:
                taken[name].append(tokens / elapsed)
    rows = []
    for name, speeds in taken.items():
        median = statistics.median(speeds)
        ratio = median / statistics.median(taken["dense"])
        print(f"{task:12} {name:12} {median:8.1f} tokens/s  {ratio:5.2f} x", file=sys.stderr)
        spread = [min(speeds), max(speeds)]
        rows.append({"task": task, "model": name, "tokens_per_second": median, "range": spread, "ratio": ratio})
    return rows


if __name__ == "__main__":
    main()
