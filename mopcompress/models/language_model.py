"""A causal language model taken apart at its decoder blocks, through its own forward.

Placeholders replace the blocks that are not to run, in a *view* that shares every weight with the network. The
network's own forward still makes masks and positions, whatever the family, and the network itself is never changed.
"""

import copy
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from mopcompress.errors import DataError
from mopcompress.models.attention import NAME, record_kv
from mopcompress.models.families import ROTARY
from mopcompress.models.modules import forward_hooks

Module = TypeVar("Module", bound=nn.Module)


class LanguageModel:
    """A frozen network and its tokenizer: `run_lower` and `run_upper` run the blocks, `logits` runs the head."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Wrap a network. Raises `DataError` when the decoder blocks cannot be found.

        All blocks except the first may still lack their weights, on the meta device. Only text needs a tokenizer.
        """
        self.network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.config = network.config.get_text_config()
        self._decoder_name, self._blocks_name = locate_blocks(network)
        self._block_gives_tuple, self._attention_is_ours = self._probe_block()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises `DataError` when there is none."""
        if self._tokenizer is None:
            raise DataError(f"this {type(self.network).__name__} came without a tokenizer; load its folder")
        return self._tokenizer

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return self.network.get_submodule(f"{self._decoder_name}.{self._blocks_name}")

    @property
    def device(self) -> torch.device:
        return next(weight.device for weight in self.network.parameters() if not weight.is_meta)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    def blocks_prefix(self) -> str:
        """Return the dotted name of the list of blocks, for example `model.layers`."""
        return f"{self._decoder_name}.{self._blocks_name}"

    def run_lower(self, tokens: Int[Tensor, "batch time"], layer: int) -> Float[Tensor, "batch time hidden"]:
        """Return the hidden states that enter block `layer`; for 0, the embeddings.

        Right padding is harmless: all is causal.
        """
        if layer == 0:
            return self.network.get_input_embeddings()(tokens)
        above = self._placeholders(layer, len(self.blocks))
        self._decoder([*self.blocks[:layer], *above])(input_ids=tokens, use_cache=False)
        return above[0].hidden

    def run_block(
        self, tokens: Int[Tensor, "batch time"], hidden: Float[Tensor, "batch time hidden"] | None, layer: int
    ) -> Float[Tensor, "batch time hidden"]:
        """Run block `layer` alone on the hidden states that enter it (block 0: on the embedded tokens)."""
        below, above = self._placeholders(0, layer), self._placeholders(layer + 1, len(self.blocks))
        if below:
            below[-1].replacement = hidden
        output = self._decoder([*below, self.blocks[layer], *above])(input_ids=tokens, use_cache=False)
        return above[0].hidden if above else output.last_hidden_state

    def run_upper(
        self, hidden: Float[Tensor, "batch time hidden"], layer: int, *, first_position: int = 0
    ) -> Float[Tensor, "batch time normed"]:
        """Run block `layer`, all blocks above it and the final norm on the hidden states that enter block `layer`.

        Positions count from `first_position`. Raises `DataError` when that is not 0 and positions are not rotary.
        """
        positions = {}
        if first_position:  # it may be negative: only differences of positions count
            self.require_rotary()
            end = first_position + hidden.shape[1]
            positions["position_ids"] = torch.arange(first_position, end, device=hidden.device)[None]
        if layer == 0:
            return self._decoder([*self.blocks])(inputs_embeds=hidden, use_cache=False, **positions).last_hidden_state
        below = self._placeholders(0, layer)
        below[-1].replacement = hidden
        # the tokens only give the number of positions: the last placeholder drops what is computed from them, and
        # `require_separable` finds families whose upper blocks read them too
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        upper = self._decoder([*below, *self.blocks[layer:]])
        return upper(input_ids=tokens, use_cache=False, **positions).last_hidden_state

    def logits(self, hidden: Float[Tensor, "positions hidden"]) -> Float[Tensor, "positions vocab"]:
        """Run the network's own head (scaling and soft-capping included) on normed hidden states at some positions."""
        network = _with_submodule(self.network, self._decoder_name, _FixedDecoderOutput(hidden[None]))
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        # not [0]: the gradient of a selection fills a new whole tensor with zeros
        return network(input_ids=tokens, use_cache=False).logits.squeeze(0)

    def _placeholders(self, first: int, last: int) -> "list[BlockPlaceholder]":
        return [BlockPlaceholder(block, self._block_gives_tuple) for block in self.blocks[first:last]]

    def _decoder(self, blocks: list[nn.Module]) -> nn.Module:
        decoder = _view(self.network.get_submodule(self._decoder_name))
        decoder._modules[self._blocks_name] = nn.ModuleList(blocks)
        return decoder

    def require_prompt_attention(self) -> None:
        """Raise `DataError` when prompts cannot reach the attention of this family."""
        if not self._attention_is_ours:
            raise DataError(
                f"{type(self.network).__name__} does not call the attention function {NAME!r}, so prompts cannot reach "
                "it; load it with `load_model`, or use a family whose attention can be exchanged"
            )

    @torch.no_grad()
    def require_separable(self, layer: int) -> None:
        """Raise `DataError` when block `layer`, or one above, reads more than the states that enter block `layer`.

        Some families give every block the tokens (Gemma 4) or the embeddings (Zamba); others widen the embeddings on
        their way to block 0 (OPT-350m).
        """
        network = type(self.network).__name__
        width = self.network.get_input_embeddings().weight.shape[1]
        if layer == 0:
            if width != self.hidden_size:
                raise DataError(
                    f"{network}: embeddings of {width} numbers are widened to {self.hidden_size} before block 0, so "
                    "nothing can act there; use a higher recovery.layer, or another model"
                )
            return
        tokens = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        whole = self._decoder([*self.blocks])(input_ids=tokens, use_cache=False).last_hidden_state
        parts = self.run_upper(self.run_lower(tokens, layer), layer)
        if (parts - whole).abs().max() > 1e-3 * whole.abs().max():  # false for NaN, which other checks report
            raise DataError(
                f"{network}: blocks from {layer} up read more than the hidden states that enter "
                "them, so they cannot run by themselves; use a model of another family"
            )

    def check_context(self, tokens: int, what: str, instead: str) -> None:
        """Raise `DataError` when so many tokens take positions that were never learned.

        Rotary positions have no end: the perplexity shows how well a model reads text beyond its context.
        """
        learned = getattr(self.config, "max_position_embeddings", None)
        if learned is not None and tokens > learned and not self.is_rotary:
            raise DataError(f"{what} of {tokens} tokens exceeds the model's context of {learned} tokens; {instead}")

    @property
    def is_rotary(self) -> bool:
        """True for rotary positions, of which only differences count."""
        return any(ROTARY in name for name, _ in self.network.named_modules())

    def require_rotary(self) -> None:
        """Raise `DataError` when positions are not rotary."""
        if not self.is_rotary:
            raise DataError(
                f"{type(self.network).__name__} has no rotary positions, so nothing can stand before its text; "
                "use a family with rotary positions"
            )

    def _probe_block(self) -> tuple[bool, bool]:
        """Run block 0 on one token and return whether a block gives a tuple, and whether it calls our attention."""
        outputs: list[object] = []
        above = [BlockPlaceholder(block, gives_tuple=False) for block in self.blocks[1:]]

        def record_output(_block: nn.Module, _inputs: object, output: object) -> None:
            outputs.append(output)
            for placeholder in above:
                placeholder.gives_tuple = isinstance(output, tuple)

        with torch.no_grad(), forward_hooks([self.blocks[0]], record_output), record_kv() as recording:
            tokens = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self._decoder([self.blocks[0], *above])(input_ids=tokens, use_cache=False)
        return isinstance(outputs[0], tuple), bool(recording)


class BlockPlaceholder(nn.Module):
    """A module in the place of a block: it records the incoming hidden states and returns `replacement`, or them."""

    def __init__(self, block: nn.Module, gives_tuple: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list: not a submodule
        self.gives_tuple = gives_tuple
        self.replacement: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # some decoders choose the mask by an attribute of the block, such as its attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, *_args: object, **_kwargs: object) -> Tensor | tuple[Tensor]:
        self.hidden = hidden
        output = hidden if self.replacement is None else self.replacement
        return (output,) if self.gives_tuple else output


class _FixedDecoderOutput(nn.Module):
    """A module in the place of the decoder that returns given hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_args: object, **_kwargs: object) -> BaseModelOutputWithPast:
        return _HiddenStates(last_hidden_state=self._hidden)


class _HiddenStates(BaseModelOutputWithPast):
    """Hidden states alone: all else that a family's head reads from its decoder, such as router logits, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _view(module: Module) -> Module:
    """Return a copy that shares every parameter and submodule, whose own list of submodules can be changed."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def _with_submodule(module: Module, name: str, submodule: nn.Module) -> Module:
    """Return a view of `module` with another submodule at a dotted name."""
    view = _view(module)
    first, _, rest = name.partition(".")
    view._modules[first] = _with_submodule(module.get_submodule(first), rest, submodule) if rest else submodule
    return view


def locate_blocks(network: PreTrainedModel) -> tuple[str, str]:
    """Return the dotted name of the decoder, and the name inside it of the list of its blocks.

    Raises `DataError` when there is no such list.
    """
    count = network.config.get_text_config().num_hidden_layers
    decoder = network.get_decoder()
    names = {module: name for name, module in network.named_modules()}
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return names[decoder], name
    raise DataError(
        f"no list of {count} decoder blocks in {type(network).__name__}: this family cannot be taken apart; "
        "use a decoder-only model whose blocks are in one list"
    )
