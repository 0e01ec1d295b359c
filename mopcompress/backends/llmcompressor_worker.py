"""llm-compressor on one job: `python -I llmcompressor_worker.py FOLDER`, in its own environment, without mopcompress.

Linears are named one by one. By class, `ignore: [lm_head]` would not be heeded: the name that llm-compressor 0.14 looks
for has a dot at its end. What it only logs, a matrix that could not be inverted and was left to the identity, is noted.
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
    listener = Listener()
    logger.add(listener, level="DEBUG", format="{message}")
    modifiers = [modifier_of(step) for step in job["steps"]]
    start = time.perf_counter()
    oneshot(model=model, dataset=DataLoader(samples), recipe=modifiers)
    seconds = time.perf_counter() - start
    tensors = model.state_dict()
    answer = {}
    for name in {name for step in job["steps"] for name in step["linears"]}:
        answer[name] = tensors[f"{name}.weight"].detach().contiguous()
        if f"{name}.weight_scale" in tensors:
            answer[f"{name}.scales"] = tensors[f"{name}.weight_scale"].detach().contiguous()
    save_file(answer, folder / "weights.safetensors")
    facts = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")
        },
        "fallbacks": sorted(listener.fallbacks),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


class Listener:
    """Hears from the log which linear is being compressed, and for which of them the method was given up."""

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


def modifier_of(step: dict[str, Any]) -> Any:
    """A step in llm-compressor's words."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import MagnitudePruningModifier, SparseGPTModifier, WandaPruningModifier

    options, linears = step["options"], step["linears"]
    if step["method"] == "gptq":
        return GPTQModifier(**gptq_fields(options, linears))
    pattern = options.get("pattern")
    structure = "0:0" if pattern is None else f"{pattern[0]}:{pattern[1]}"
    if step["method"] == "magnitude":
        targets = [f"{name}.weight" for name in linears]
        share = options["sparsity"]
        return MagnitudePruningModifier(init_sparsity=share, final_sparsity=share, targets=targets, start=0, end=1)
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
    """The fields of a GPTQModifier."""
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
    """Peak resident memory of this process; Linux's getrusage may tell that of the process that started it."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows; 0 stands for "not measured"
        return 0
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(Path(sys.argv[1]))
