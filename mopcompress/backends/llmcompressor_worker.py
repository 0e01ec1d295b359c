"""The worker of llm-compressor: `python -I llmcompressor_worker.py FOLDER` runs a job without mopcompress.

Linears are targeted by name. With targets by class, llm-compressor 0.14 overlooks `ignore: [lm_head]`, because it
compares names that end with a dot. A matrix that cannot be inverted and is replaced by the identity appears in its log
only, which is therefore read too.
"""

import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    import torch
    from llmcompressor import oneshot
    from loguru import logger
    from safetensors.torch import load_file, save_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)
    rows = load_file(folder / "tokens.safetensors")["tokens"]
    samples: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    log_reader = FallbackLogReader()
    logger.add(log_reader, level="DEBUG", format="{message}")
    modifiers = [build_modifier(step) for step in job["steps"]]
    start = time.perf_counter()
    oneshot(model=model, dataset=DataLoader(samples), recipe=modifiers)
    seconds = time.perf_counter() - start
    tensors = model.state_dict()
    weights = {}
    for name in {name for step in job["steps"] for name in step["linears"]}:
        weights[name] = tensors[f"{name}.weight"].detach().contiguous()
        if f"{name}.weight_scale" in tensors:
            weights[f"{name}.scales"] = tensors[f"{name}.weight_scale"].detach().contiguous()
    save_file(weights, folder / "weights.safetensors")
    facts = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")
        },
        "fallbacks": sorted(log_reader.fallbacks),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


class FallbackLogReader:
    """A receiver of log lines that collects the names of linears for which the method failed."""

    def __init__(self) -> None:
        self.fallbacks: set[str] = set()
        self._current = ""

    def __call__(self, line: str) -> None:
        if match := re.search(r"Sparsifying (\S+) using", line):
            self._current = match[1].rstrip(".")
        elif "Failed to invert hessian" in line:
            self.fallbacks.add(self._current)
        elif match := re.search(r"(?:Affected modules|inversion failure): (.*)", line):
            self.fallbacks |= {name for name in match[1].split(", ") if not name.startswith("and ")}


def build_modifier(step: dict[str, Any]) -> Any:
    """Return llm-compressor's modifier for a step of a job."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import MagnitudePruningModifier, SparseGPTModifier, WandaPruningModifier

    options, linears = step["options"], step["linears"]
    if step["method"] == "gptq":
        return GPTQModifier(**gptq_fields(options, linears))
    pattern = options.get("pattern")
    structure = "0:0" if pattern is None else f"{pattern[0]}:{pattern[1]}"
    if step["method"] == "magnitude":
        targets = [f"{name}.weight" for name in linears]
        sparsity = options["sparsity"]
        return MagnitudePruningModifier(
            init_sparsity=sparsity, final_sparsity=sparsity, targets=targets, start=0, end=1
        )
    fields = {"sparsity": options["sparsity"], "mask_structure": structure, "targets": linears}
    if step["method"] == "wanda":
        return WandaPruningModifier(**fields)
    return SparseGPTModifier(
        **fields,
        block_size=options["block_size"],
        dampening_frac=options["damping"],
        preserve_sparsity_mask=options["keep_zeros"],
    )


def gptq_fields(options: dict[str, Any], linears: list[str]) -> dict[str, Any]:
    """Return the fields of a GPTQModifier."""
    size = options["group_size"]
    shape = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    weights = {"num_bits": options["bits"], "type": "int", "symmetric": True, **shape}
    return {
        "config_groups": {"group_0": {"targets": linears, "weights": weights}},
        "block_size": options["block_size"],
        "dampening_frac": options["damping"],
        "actorder": "static" if options["act_order"] else None,
    }


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes; 0 where it cannot be measured.

    On Linux, getrusage may report the peak of the process that started this one, so VmHWM is read first.
    """
    status = Path("/proc/self/status")
    match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if match:
        return 1024 * int(match[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(Path(sys.argv[1]))
