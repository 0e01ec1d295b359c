"""Ours against SparseGPT as published: perplexity at 50 % on the same model, calibration and test tokens.

The reference follows algorithm 1 of arXiv 2301.00774 and its driver: all linears of a block are calibrated on the
block's *dense* weights, the block runs twice, the mask of 128 columns is where w² / [H⁻¹]²jj is at most its k-th value,
and every column is an update of its own. It is written from the equations and shares no code with the package's solver.

    python benchmarks/sparsegpt_reference.py --calibration TEXT --test TEXT [--ratio 0.5]

TEXT is WikiText-2 in tokenised form: ` @-@ `, ` @,@ ` and ` @.@ ` are replaced by `-`, `,` and `.`. Prints one JSON
object. Timing excludes loading and scoring; both run in this process, one after the other.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import compress_model
from mopcompress.data.text_windows import text_windows
from mopcompress.environment import provenance
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model


def main() -> None:
    arguments = parse()
    source = resolve_model("smollm2")
    device = torch.device("cpu")
    model = load_model(source, device=device)
    tokens = text_windows(detokenized(arguments.calibration), model.tokenizer, samples=24, length=512)
    test = text_windows(detokenized(arguments.test), model.tokenizer, samples=12, length=512)
    result = {"ratio": arguments.ratio, "dense_perplexity": perplexity(model, test), **provenance(device)}
    for name, compress in (("ours", ours), ("reference", reference)):
        model = load_model(source, device=device)
        start = time.perf_counter()
        with torch.inference_mode():
            compress(model, tokens, arguments.ratio)
        seconds = time.perf_counter() - start
        result |= {f"{name}_perplexity": perplexity(model, test), f"{name}_seconds": seconds}
    result["perplexity_ratio"] = result["ours_perplexity"] / result["reference_perplexity"]
    result["seconds_ratio"] = result["ours_seconds"] / result["reference_seconds"]
    print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.5)
    return parser.parse_args()


def detokenized(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    return text


@torch.inference_mode()
def perplexity(model: LanguageModel, windows: Tensor) -> float:
    nats = [
        nn.functional.cross_entropy(model.network(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        for batch in windows.split(4)
    ]
    return float(torch.stack(nats).mean().exp())


def ours(model: LanguageModel, tokens: Tensor, ratio: float) -> None:
    compress_model(model, tokens, [MethodConfig(method="sparsegpt", options={"sparsity": ratio})])


def reference(model: LanguageModel, tokens: Tensor, ratio: float) -> None:
    hidden = None
    for index, block in enumerate(model.blocks):
        grams: dict[nn.Linear, Tensor] = {}
        handles = [
            linear.register_forward_pre_hook(partial(record_gram, grams))
            for linear in block.modules()
            if isinstance(linear, nn.Linear)
        ]
        model.run_block(tokens, hidden, index)
        for handle in handles:
            handle.remove()
        for linear, gram in grams.items():
            linear.weight.copy_(prune(linear.weight.clone(), gram, ratio))
        hidden = model.run_block(tokens, hidden, index)


def record_gram(grams: dict[nn.Linear, Tensor], linear: nn.Linear, inputs: tuple[Tensor]) -> None:
    grams[linear] = input_gram(inputs[0])


def input_gram(inputs: Tensor) -> Tensor:
    rows = inputs.flatten(0, -2)
    return rows.T @ rows * (2 / len(inputs))


def prune(weight: Tensor, hessian: Tensor, ratio: float, block: int = 128) -> Tensor:
    """Algorithm 1: Hinv = Cholesky((H + lambda I)^-1)^T, then column after column with lazy updates past the block."""
    columns = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    # in float64: in float32 the inverse of some layers' Hessian is not positive definite any more
    factor = torch.linalg.cholesky(hessian.double())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = torch.zeros(len(weight), last - first)
        scores = weight[:, first:last] ** 2 / inverse.diagonal()[first:last] ** 2
        mask = scores <= scores.flatten().sort().values[int(scores.numel() * ratio)]
        for column in range(first, last):
            pruned = weight[:, column].masked_fill(mask[:, column - first], 0)
            error = (weight[:, column] - pruned) / inverse[column, column]
            weight[:, column:last] -= error[:, None] * inverse[column, column:last]
            weight[:, column] = pruned
            errors[:, column - first] = error
        weight[:, last:] -= errors @ inverse[first:last, last:]
    return weight


if __name__ == "__main__":
    main()
