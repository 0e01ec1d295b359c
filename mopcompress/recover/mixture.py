"""Mixture of Prompts (Dun et al., AAAI 2025, arXiv 2310.02842): gated groups of soft prompts injected mid-network.

Prompts are hidden states at the injection layer that flow on through all layers above it. They see the prompts before
them and never the text (ours), so their keys and values do not depend on the input: one run of the prompt stream serves
a whole batch, and after training they are constants. A mixture whose gate has no preference is exactly a plain prompt.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.models.attention import Prefix, recording
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.gate import Gate


class MixtureOfPrompts(nn.Module):
    """`experts` groups of prompts at `layer`, and the gate that weighs them; no gate means every group counts fully.

    `log_opening` is one trained number added to the log weight of every prompt (ours). Prompts that are not trained yet
    do damage: begun low, the model starts close to where it is without them, and training opens them as they get good.
    """

    def __init__(
        self, start: Float[Tensor, "experts prompts hidden"], layer: int, gate: Gate | None, *, log_opening: float = 0.0
    ) -> None:
        super().__init__()
        self.prompts = nn.Parameter(start.clone())
        self.log_opening = nn.Parameter(torch.tensor(log_opening))
        self.layer = layer
        self.gate = gate

    @property
    def trained_parameters(self) -> int:
        """All that training changes: the prompts and the gate."""
        return sum(parameter.numel() for parameter in self.parameters())

    def prefix(self, model: LanguageModel, summary: Float[Tensor, "batch hidden"]) -> Prefix:
        """Keys, values and log gate for a batch, with gradients to prompts and gate."""
        return Prefix(*self._keys_and_values(model), self.log_gate(summary))

    def frozen(self, model: LanguageModel) -> Callable[[Float[Tensor, "batch hidden"]], Prefix]:
        """Compile the prompts to constants; what is left an example is the gate."""
        keys, values = self._keys_and_values(model)
        return lambda summary: Prefix(keys, values, self.log_gate(summary))

    def log_gate(self, summary: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch prompts"]:
        """The gate's log weight of each prompt: equal within an expert, 0 for a plain prompt."""
        experts, prompts, _ = self.prompts.shape
        if self.gate is None:
            return self.log_opening.expand(len(summary), experts * prompts)
        return self.log_opening + self.gate(summary).repeat_interleave(prompts, dim=1)

    def _keys_and_values(self, model: LanguageModel) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        model.check_promptable()
        # the experts stand one after the other, as in one long prompt: without a gate they are exactly that
        with recording() as seen:
            model.resume(self.prompts.flatten(0, 1)[None], self.layer)
        keys = {layer: key[0] for layer, (key, _) in seen.items()}
        values = {layer: value[0] for layer, (_, value) in seen.items()}
        return keys, values
