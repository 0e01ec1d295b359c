"""A compressed network and the adapter that recovers it as one transformers model.

The instruction is read once, on its way through the network: when its states are about to enter the adapter's layer,
the adapter reads them, and acts from there on. So nothing runs twice, whatever the arm. In `generate` it then acts
until the generation ends, and reads nothing more.
"""

from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mopcompress.errors import DataError
from mopcompress.evaluation.batching import positions
from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.hf.adapter_loading import (
    adapter_of,
    hub_settings,
    load_whole,
    network_of,
    one_device,
    state_dict_to_disk,
)
from mopcompress.hf.config import MopConfig
from mopcompress.hf.instructions import entering, instruction_mask_of, instructions_of, read_by_itself
from mopcompress.models.compat import CACHE
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.models.repair import RepairsByName, read_repairs, repair_of, write_repairs
from mopcompress.models.weight_files import REPAIR
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.save_and_load import config_from_disk, config_to_disk, load_adapter


@dataclass
class _Generation:
    """One call of `generate`: what the adapter does from the prompt to the last token."""

    model: PreTrainedModel
    prompt_tokens: int | None  # padding counted; what follows them at the first step was drafted. None: all are
    acting: ExitStack = field(default_factory=ExitStack)
    has_read: bool = False


_generation: ContextVar[_Generation | None] = ContextVar("generation", default=None)
# what was read of the prompt that a cache begins with, for loops that callers write themselves
_read: WeakKeyDictionary[Cache, InstructionStates] = WeakKeyDictionary()


class MopForCausalLM(PreTrainedModel, GenerationMixin):
    """`network` is frozen and never in training mode; what is trained is `adapter`."""

    config_class = MopConfig
    base_model_prefix = "network"
    _supports_sdpa = True  # attention is the network's own business

    def __init__(
        self, config: MopConfig, network: PreTrainedModel | None = None, adapter: Adapter | None = None
    ) -> None:
        """The config alone gives random weights, and an adapter whose values are yet to be loaded."""
        super().__init__(config)
        if config.text_config is None or config.adapter is None:
            raise DataError("a MopConfig without text_config and adapter says nothing; give both")
        self.network = network_of(config.text_config) if network is None else network
        self.language_model = LanguageModel(self.network)
        adapter = adapter or adapter_of(self.language_model, config_from_disk(config.adapter))
        assert isinstance(adapter, nn.Module)  # for mypy: a protocol cannot ask for it
        self.adapter = adapter.requires_grad_(True)
        self.generation_config = self.network.generation_config
        self._compiled: tuple[object, ApplyAdapter] | None = None
        self._repairs: RepairsByName = {}
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
        **plumbing: Any,
    ) -> "MopForCausalLM":
        """A base (folder, hub id or `smollm2`) and the adapter that `recover` wrote for it; or what was saved, alone.

        A base is in fp32 unless `dtype` says otherwise; `device_map` may name one device. Raises `TypeError` for what
        a stock model takes and this one would not heed.
        """
        hub, device = hub_settings(plumbing), one_device(device_map)
        folder = resolve_model(str(pretrained_model_name_or_path), hub=hub)
        asked = None if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if adapter is None:
            config = config or MopConfig.from_pretrained(folder)
            if not isinstance(config, MopConfig) or config.text_config is None or config.adapter is None:
                raise DataError(f"model {folder} is no recovered model; name its adapter too, or one that was saved")
            network, loaded = load_whole(folder, config.text_config, config_from_disk(config.adapter), asked)
            made = cls(config, network, loaded)
        elif config is not None:
            raise TypeError("from_pretrained: config: a base and its adapter bring their own; leave it out")
        else:
            base = load_model(folder, device=torch.device("cpu"), dtype=asked or torch.float32)
            loaded, described = load_adapter(Path(adapter), base, base_sha256=weights_hash(folder))
            made = cls.around(base, loaded, described)
        made._repairs = read_repairs(folder)
        return made if device is None else made.to(device)  # type: ignore[arg-type]

    @classmethod
    def around(cls, model: LanguageModel, adapter: Adapter, described: AdapterConfig) -> "MopForCausalLM":
        """The model of an adapter and a network that are loaded already, and stay the same objects."""
        return cls(
            MopConfig(text_config=model.network.config, adapter=config_to_disk(described)), model.network, adapter
        )

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        """As of any transformers model, with a repair that stands beside the weights in a file of its own.

        Raises `DataError` when the network has a repair and was not loaded here.
        """
        if not self._repairs and any(repair_of(module) is not None for module in self.network.modules()):
            raise DataError("the network has a repair that would be lost; load its folder with from_pretrained")
        # under other names, as they were before transformers stacked experts, they would not be found again
        state = state_dict_to_disk(kwargs.pop("state_dict", None) or self.state_dict())
        settings = {"save_original_format": False, **kwargs, "state_dict": state}
        super().save_pretrained(save_directory, *args, **settings)
        if self._repairs:
            write_repairs(Path(save_directory) / REPAIR, self._repairs)

    def init_weights(self) -> None:
        """Leave them: the network brings its own."""

    def train(self, mode: bool = True) -> "MopForCausalLM":
        """Training mode of the adapter alone: the network never drops anything."""
        super().train(mode)
        self.network.eval()
        self._compiled = None
        return self

    def _replicate_for_data_parallel(self) -> "MopForCausalLM":
        """Refuse `torch.nn.DataParallel`: its replicas would run without the adapter."""
        raise DataError(
            "DataParallel (which Trainer takes where it sees several GPUs) cannot copy an adapter that acts on a "
            "network; start a process for each, with accelerate launch or torchrun, or show it one GPU"
        )

    def get_input_embeddings(self) -> nn.Module:
        """The network's."""
        return self.network.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The network's."""
        return self.network.get_output_embeddings()

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        instruction_mask: Bool[Tensor, "batch instruction"] | None = None,
        logits_to_keep: Int[Tensor, " kept"] | int = 0,
        cache: Cache | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """The network's own forward with the adapter acting on it.

        The instruction is what `instruction_mask` marks; or what stands before the first label that is not -100; or,
        without either, the whole text, which training does not take: it would show the response to the gate. Where a
        cache has begun already it is what was read at its beginning. `past_key_values` is the older name of `cache`.
        """
        cache = past_key_values if cache is None else cache
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = positions(attention_mask)[:, -input_ids.shape[1] :]
        given = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache}
        inputs |= {"input_ids": input_ids, "labels": labels, **given}
        if not isinstance(logits_to_keep, int) or logits_to_keep:  # transformers looks for the parameter here
            inputs["logits_to_keep"] = logits_to_keep
        generation = _generation.get()
        if generation is None or generation.model is not self:
            with ExitStack() as acting:
                return self._read_and_run(acting, inputs, instruction_mask)
        if generation.has_read:
            return self.network(**inputs)
        generation.has_read = True
        return self._read_and_run(generation.acting, inputs, instruction_mask)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of any transformers model; every call reads its prompt anew."""
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise DataError("prefill_chunk_size: the adapter reads a prompt as a whole; leave it out")
        given = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        generation = _Generation(self, next((one.shape[-1] for one in given if one is not None), None))
        token = _generation.set(generation)
        try:
            with generation.acting:
                return super().generate(*args, **kwargs)  # type: ignore[misc, unused-ignore]
        finally:
            _generation.reset(token)

    def prepare_inputs_for_generation(  # type: ignore[override, unused-ignore]
        self, input_ids: Int[Tensor, "batch time"], **kwargs: Any
    ) -> dict[str, Any]:
        """The network's own, and at the prompt which of its tokens are real."""
        inputs = self.network.prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[operator]
        generation, mask, cache = _generation.get(), kwargs.get("attention_mask"), kwargs.get(CACHE)
        if generation is None or generation.model is not self or generation.has_read:
            return inputs
        mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != input_ids.shape:
            raise DataError("generate goes on from a cache without its tokens; give all of input_ids, or no cache")
        if generation.prompt_tokens is not None:  # an assistant's draft may follow it already
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < generation.prompt_tokens)
        if cache is None or cache.get_seq_length() == 0:
            return inputs | {"instruction_mask": mask}
        generation.has_read = True  # the cache has what the lower blocks made of the beginning, but not their states
        read = read_by_itself(self.language_model, input_ids, mask, self.adapter.layer)
        generation.acting.enter_context(self._applied(read))
        return inputs

    def _read_and_run(
        self, acting: ExitStack, inputs: dict[str, Any], mask: Bool[Tensor, "batch time"] | None
    ) -> ModelOutput:
        cache, tokens = inputs[CACHE], inputs["input_ids"]
        if cache is not None and cache.get_seq_length() > 0:
            if cache not in _read:
                raise DataError(f"{CACHE} was not begun by this model, so no instruction was read; begin without")
            acting.enter_context(self._applied(_read[cache]))
            return self.network(**inputs)
        if mask is None and inputs["labels"] is None and self.training:
            raise DataError(
                "training without labels or instruction_mask: the adapter would read the response too; give one of "
                "them (Trainer takes the labels away for label smoothing and a loss function of one's own)"
            )
        if mask is None:
            mask = instruction_mask_of(tokens, inputs["attention_mask"], inputs["labels"])
        read: list[InstructionStates] = []

        def act(hidden: Tensor) -> None:
            read.append(instructions_of(hidden, mask))
            acting.enter_context(self._applied(read[0]))

        if self.adapter.layer == 0:
            act(self.language_model.run_lower(tokens, 0))
            output = self.network(**inputs)
        else:
            with entering(self.language_model.blocks[self.adapter.layer], act):
                output = self.network(**inputs)
        if isinstance(begun := output.get(CACHE), Cache):
            _read[begun] = read[0]
        return output

    def _applied(self, instructions: InstructionStates) -> Any:
        """The adapter with gradients where they are wanted; otherwise compiled, once for as long as nothing changes."""
        if self.training or (torch.is_grad_enabled() and any(one.requires_grad for one in self.adapter.parameters())):
            return self.adapter.active(self.language_model, instructions)
        state = [(one.data_ptr(), one._version) for one in (*self.parameters(), *self.adapter.buffers())]
        if self._compiled is None or self._compiled[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._compiled = state, self.adapter.compile_for_inference(self.language_model)
        return self._compiled[1](instructions)
