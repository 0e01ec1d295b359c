"""The worker of GPTQModel: `python -I gptqmodel_worker.py FOLDER` runs a job in an environment without mopcompress.

GPTQModel saves packed weights. The returned weights are unpacked from those, as any runtime would see them.
"""

import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def main(folder: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file, save_file

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    (step,) = job["steps"]
    rows = load_file(folder / "tokens.safetensors")["tokens"]
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    model = GPTQModel.load(job["model"], QuantizeConfig(**config_fields(step["options"])), dtype=torch.float32)
    model.quantize_config.dynamic = excluded_modules(model.model, step["linears"])
    start = time.perf_counter()
    log = model.quantize(batches, batch_size=1)
    seconds = time.perf_counter() - start
    model.save(str(folder / "packed"))
    packed: dict[str, Tensor] = {}
    for path in (folder / "packed").glob("*.safetensors"):
        packed |= load_file(path)
    weights = {name: unpack_weight(packed, name, step["options"]["bits"]) for name in step["linears"]}
    scales = {f"{name}.scales": packed[f"{name}.scales"].T.float().contiguous() for name in step["linears"]}
    save_file(weights | scales, folder / "weights.safetensors")
    facts = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("gptqmodel", "transformers", "torch")},
        "fallbacks": find_fallbacks(log, step["linears"]),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def config_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a QuantizeConfig; `act_group_aware` quantises important inputs first, in intact groups."""
    return {
        "bits": options["bits"],
        "group_size": options["group_size"] or -1,
        "damp_percent": options["damping"],
        "desc_act": False,
        "act_group_aware": options["act_order"],
        "sym": True,
        "device": "cpu",
    }


def excluded_modules(network: torch.nn.Module, linears: list[str]) -> dict[str, dict[str, Any]] | None:
    """Return GPTQModel's `dynamic`: a pattern for every linear outside `linears`; None when there is none."""
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    return {f"-:^{re.escape(name)}$": {} for name in names if name not in linears} or None


def find_fallbacks(log: dict[str, Any], linears: list[str]) -> list[str]:
    """Return the linears that were only rounded to nearest, which GPTQModel notes in its column `loss`."""
    names = set()
    for rows in log.values():
        for row in rows:
            if "fallback" in str(row.get("loss", "")):
                ending = f".{row.get('layer')}.{row.get('module')}"
                names |= {name for name in linears if name.endswith(ending)}
    return sorted(names)


def unpack_weight(packed: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """Return the weight [out, in] that GPTQ v1 stores packed: codes minus zeros, times scales."""
    scales, groups = packed[f"{name}.scales"].float(), packed[f"{name}.g_idx"].long()
    codes = unpack_columns(packed[f"{name}.qweight"], bits)
    zeros = unpack_columns(packed[f"{name}.qzeros"].T, bits).T + 1  # v1 stores zero - 1
    return ((codes - zeros[groups]) * scales[groups]).T.contiguous()


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned numbers of `bits` bits that are packed back to back down the columns of int32 words."""
    stream = (words[:, None] >> torch.arange(32, dtype=torch.int32)[:, None]) & 1
    bit_values = 2 ** torch.arange(bits)
    return (stream.reshape(-1, bits, words.shape[1]) * bit_values[:, None]).sum(1)


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
