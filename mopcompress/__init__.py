"""Compress a causal language model, then win back what it lost with a Mixture of Prompts.

The public names are resolved when first used, so that importing the package costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "MopError": "errors",
    "load_recipe": "recipe",
    "load_model": "models.model_loading",
    "load_examples": "data.examples",
    "compress_model": "compress.sequential",
    "fit": "recover.training",
    "evaluate": "evaluation.perplexity",
    "MopConfig": "hf",
    "MopForCausalLM": "hf",
    "bench": "entrypoints.bench.runner",
    "write_report": "report",
}
__all__ = sorted(_HOME, key=str.casefold)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mopcompress' has no attribute {name!r}")
    return getattr(import_module(f"mopcompress.{_HOME[name]}"), name)
