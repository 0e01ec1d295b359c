"""The configuration of a recovered model: that of the network, and that of its adapter."""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


class MopConfig(PretrainedConfig):
    """Configuration of a recovered model: its network and its adapter.

    `MopForCausalLM.save_pretrained` writes it as `config.json`, and `AutoConfig` reads it from there.

    Args:
        text_config: Configuration of the network, or its fields with `model_type` among them. It has the name under
            which transformers looks for the language model of a composite.
        adapter: Fields of the adapter's configuration, under their names in `adapter.json`.
        **kwargs: Fields that every transformers configuration has, such as `dtype`.

    Without `text_config` the configuration is empty: transformers makes one such to see which fields differ from it.

    Example:
        >>> from mopcompress import MopConfig
        >>> network = {"model_type": "llama", "hidden_size": 32}
        >>> adapter = {"arm": "mop", "experts": 2, "prompts_per_expert": 10, "layer": 1, "hidden_size": 32}
        >>> config = MopConfig(text_config=network, adapter=adapter)
        >>> config.model_type, config.text_config.hidden_size, config.adapter["arm"]
        ('mopcompress', 32, 'mop')
    """

    model_type = "mopcompress"

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        adapter: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, Mapping):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config
        self.adapter = None if adapter is None else dict(adapter)
        super().__init__(**kwargs)
