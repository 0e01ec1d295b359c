"""Recovered models as transformers classes: `from_pretrained`, `generate`, `pipeline`, `Trainer`."""

from transformers import AutoConfig, AutoModelForCausalLM

from mopcompress.hf.config import MopConfig
from mopcompress.hf.model import MopForCausalLM

__all__ = ["MopConfig", "MopForCausalLM"]

AutoConfig.register(MopConfig.model_type, MopConfig)
AutoModelForCausalLM.register(MopConfig, MopForCausalLM)
