"""A compressed network and the adapter that recovers it as one transformers model."""

from pathlib import Path
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mopcompress.errors import DataError
from mopcompress.evaluation.batching import positions
from mopcompress.hf.adapter_loading import (
    build_adapter,
    load_base_and_adapter,
    load_saved_model,
    make_network,
    parse_device_map,
    parse_dtype,
    rename_from_disk,
    select_hub_arguments,
    state_dict_to_disk,
)
from mopcompress.hf.adapter_runner import AdapterRunner
from mopcompress.hf.config import MopConfig
from mopcompress.models.compat import CACHE
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import resolve_model
from mopcompress.models.repair import RepairsByName, repair_of, write_repairs
from mopcompress.models.weight_files import REPAIR
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.save_and_load import config_from_disk, config_to_disk


class MopForCausalLM(PreTrainedModel, GenerationMixin):
    """A compressed network with the adapter that recovers it, as one transformers model.

    `generate`, `pipeline` and `Trainer` work as with any causal language model. `network` is frozen and never in
    training mode; `adapter` is trained. Import of `mopcompress.MopForCausalLM` registers the class with
    `AutoModelForCausalLM`.

    Args:
        config: Configuration of the network and of the adapter.
        network: The network; None makes one with random weights.
        adapter: The adapter; None makes one in the right shapes, without trained values.

    Raises:
        DataError: The configuration lacks the network or the adapter.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig
        >>> from mopcompress import MopConfig, MopForCausalLM
        >>> sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 48}
        >>> network = LlamaConfig(hidden_size=32, **sizes)
        >>> adapter = {"arm": "mop", "experts": 2, "prompts_per_expert": 10, "layer": 1, "hidden_size": 32}
        >>> adapter |= {"base_sha256": "", "tasks": ["add", "sort"]}
        >>> model = MopForCausalLM(MopConfig(text_config=network, adapter=adapter))
        >>> model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape
        torch.Size([1, 3, 64])
    """

    config_class = MopConfig
    base_model_prefix = "network"
    _supports_sdpa = True  # attention is the network's own business

    def __init__(
        self, config: MopConfig, network: PreTrainedModel | None = None, adapter: Adapter | None = None
    ) -> None:
        super().__init__(config)
        if config.text_config is None or config.adapter is None:
            raise DataError("a MopConfig needs text_config and adapter; give both")
        self.network = make_network(config.text_config) if network is None else network
        self.language_model = LanguageModel(self.network)
        adapter = adapter or build_adapter(self.language_model, config_from_disk(config.adapter))
        assert isinstance(adapter, nn.Module)  # for mypy: a protocol cannot ask for it
        self.adapter = adapter.requires_grad_(True)
        self.generation_config = self.network.generation_config
        self._runner = AdapterRunner(self.language_model, adapter)
        self._repairs: RepairsByName = {}
        self.register_load_state_dict_pre_hook(rename_from_disk)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]
        self.train(False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter: str | Path | None = None,
        *,
        config: PretrainedConfig | None = None,
        dtype: Any = None,
        device_map: Any = None,
        **arguments: Any,
    ) -> "MopForCausalLM":
        """Load a base and the adapter that `recover` wrote for it, or the one folder that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: The base: a folder, a hub id or `smollm2`. Without `adapter`, a saved folder
                or its hub id.
            adapter: The adapter's folder.
            config: The configuration of a saved folder, which the Auto classes have read already.
            dtype: A dtype or its name. By default, and with `auto`, a base is in fp32 and a saved folder in the dtype
                it is stored in.
            device_map: One device, as a device, its index or name, or `{"": device}`.
            **arguments: What is downloaded from the hub: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`.

        Returns:
            The model in evaluation mode.

        Raises:
            TypeError: An argument that a stock model takes and that would have no effect here.
            InputNotFoundError: A folder does not exist.
            DataError: A folder is damaged, is no recovered model, or the adapter belongs to another base.

        Example:
            >>> import tempfile
            >>> from transformers import LlamaConfig
            >>> from mopcompress import MopConfig, MopForCausalLM
            >>> sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 48}
            >>> adapter = {"arm": "norms", "experts": 2, "prompts_per_expert": 10, "layer": 1, "hidden_size": 32}
            >>> adapter |= {"base_sha256": "", "tasks": []}
            >>> config = MopConfig(text_config=LlamaConfig(hidden_size=32, **sizes), adapter=adapter)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     MopForCausalLM(config).save_pretrained(folder)
            ...     model = MopForCausalLM.from_pretrained(folder, dtype="bfloat16")
            >>> model.dtype
            torch.bfloat16
        """
        hub, device = select_hub_arguments(arguments), parse_device_map(device_map)
        folder = resolve_model(str(pretrained_model_name_or_path), hub=hub)
        if adapter is None:
            loaded = load_saved_model(folder, config, parse_dtype(dtype))
        elif config is not None:
            raise TypeError("from_pretrained: config: a base and its adapter bring their own; leave it out")
        else:
            loaded = load_base_and_adapter(folder, Path(adapter), parse_dtype(dtype))
        model = cls(loaded.config, loaded.network, loaded.adapter)
        model._repairs = loaded.repairs
        return model if device is None else model.to(device)  # type: ignore[arg-type]

    @classmethod
    def from_parts(cls, model: LanguageModel, adapter: Adapter, config: AdapterConfig) -> "MopForCausalLM":
        """Join a network and an adapter that are loaded already; both stay the same objects."""
        return cls(MopConfig(text_config=model.network.config, adapter=config_to_disk(config)), model.network, adapter)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        """Write network, adapter and configuration to one folder, which `from_pretrained` loads without a base.

        A repair of the network's linears goes into a file of its own, `repair.safetensors`.

        Args:
            save_directory: The folder; it is made if it does not exist.
            *args: As of `transformers.PreTrainedModel.save_pretrained`.
            **kwargs: As there; `state_dict` holds the weights to write in place of the model's own.

        Raises:
            DataError: The network has a repair, and was not loaded by `from_pretrained`, so the repair would be lost.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from transformers import LlamaConfig
            >>> from mopcompress import MopConfig, MopForCausalLM
            >>> sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 48}
            >>> adapter = {"arm": "norms", "experts": 2, "prompts_per_expert": 10, "layer": 1, "hidden_size": 32}
            >>> adapter |= {"base_sha256": "", "tasks": []}
            >>> config = MopConfig(text_config=LlamaConfig(hidden_size=32, **sizes), adapter=adapter)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     MopForCausalLM(config).save_pretrained(folder)
            ...     sorted(path.name for path in Path(folder).iterdir())
            ['config.json', 'generation_config.json', 'model.safetensors']
        """
        if not self._repairs and any(repair_of(module) is not None for module in self.network.modules()):
            raise DataError("the network has a repair that would be lost; load its folder with from_pretrained")
        # in the original format, of before transformers stacked experts, weights have names that are not found again
        state = state_dict_to_disk(kwargs.pop("state_dict", None) or self.state_dict())
        settings = {"save_original_format": False, **kwargs, "state_dict": state}
        super().save_pretrained(save_directory, *args, **settings)
        if self._repairs:
            write_repairs(Path(save_directory) / REPAIR, self._repairs)

    def init_weights(self) -> None:
        """Do nothing: the network brings its own weights."""

    def train(self, mode: bool = True) -> "MopForCausalLM":
        """Set the training mode of the adapter alone: the network never drops anything."""
        super().train(mode)
        self.network.eval()
        self._runner.discard_compiled()
        return self

    def _replicate_for_data_parallel(self) -> "MopForCausalLM":
        """Raise `DataError` under `torch.nn.DataParallel`: its replicas would run without the adapter."""
        raise DataError(
            "DataParallel (which Trainer takes where it sees several GPUs) cannot copy an adapter that acts on a "
            "network; start a process for each, with accelerate launch or torchrun, or show it one GPU"
        )

    def get_input_embeddings(self) -> nn.Module:
        """Return the network's input embeddings."""
        return self.network.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the network's output embeddings."""
        return self.network.get_output_embeddings()

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        instruction_mask: Bool[Tensor, "batch instruction"] | None = None,
        logits_to_keep: Int[Tensor, " positions"] | int = 0,
        cache: Cache | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Run the network's own forward with the adapter acting on it.

        `instruction_mask` marks the instruction. Without it, the instruction is the text before the first label that is
        not -100, or the whole text without labels. Training needs one of the two, or the gate would read the response.
        After the beginning of a cache, it is the instruction that was read there. `past_key_values` is the older name
        of `cache`.
        """
        cache = past_key_values if cache is None else cache
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = positions(attention_mask)[:, -input_ids.shape[1] :]
        inputs |= {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        inputs |= {"position_ids": position_ids, CACHE: cache}
        if not isinstance(logits_to_keep, int) or logits_to_keep:  # transformers looks for the parameter here
            inputs["logits_to_keep"] = logits_to_keep
        return self._runner.run(inputs, instruction_mask, training=self.training)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text; every call reads its prompt, once, and the adapter acts until the last token.

        Args:
            *args: As of `transformers.GenerationMixin.generate`: the prompts' tokens first.
            **kwargs: As there, such as `attention_mask`, `max_new_tokens`, `do_sample`, `num_beams`, `use_cache`.

        Returns:
            The tokens of prompts and answers, or transformers' output object with `return_dict_in_generate`.

        Raises:
            DataError: `prefill_chunk_size` is set, or a cache is given without the tokens that it holds.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig
            >>> from mopcompress import MopConfig, MopForCausalLM
            >>> sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 48}
            >>> adapter = {"arm": "mop", "experts": 2, "prompts_per_expert": 10, "layer": 1, "hidden_size": 32}
            >>> adapter |= {"base_sha256": "", "tasks": []}
            >>> model = MopForCausalLM(MopConfig(text_config=LlamaConfig(hidden_size=32, **sizes), adapter=adapter))
            >>> prompt = torch.tensor([[5, 6, 7]])
            >>> model.generate(prompt, attention_mask=prompt > 0, max_new_tokens=4, eos_token_id=None).shape
            torch.Size([1, 7])
        """
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise DataError("prefill_chunk_size: the adapter reads a prompt as a whole; leave it out")
        prompts = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        prompt_tokens = next((tokens.shape[-1] for tokens in prompts if tokens is not None), None)
        with self._runner.generation(prompt_tokens):
            return super().generate(*args, **kwargs)  # type: ignore[misc, unused-ignore]

    def prepare_inputs_for_generation(  # type: ignore[override, unused-ignore]
        self, input_ids: Int[Tensor, "batch time"], **kwargs: Any
    ) -> dict[str, Any]:
        """Return the network's own inputs, and for the prompt a mask of its real tokens."""
        inputs = self.network.prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[operator]
        mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
        return inputs | self._runner.prompt_inputs(input_ids, mask, cache, training=self.training)
