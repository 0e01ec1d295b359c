"""A causal language model taken apart at its decoder blocks, through its own forward.

Stand-ins take the place of blocks that are not to run, in a *view* that shares every weight with the network. The
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

Module = TypeVar("Module", bound=nn.Module)


class LanguageModel:
    """A frozen network and its tokenizer; `enter` runs the lower blocks, `resume` the upper ones, `logits` the head."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raises `DataError` when the decoder blocks cannot be found.

        Blocks but the first may still be without weights, on the meta device. Only text needs a tokenizer.
        """
        self.network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.config = network.config.get_text_config()
        self._decoder_name, self._blocks_name = locate_blocks(network)
        self._block_gives_tuple, self._attention_is_ours = self._probe_block()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises `DataError` when there is none."""
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
        """The dotted name of the list of blocks, for example `model.layers`."""
        return f"{self._decoder_name}.{self._blocks_name}"

    def run_lower(self, tokens: Int[Tensor, "batch time"], layer: int) -> Float[Tensor, "batch time hidden"]:
        """The hidden states that enter block `layer`, at 0 the embeddings. Right padding is harmless: all is causal."""
        if layer == 0:
            return self.network.get_input_embeddings()(tokens)
        above = self._placeholders(layer, len(self.blocks))
        self._decoder([*self.blocks[:layer], *above])(input_ids=tokens, use_cache=False)
        return above[0].seen

    def run_block(
        self, tokens: Int[Tensor, "batch time"], hidden: Float[Tensor, "batch time hidden"] | None, layer: int
    ) -> Float[Tensor, "batch time hidden"]:
        """Run block `layer` alone on what enters it (block 0: the embedded tokens, whatever `hidden`)."""
        below, above = self._placeholders(0, layer), self._placeholders(layer + 1, len(self.blocks))
        if below:
            below[-1].replacement = hidden
        left = self._decoder([*below, self.blocks[layer], *above])(input_ids=tokens, use_cache=False)
        return above[0].seen if above else left.last_hidden_state

    def run_upper(
        self, hidden: Float[Tensor, "batch time hidden"], layer: int, *, first_position: int = 0
    ) -> Float[Tensor, "batch time normed"]:
        """Run block `layer` and all above it, and the final norm, on the hidden states that enter it.

        Positions count from `first_position`. Raises `DataError` when that is not 0 and they are not rotary.
        """
        where = {}
        if first_position:  # a negative one is as good as another where only differences count
            self.require_rotary()
            last = first_position + hidden.shape[1]
            where["position_ids"] = torch.arange(first_position, last, device=hidden.device)[None]
        if layer == 0:
            return self._decoder([*self.blocks])(inputs_embeds=hidden, use_cache=False, **where).last_hidden_state
        below = self._placeholders(0, layer)
        below[-1].replacement = hidden
        # the tokens only say how many positions there are: the last stand-in drops what comes of them, and where
        # blocks above read them too, `require_separable` says so
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        upper = self._decoder([*below, *self.blocks[layer:]])
        return upper(input_ids=tokens, use_cache=False, **where).last_hidden_state

    def logits(self, hidden: Float[Tensor, "positions hidden"]) -> Float[Tensor, "positions vocab"]:
        """The network's own head (scaling and soft-capping included) on normed hidden states at chosen positions."""
        network = _with_submodule(self.network, self._decoder_name, _FixedDecoderOutput(hidden[None]))
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        # not [0]: the gradient of a selection is a whole tensor of zeros, filled anew
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
        """Raise `DataError` when the states that enter block `layer` are not all that it and those above it read.

        Some families show every block the tokens (Gemma 4) or the embeddings (Zamba), others widen the embeddings on
        their way to block 0 (OPT-350m).
        """
        network = type(self.network).__name__
        width = self.network.get_input_embeddings().weight.shape[1]
        if layer == 0:
            if width != self.hidden_size:
                raise DataError(
                    f"{network}: embeddings of {width} numbers are widened to {self.hidden_size} before block 0, so "
                    "nothing can act there; begin further up, or use another model"
                )
            return
        tokens = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        whole = self._decoder([*self.blocks])(input_ids=tokens, use_cache=False).last_hidden_state
        parts = self.run_upper(self.run_lower(tokens, layer), layer)
        if (parts - whole).abs().max() > 1e-3 * whole.abs().max():  # of a model that gives NaN others say so
            raise DataError(
                f"{network}: blocks from {layer} up read more than the hidden states that enter "
                "them, so they cannot run by themselves; use a model of another family"
            )

    def check_context(self, tokens: int, what: str, instead: str) -> None:
        """Raise `DataError` when so many tokens take positions that were never learned.

        Rotary positions have no end: what a model makes of text beyond its context, its perplexity says.
        """
        learned = getattr(self.config, "max_position_embeddings", None)
        if learned is not None and tokens > learned and not self.is_rotary:
            raise DataError(f"{what} of {tokens} tokens exceeds the model's context of {learned} tokens; {instead}")

    @property
    def is_rotary(self) -> bool:
        """Only differences of positions count."""
        return any("rotary" in name for name, _ in self.network.named_modules())

    def require_rotary(self) -> None:
        """Raise `DataError` when positions are not rotary."""
        if not self.is_rotary:
            raise DataError(
                f"{type(self.network).__name__} has no rotary positions, so nothing can stand before its text; "
                "use a family that has them"
            )

    def _probe_block(self) -> tuple[bool, bool]:
        """Run block 0 alone on one token: whether a block gives a tuple, and whether it calls our attention."""
        outputs: list[object] = []
        above = [BlockPlaceholder(block, gives_tuple=False) for block in self.blocks[1:]]

        def note(_block: nn.Module, _inputs: object, output: object) -> None:
            outputs.append(output)
            for standin in above:
                standin.gives_tuple = isinstance(output, tuple)

        handle = self.blocks[0].register_forward_hook(note)
        try:
            with torch.no_grad(), record_kv() as attended:
                tokens = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                self._decoder([self.blocks[0], *above])(input_ids=tokens, use_cache=False)
        finally:
            handle.remove()
        return isinstance(outputs[0], tuple), bool(attended)


class BlockPlaceholder(nn.Module):
    """Takes a block's place: notes the hidden states that come in and hands on `replacement`, or the same."""

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
        self.seen = hidden
        handed_on = hidden if self.replacement is None else self.replacement
        return (handed_on,) if self.gives_tuple else handed_on


class _FixedDecoderOutput(nn.Module):
    """Takes the decoder's place and answers with hidden states that are known already."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_args: object, **_kwargs: object) -> BaseModelOutputWithPast:
        return _HiddenStates(last_hidden_state=self._hidden)


class _HiddenStates(BaseModelOutputWithPast):
    """Nothing but hidden states: all else that a family's head asks its decoder for, such as router logits, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _view(module: Module) -> Module:
    """A copy that shares every parameter and submodule, whose own list of submodules can be changed."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def _with_submodule(module: Module, name: str, submodule: nn.Module) -> Module:
    """A view of `module` with another submodule at a dotted name."""
    view = _view(module)
    first, _, rest = name.partition(".")
    view._modules[first] = _with_submodule(module.get_submodule(first), rest, submodule) if rest else submodule
    return view


def locate_blocks(network: PreTrainedModel) -> tuple[str, str]:
    """The dotted name of the decoder, and the name in it of the list of its blocks. Raises `DataError` without one."""
    count = network.config.get_text_config().num_hidden_layers
    decoder = network.get_decoder()
    names = {module: name for name, module in network.named_modules()}
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return names[decoder], name
    raise DataError(
        f"no list of {count} decoder blocks in {type(network).__name__}: this family cannot be taken apart; "
        "use a decoder-only model whose blocks stand in one list"
    )
