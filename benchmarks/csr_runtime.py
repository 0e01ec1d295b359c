"""Tokens per second on a CPU: linears dense in fp32, against `torch.sparse_csr` linears of their survivors.

    python benchmarks/csr_runtime.py [--rounds 7] [--new-tokens 32] [--ratios 0.5,0.85,0.95]

SmolLM2, its linears pruned by magnitude; the head and the embeddings stay dense in both. Generation is greedy with a
key-value cache, batch 1, from a prompt of 32 tokens, whose time is not counted; prefill is one forward of 1 x 32 and
1 x 256 tokens. Both networks are in this process and take turns, after one turn each that is not counted. Prints one
JSON object, medians with the least and greatest, and on stderr a table; a ratio below 1 is a loss.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mopcompress.environment import provenance
from mopcompress.models.model_loading import resolve_model
from mopcompress.models.packed_linears import use_sparse_linears

PREFILLS = (32, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--ratios", default="0.5,0.85,0.95")
    arguments = parser.parse_args()
    source = resolve_model("smollm2")
    rows = []
    with torch.inference_mode():
        for ratio in map(float, arguments.ratios.split(",")):
            dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
            prune(dense, ratio)
            sparse = copy.deepcopy(dense)
            replaced = use_sparse_linears(sparse, sparsity=0.9 * ratio)
            rows += [row | {"replaced": replaced} for row in measure(dense, sparse, ratio, arguments)]
    print(json.dumps({"rows": rows, "rounds": arguments.rounds, **provenance(torch.device("cpu"))}, indent=1))


def prune(network: PreTrainedModel, ratio: float) -> None:
    for name, linear in network.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            order = linear.weight.data.abs().flatten().argsort(stable=True)
            linear.weight.data.view(-1)[order[: round(ratio * len(order))]] = 0.0


def measure(
    dense: PreTrainedModel, sparse: PreTrainedModel, ratio: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    tasks: dict[str, tuple[int, Callable[[PreTrainedModel], float]]] = {
        f"prefill {length}": (length, lambda network, length=length: prefill_seconds(network, random_tokens(length)))
        for length in PREFILLS
    }
    tasks["generation"] = (arguments.new_tokens, lambda network: generation_seconds(network, arguments.new_tokens))
    rows = []
    for task, (tokens, seconds) in tasks.items():
        taken: dict[str, list[float]] = {"dense": [], "csr": []}
        for round_number in range(arguments.rounds + 1):
            for name, network in (("dense", dense), ("csr", sparse)):
                elapsed = seconds(network)
                if round_number:
                    taken[name].append(tokens / elapsed)
        row: dict[str, Any] = {"sparsity": ratio, "task": task}
        for name, speeds in taken.items():
            row |= {f"{name}_tokens_per_second": statistics.median(speeds), f"{name}_range": [min(speeds), max(speeds)]}
        row["ratio"] = row["csr_tokens_per_second"] / row["dense_tokens_per_second"]
        speeds = f"{row['dense_tokens_per_second']:8.1f} -> {row['csr_tokens_per_second']:8.1f} tokens/s"
        print(f"{100 * ratio:3.0f} %  {task:12} {speeds}  {row['ratio']:5.2f} x", file=sys.stderr)
        rows.append(row)
    return rows


def prefill_seconds(network: PreTrainedModel, tokens: Tensor) -> float:
    start = time.perf_counter()
    network(input_ids=tokens, logits_to_keep=1)
    return time.perf_counter() - start


def generation_seconds(network: PreTrainedModel, new_tokens: int) -> float:
    """Time greedy generation, token by token, after a prompt whose time is not counted."""
    output = network(input_ids=random_tokens(32), use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(new_tokens):
        tokens = output.logits[:, -1:].argmax(-1)
        output = network(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True)
    return time.perf_counter() - start


def random_tokens(length: int) -> Tensor:
    return torch.randint(100, 40_000, (1, length), generator=torch.Generator().manual_seed(length))


if __name__ == "__main__":
    main()
