"""Ours against llm-compressor: perplexity, seconds and peak memory, alternating in one run, on the same token ids.

    python benchmarks/against_llmcompressor.py --their-python ENV/bin/python --output FOLDER [--default "--method alps"]

ENV is an environment with llm-compressor (`pip install 'llmcompressor==0.14.*'`). For every setting (unstructured 50,
70 and 85 %, 2:4, GPTQ with 3 bits in groups of 64) three commands compress the same folder, one after the other, each
in a process of its own: theirs, ours with the same method, and ours with the words of `--default`. Then this process
scores all of them in float32. Everything else has its default: their GPTQ takes scales from minimum and maximum (their
`observer: mse` would look for better ones), ours those of the least squared error.

Seconds are of compression alone, without imports, loading and saving; process seconds are of the whole process that
compressed. Calibration: 24 x 512 tokens of tokenised WikiText-2 validation; test: the first 12 x 512 of its test, with
` @-@ ` and the like replaced. Rows are appended to FOLDER/rows.jsonl; a run that is started again skips those it finds.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sparsegpt_reference import detokenized, perplexity

from mopcompress.data.text_windows import text_windows
from mopcompress.environment import now, provenance
from mopcompress.models.model_loading import load_model, resolve_model

DATA = Path(__file__).parents[2] / "shared" / "data" / "lm"
SETTINGS = {
    "50 %": "prune --sparsity 0.5",
    "70 %": "prune --sparsity 0.7",
    "85 %": "prune --sparsity 0.85",
    "2:4": "prune --pattern 2:4",
    "3 bits": "quantize --bits 3 --group-size 64",
}
THEIRS, SAME, DEFAULT = "llm-compressor", "ours, same method", "ours, default"
SAME_GPTQ = """gptq_stage:
  gptq_modifiers:
    GPTQModifier: {config_groups: {group_0: {weights: {num_bits: 3, strategy: group, group_size: 64}}}}
"""  # our default matches the dense model too


@dataclass(frozen=True)
class Run:
    """One compression: a setting, the arm that does it, and the words of the command without paths."""

    setting: str
    arm: str
    repeat: int
    words: str

    @property
    def key(self) -> list[object]:
        """The identity of the run, the same on every machine: of a path, the last part counts."""
        words = [Path(word).name if "/" in word else word for word in shlex.split(self.words)]
        return [self.setting, self.arm, self.repeat, shlex.join(words)]


def main() -> None:
    arguments = parse()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve_model(arguments.model)
    text = folder / "calibration.txt"
    text.write_text(detokenized(arguments.data / "wikitext2_tokens_valid.txt"), encoding="utf-8")
    (folder / "gptq.yaml").write_text(SAME_GPTQ, encoding="utf-8")
    rows = read_rows(folder)
    finished = [row["key"] for row in rows]
    for run in runs_of(arguments):
        if run.key in finished:
            continue
        made = folder / "models" / "".join(c if c.isalnum() else "-" for c in f"{run.setting} {run.arm} {run.repeat}")
        shutil.rmtree(made, ignore_errors=True)  # of a run that was stopped
        row = {"key": run.key, "setting": run.setting, "arm": run.arm, "started": now()}
        row |= compressed(run, source, text, made, arguments)
        row |= {"perplexity": score(made, arguments), **provenance(torch.device("cpu"))}
        if not arguments.keep:
            shutil.rmtree(made)
        rows.append(row)
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({name: row[name] for name in ("key", "perplexity", "seconds", "peak_bytes")}), flush=True)
    (folder / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--their-python", type=Path, required=True, help="python that has llm-compressor")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows.jsonl and table.md")
    parser.add_argument("--default", default="", metavar="WORDS", help="our default, such as '--method alps'")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="a choice of them")
    parser.add_argument("--arms", default=f"{THEIRS};{SAME};{DEFAULT}", help="a choice of them, with ; between")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wikitext2_tokens_{valid,test}.txt")
    parser.add_argument("--samples", type=int, default=24, help="windows of calibration text")
    parser.add_argument("--test-samples", type=int, default=12, help="windows of test text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--keep", action="store_true", help="keep the compressed models")
    return parser.parse_args()


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """List all runs, arm after arm in every setting, so that a machine that gets slower does so for all arms."""
    python = shlex.quote(str(arguments.their_python))
    backend = f"--backend llmcompressor --backend-python {python} --set run.max_fallback_fraction=1"
    runs = []
    for repeat in range(arguments.repeats):
        for setting in arguments.settings.split(","):
            words = SETTINGS[setting]
            rounds = words.startswith("quantize")
            same = f"--recipe {shlex.quote(str(arguments.output / 'gptq.yaml'))}" if rounds else "--method sparsegpt"
            more = {THEIRS: f"{same} {backend}", SAME: same, DEFAULT: "" if rounds else arguments.default}
            runs += [
                Run(setting, arm, repeat, " ".join(f"{words} {more[arm]}".split())) for arm in arguments.arms.split(";")
            ]
    return runs


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def compressed(run: Run, source: Path, text: Path, target: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command, and return its costs from its manifest and from the operating system."""
    words = [*shlex.split(run.words), source, "--calibration", text, "--output-dir", target, "--json"]
    size = ["--num-calibration-samples", arguments.samples, "--max-seq-length", arguments.length, "--device", "cpu"]
    command = [sys.executable, "-m", "mopcompress", *map(str, words + size)]
    start = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    process_seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"{shlex.join(command)} ended with {code}")
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    theirs = manifest.get("backend", {})
    return {
        "seconds": manifest["compress_seconds"],
        "process_seconds": theirs.get("process_seconds", process_seconds),
        "peak_bytes": manifest["peak_bytes"],
        "their_versions": theirs.get("versions"),
        "sparsity": manifest["sparsity"],
        "fallbacks": manifest["fallbacks"],
        "compressing_threads": theirs.get("threads", manifest["threads"]),
        "calibration_sha256": manifest["calibration"]["sha256"],
    }


def score(folder: Path, arguments: argparse.Namespace) -> float:
    model = load_model(folder, device=torch.device("cpu"))
    text = detokenized(arguments.data / "wikitext2_tokens_test.txt")
    return perplexity(
        model, text_windows(text, model.tokenizer, samples=arguments.test_samples, length=arguments.length)
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return one line per setting and arm: medians over repeats, and ratios to theirs."""
    lines = [
        "| setting | who | perplexity | x theirs | seconds | x theirs | process s | x theirs | peak GB | x theirs |",
        "|---|---|" + "--:|" * 8,
    ]
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in rows):
        cells = [setting, arm]
        for name, scale, form in (
            ("perplexity", 1, ".4g"),
            ("seconds", 1, ".1f"),
            ("process_seconds", 1, ".1f"),
            ("peak_bytes", 1e-9, ".2f"),
        ):
            mine, theirs = middle(rows, setting, arm, name), middle(rows, setting, THEIRS, name)
            cells += [f"{mine * scale:{form}}", f"{mine / theirs:.3f}" if theirs else ""]
        lines.append(f"| {' | '.join(cells)} |")
    made_by = sorted({f"{row['commit']}{' (changed)' if row['dirty'] else ''}" for row in rows})
    theirs = next((row["their_versions"] for row in rows if row["their_versions"]), {})
    versions = ", ".join(f"{name} {version}" for name, version in theirs.items())
    threads = sorted({row["compressing_threads"] for row in rows})
    return "\n".join([*lines, "", f"Commit {', '.join(made_by)}; theirs: {versions}; threads {threads}.", ""])


def middle(rows: list[dict[str, Any]], setting: str, arm: str, name: str) -> float:
    values = [row[name] for row in rows if (row["setting"], row["arm"]) == (setting, arm)]
    return median(values) if values else 0.0


if __name__ == "__main__":
    main()
