"""GPTQModel on one job: `python -I gptqmodel_worker.py FOLDER`, in its own environment, without mopcompress.

What it saves is packed; the weights that go back are unpacked from that, as any runtime would see them.
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
    model.quantize_config.dynamic = left_out(model.model, step["linears"])
    start = time.perf_counter()
    told = model.quantize(batches, batch_size=1)
    seconds = time.perf_counter() - start
    model.save(str(folder / "packed"))
    packed: dict[str, Tensor] = {}
    for path in (folder / "packed").glob("*.safetensors"):
        packed |= load_file(path)
    answer = {name: unpacked(packed, name, step["options"]["bits"]) for name in step["linears"]}
    scales = {f"{name}.scales": packed[f"{name}.scales"].T.float().contiguous() for name in step["linears"]}
    save_file(answer | scales, folder / "weights.safetensors")
    facts = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("gptqmodel", "transformers", "torch")},
        "fallbacks": fallbacks(told, step["linears"]),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def config_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a QuantizeConfig; `act_group_aware` takes important inputs first and keeps groups whole."""
    return {
        "bits": options["bits"],
        "group_size": options["group_size"] or -1,
        "damp_percent": options["damping"],
        "desc_act": False,
        "act_group_aware": options["act_order"],
        "sym": True,
        "device": "cpu",
    }


def left_out(network: torch.nn.Module, linears: list[str]) -> dict[str, dict[str, Any]] | None:
    """GPTQModel's `dynamic`: a pattern for every linear that is to stay as it is."""
    every = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    return {f"-:^{re.escape(name)}$": {} for name in every if name not in linears} or None


def fallbacks(told: dict[str, Any], linears: list[str]) -> list[str]:
    """Linears that were rounded to the nearest after all: the loss that is told of them says so."""
    found = set()
    for rows in told.values():
        for row in rows:
            if "fallback" in str(row.get("loss", "")):
                ending = f".{row.get('layer')}.{row.get('module')}"
                found |= {name for name in linears if name.endswith(ending)}
    return sorted(found)


def unpacked(packed: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """The weight [out, in] that GPTQ v1 holds in packed form: codes less zeros, times scales."""
    scales, groups = packed[f"{name}.scales"].float(), packed[f"{name}.g_idx"].long()
    codes = fields_of(packed[f"{name}.qweight"], bits)
    zeros = fields_of(packed[f"{name}.qzeros"].T, bits).T + 1  # v1 stores one less
    return ((codes - zeros[groups]) * scales[groups]).T.contiguous()


def fields_of(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of so many bits that lie one after another down the columns of int32 words."""
    stream = (words[:, None] >> torch.arange(32, dtype=torch.int32)[:, None]) & 1
    places = 2 ** torch.arange(bits)
    return (stream.reshape(-1, bits, words.shape[1]) * places[:, None]).sum(1)


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
