"""Tokens a second of generation: a bare network against the same one with an adapter, greedy with a cache.

    python benchmarks/generation_cost.py [--arm mop] [--experts 12] [--new-tokens 128] [--batches 1,8] [--rounds 5]

SmolLM2-135M in fp32 and an adapter as `recover` begins one (its values do not change the time), prompts of 64 random
tokens. Both take turns in one process, after a turn each that is not counted; every turn is one `generate` of the same
prompt and exactly so many tokens. Prints one JSON object: medians with the least and greatest, and the ratio of times,
turn by turn. Prefill, the gate's reading with it, is in the time.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from transformers import PreTrainedModel

from mopcompress.hf import MopForCausalLM
from mopcompress.models.checkpoint import load_model, resolve_model
from mopcompress.recover.adapter import AdapterConfig
from mopcompress.recover.arms import ARMS
from mopcompress.stages.provenance import provenance

CPU = torch.device("cpu")


def main() -> None:
    asked = parse()
    model = load_model(resolve_model("smollm2"), device=CPU)
    described = AdapterConfig(
        arm=asked.arm,
        experts=asked.experts,
        prompts_per_expert=10,
        layer=round(10 / 32 * len(model.blocks)),
        hidden_size=model.hidden_size,
        base_sha256="",
        tasks=(),
    )
    adapter = ARMS[asked.arm].build(model, described)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    models = {"bare": model.network, "adapted": MopForCausalLM.around(model, adapter, described)}
    found = {}
    for batch in map(int, asked.batches.split(",")):
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(100, model.config.vocab_size, (batch, 64), generator=generator)
        turns = [
            {name: seconds(one, tokens, asked.new_tokens) for name, one in models.items()}
            for _ in range(asked.rounds + 1)
        ][1:]
        found[f"batch {batch}"] = {
            **{name: spread([turn[name] for turn in turns]) for name in models},
            "ratio": spread([turn["adapted"] / turn["bare"] for turn in turns]),
        }
        sys.stderr.write(f"batch {batch}: {found[f'batch {batch}']['ratio']}\n")
    print(json.dumps({"asked": vars(asked), "seconds": found, **provenance(CPU)}, indent=1))


def seconds(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> float:
    """The time of one generation of exactly `count` tokens a row."""
    start = time.perf_counter()
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert written.shape[1] == tokens.shape[1] + count
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="mop", choices=ARMS)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
