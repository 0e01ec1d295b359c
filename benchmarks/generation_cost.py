"""Tokens per second of generation: a bare network against the same one with adapters, greedy with a cache.

    python benchmarks/generation_cost.py [MODEL] [--adapters FOLDER ... | --arm mop --experts 12] [--new-tokens 128]
        [--batches 1,8] [--rounds 5]

A model folder (SmolLM2-135M if not given) in fp32 and adapters that `recover` wrote for it, or one of random values
(they do not change the time), prompts of 64 random tokens. All take turns in one process, after a turn each that is
not counted; every turn is one `generate` of the same prompt and exactly so many tokens. Prints one JSON object: medians
with the least and greatest of the new tokens per second, and of each adapter's time relative to the bare network, turn
by turn. The time includes the prefill, in which the gate reads the prompt.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mopcompress.entrypoints.from_recipe import first_layer
from mopcompress.environment import provenance
from mopcompress.hf import MopForCausalLM
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import load_adapter

CPU = torch.device("cpu")


def main() -> None:
    arguments = parse()
    folder = resolve_model(arguments.model)
    model = load_model(folder, device=CPU)
    if arguments.adapters:
        sha256 = weights_hash(folder)
        adapters = {path.name: load_adapter(path, model, base_sha256=sha256) for path in arguments.adapters}
    else:
        adapters = {arguments.arm: random_adapter(model, arguments.arm, arguments.experts)}
    adapted = {name: MopForCausalLM.from_parts(model, *adapter) for name, adapter in adapters.items()}
    models = {"bare": model.network, **adapted}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for batch in map(int, arguments.batches.split(",")):
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(100, model.config.vocab_size, (batch, 64), generator=generator)
        turns = [
            {name: generation_seconds(network, tokens, arguments.new_tokens) for name, network in models.items()}
            for _ in range(arguments.rounds + 1)
        ][1:]
        new_tokens = batch * arguments.new_tokens
        results[f"batch {batch}"] = {
            **{f"{name}, tokens/s": spread([new_tokens / turn[name] for turn in turns]) for name in models},
            **{f"{name}, time against bare": spread([turn[name] / turn["bare"] for turn in turns]) for name in adapted},
        }
        for quantity, values in results[f"batch {batch}"].items():
            sys.stderr.write(f"batch {batch}: {quantity}: {values}\n")
    configs = {name: asdict(config) for name, (_, config) in adapters.items()}
    names = {"model": folder.name, "adapters": list(adapters)}  # a path says nothing on another machine
    facts = {"asked": vars(arguments) | names, "described": configs, "found": results, **provenance(CPU)}
    print(json.dumps(facts, indent=1, default=str))


def random_adapter(model: LanguageModel, arm: str, experts: int) -> tuple[Adapter, AdapterConfig]:
    config = AdapterConfig(
        arm=arm,
        experts=experts,
        prompts_per_expert=10,
        layer=first_layer(arm, None, model),
        hidden_size=model.hidden_size,
        base_sha256="",
        tasks=(),
    )
    adapter = RECOVERY_METHODS[arm].build(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in adapter.parameter_groups().values():
            for parameter in group:
                parameter.normal_(std=0.1, generator=generator)
    return adapter, config


def generation_seconds(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> float:
    """Time one generation of exactly `count` tokens per row."""
    start = time.perf_counter()
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert output.shape[1] == tokens.shape[1] + count
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--adapters", type=Path, nargs="+", default=[])
    parser.add_argument(
        "--arm", default="mop", choices=[arm for arm in RECOVERY_METHODS if not ARM_DEFAULTS[arm].needs_tasks]
    )
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
