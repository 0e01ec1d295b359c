"""The fraction of this machine's GEMM peak that our compression reaches: FLOPs needed over FLOPs possible in its time.

    python benchmarks/compression_speed.py [--calibration TEXT] [--method alps] [--sparsity 0.5]

FLOPs needed are those of the method when nothing is computed twice: every linear and the causal half of attention once,
the lower half of each Gram matrix (one for linears that share their input), its Cholesky factor and the inverse of
that, and the sweep or the solver's steps; where the dense model is matched, its pass, the product of its inputs (or
outputs, where fewer) with the inputs, and the target too. Norms, rotary embeddings, softmax, the choice of masks and
the survey of an allocation count as nothing. The peak is the best of square float32 products before and after. Prints
one JSON object; timing excludes loading.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from sparsegpt_reference import detokenized
from torch import Tensor

from mopcompress.algorithms.alps import _STEPS_PER_PENALTY as STEPS_PER_PENALTY
from mopcompress.compress.dense_pass import record_inputs
from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import compress_model, linears_of
from mopcompress.data.text_windows import text_windows
from mopcompress.entrypoints.allocate_sparsity import allocate_sparsity
from mopcompress.entrypoints.from_recipe import method_config
from mopcompress.environment import peak_bytes, provenance
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model
from mopcompress.recipe import load_recipe
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.overrides import pruning_recipe
from mopcompress.recipe.pruning_modifiers import Masking

DATA = Path(__file__).parents[2] / "shared" / "data" / "lm"


def main() -> None:
    arguments = parse()
    device = torch.device("cpu")
    recipe = pruning_recipe(load_recipe(arguments.recipe), method=arguments.method, sparsity=arguments.sparsity)
    modifiers = [modifier for modifier in recipe.modifiers(Spec) if isinstance(modifier, Masking)]
    model = load_model(resolve_model(arguments.model), device=device)
    text = detokenized(arguments.calibration)
    tokens = text_windows(text, model.tokenizer, samples=arguments.samples, length=arguments.length)
    configs = [method_config(modifier) for modifier in modifiers]
    flops = needed_flops(model, tokens, configs)
    before = gemm_peak()
    start = time.perf_counter()
    allocated = [
        allocate_sparsity(config, modifier, model, tokens) for config, modifier in zip(configs, modifiers, strict=True)
    ]
    rows = compress_model(model, tokens, allocated)
    seconds = time.perf_counter() - start
    peak = max(before, gemm_peak())
    total = sum(flops.values())
    result = {
        "methods": [config.method for config in configs],
        "sparsity": sum(row.zeros for row in rows) / sum(row.weights for row in rows),
        "tokens": list(tokens.shape),
        "seconds": seconds,
        "seconds_in_solvers": sum(row.seconds for row in rows),
        "needed_gflop": {name: count / 1e9 for name, count in flops.items()},
        "gemm_peak_gflops": peak / 1e9,
        "seconds_at_peak": total / peak,
        "fraction_of_peak": total / peak / seconds,
        "peak_bytes": peak_bytes(),
        **provenance(device),
    }
    print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, default=DATA / "wikitext2_tokens_valid.txt")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipe", type=Path, help="its pruning modifiers, in the place of --method")
    parser.add_argument("--method", choices=("magnitude", "wanda", "sparsegpt", "alps"))
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    return parser.parse_args()


def needed_flops(model: LanguageModel, tokens: Tensor, configs: Sequence[MethodConfig]) -> Counter[str]:
    """Count FLOPs by kind of work; a multiply-add is two. Linears with the same inputs share a Gram matrix."""
    samples, length = tokens.shape
    flops: Counter[str] = Counter()
    config = model.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    dense_samples = max(config.dense_samples(samples) for config in configs)  # that the dense model runs on
    with torch.inference_mode():
        for index in range(len(model.blocks)):
            with record_inputs(linears_of(model, index)) as inputs:
                model.run_block(tokens[:1, :1], None if index == 0 else torch.zeros(1, 1, model.hidden_size), index)
            size_of = {id(value): value.shape[-1] for value in inputs.values()}
            rows_of: Counter[int] = Counter()
            for linear, value in inputs.items():
                rows_of[id(value)] += linear.weight.numel() // value.shape[-1]
            flops["attention"] += 2 * (samples + dense_samples) * length * length * width
            flops["linears"] += 2 * (samples + dense_samples) * length * sum(linear.weight.numel() for linear in inputs)
            for key, size in size_of.items():
                flops["grams"] += tokens.numel() * size * (size + 1)
                flops["grams"] += (
                    2 * dense_samples * length * size * min(size, 2 * rows_of[key])
                )  # by inputs or by outputs
                flops["solvers"] += sum(solver_flops(config, rows_of[key], size) for config in configs)
                flops["solvers"] += (size**3 // 3 + 4 * rows_of[key] * size**2) * bool(dense_samples)
    return flops


def solver_flops(config: MethodConfig, rows: int, size: int) -> int:
    """Count the FLOPs of the linears with the same inputs, without those of their Gram matrix and their target."""
    options = config.options
    factor, product = 2 * size**3 // 3, 2 * rows * size**2
    flops = config.refit_steps * product
    if config.method in {"sparsegpt", "gptq"}:
        flops += factor + product // 2
    if config.method == "alps":
        steps, refit_steps = int(str(options["steps"])), int(str(options["refit_steps"]))
        flops += (steps + 1 + refit_steps) * product + -(-steps // STEPS_PER_PENALTY) * size**3
    return flops


def gemm_peak(size: int = 2048, repeats: int = 8) -> float:
    """Return the FLOPs per second of the fastest float32 product, with the threads that compression has."""
    left, right, product = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
