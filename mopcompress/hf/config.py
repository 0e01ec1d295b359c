"""The configuration of a recovered model: that of the network, and what its adapter's weights are for."""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


class MopConfig(PretrainedConfig):
    """`text_config`, where transformers looks for the language model of a composite, and the adapter's own."""

    model_type = "mopcompress"

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        adapter: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Without `text_config` it is empty: transformers makes one such to see what differs from it."""
        if isinstance(text_config, Mapping):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config
        self.adapter = None if adapter is None else dict(adapter)
        super().__init__(**kwargs)
