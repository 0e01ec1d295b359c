"""Mixture of Prompts (Dun et al., AAAI 2025, arXiv 2310.02842): gated groups of soft prompts injected mid-network.

Prompts are hidden states at the injection layer that flow on through all layers above it. They see the prompts before
them and never the text (ours), so their keys and values do not depend on the input: one run of the prompt stream serves
a whole batch, and after training they are constants. A mixture whose gate has no preference is exactly a plain prompt.
"""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.models.attention import Prefix, attending_to, recording
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.gate import Gate
from mopcompress.states import Applied, Instructions


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

    def applied(self, model: LanguageModel, instructions: Instructions) -> AbstractContextManager[None]:
        """Inside it, text attends to the prompts, with gradients to prompts and gate."""
        return attending_to(self.prefix(model, instructions.summary))

    def compiled(self, model: LanguageModel) -> Applied:
        """Compile the prompts to constants; what is left an example is the gate."""
        with torch.no_grad():
            keys, values = self.keys_and_values(model)
        return lambda instructions: attending_to(Prefix(keys, values, self.log_gate(instructions.summary)))

    def prefix(self, model: LanguageModel, summary: Float[Tensor, "batch hidden"]) -> Prefix:
        """What text attends to."""
        return Prefix(*self.keys_and_values(model), self.log_gate(summary))

    def learned(self) -> dict[str, list[nn.Parameter]]:
        """Prompts with their opening, and the gate."""
        gate = [] if self.gate is None else list(self.gate.parameters())
        return {"adapter": [self.prompts, self.log_opening], "gate": gate}

    def log_gate(self, summary: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch prompts"]:
        """The gate's log weight of each prompt: equal within an expert, 0 for a plain prompt."""
        experts, prompts, _ = self.prompts.shape
        if self.gate is None:
            return self.log_opening.expand(len(summary), experts * prompts)
        return self.log_opening + self.gate(summary).repeat_interleave(prompts, dim=1)

    def keys_and_values(self, model: LanguageModel) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What text attends to, by layer: [kv_heads, prompts, head]. Raises `DataError` for some families."""
        model.check_promptable()
        # the experts stand one after the other, as in one long prompt: without a gate they are exactly that
        with recording() as seen:
            model.resume(self.prompts.flatten(0, 1)[None], self.layer)
        keys = {layer: key[0] for layer, (key, _) in seen.items()}
        values = {layer: value[0] for layer, (_, value) in seen.items()}
        return keys, values
