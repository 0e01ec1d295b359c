"""Mixture of Prompts (Dun et al., AAAI 2025, arXiv 2310.02842): gated groups of soft prompts injected mid-network.

Prompts are hidden states at the injection layer that flow on through all layers above it. They see the prompts before
them and never the text (ours), so their keys and values do not depend on the input: one run of the prompt stream serves
a whole batch, and after training they are constants. A mixture whose gate has no preference is exactly a plain prompt.
"""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import Applied, Instructions
from mopcompress.models.attention import Prefix, attending_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.methods.expert_weights import Mixing, prefix_of, strongest, without_absent
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.prompt_kv import ByLayer, KeysAndValues, recorded


class MixtureOfPrompts(nn.Module):
    """Groups of prompts at `layer`, and the gate that weighs them; no gate means every group counts fully.

    `log_opening` is one trained number added to the log weight of every prompt (ours). Prompts that are not trained yet
    do damage: begun low, the model starts close to where it is without them, and training opens them as they get good.
    """

    prompts: nn.Parameter  # [experts, prompts, hidden]; none in a deep mixture
    deep: KeysAndValues | None

    def __init__(
        self,
        start: Float[Tensor, "groups prompts hidden"],
        layer: int,
        gate: Gate | None,
        *,
        log_opening: float = 0.0,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__()
        self.groups = start.shape[:2]
        self.prompts = nn.Parameter(start.clone())
        self.deep = None
        self.log_opening = nn.Parameter(torch.tensor(log_opening))
        self.layer = layer
        self.gate = gate
        self.mixing = mixing or Mixing()

    def applied(self, model: LanguageModel, instructions: Instructions) -> AbstractContextManager[None]:
        """Inside it, text attends to the prompts, with gradients to prompts and gate."""
        return attending_to(self.prefix(model, instructions))

    def compiled(self, model: LanguageModel) -> Applied:
        """Compile the prompts to constants; what is left an example is the gate, and which experts are left out."""
        with torch.no_grad():
            everything = self.keys_and_values(model)

        def applied(instructions: Instructions) -> AbstractContextManager[None]:
            heard, log_weights = without_absent(everything, self.acting(instructions), self.mixing.reading)
            return attending_to(prefix_of(heard, log_weights, self.log_opening, self.mixing.reading))

        return applied

    def prefix(self, model: LanguageModel, instructions: Instructions) -> Prefix:
        """What text attends to, with gradients; in training mode every expert acts."""
        log_weights = self.log_weights(instructions) if self.training else self.acting(instructions)
        return prefix_of(self.keys_and_values(model), log_weights, self.log_opening, self.mixing.reading)

    def learned(self) -> dict[str, list[nn.Parameter]]:
        """Prompts with their opening, and the gate."""
        gate = [] if self.gate is None else list(self.gate.parameters())
        prompts = [self.prompts] if self.deep is None else list(self.deep.parameters())
        return {"adapter": [*prompts, self.log_opening], "gate": gate}

    @property
    def experts(self) -> int:
        """The groups that a gate weighs."""
        return self.groups[0] - self.mixing.shared

    def log_weights(self, instructions: Instructions) -> Float[Tensor, "batch groups"]:
        """The log weight of each group, the opening left out: 0 as in a plain prompt."""
        return self._with_shared(self._of_experts(instructions))

    def acting(self, instructions: Instructions) -> Float[Tensor, "batch groups"]:
        """The same at inference: only the strongest experts act, if so many were asked for."""
        return self._with_shared(strongest(self._of_experts(instructions), self.mixing.top_k or self.experts))

    def chosen(self, model: LanguageModel, instructions: Instructions) -> Float[Tensor, "batch experts"] | None:
        """The experts' weights at inference; None without a gate."""
        return None if self.gate is None else self.acting(instructions)[:, : self.experts].exp()

    def _of_experts(self, instructions: Instructions) -> Float[Tensor, "batch experts"]:
        if self.mixing.weighing is not None:
            return self.mixing.weighing(self.gate, instructions)
        summary = instructions.summary
        return summary.new_zeros(len(summary), self.experts) if self.gate is None else self.gate(summary)

    def _with_shared(self, log_weights: Float[Tensor, "batch experts"]) -> Float[Tensor, "batch groups"]:
        return nn.functional.pad(log_weights, (0, int(self.mixing.shared)))

    def keys_and_values(self, model: LanguageModel) -> tuple[ByLayer, ByLayer]:
        """What text attends to, by layer. Raises `DataError` for some families."""
        if self.deep is not None:
            return self.deep()
        # the experts stand one after the other, as in one long prompt: without a gate they are exactly that
        return recorded(model, self.prompts.flatten(0, 1)[None], self.layer)

    @torch.no_grad()
    def deepen(self, model: LanguageModel) -> None:
        """Train every layer's keys and values by themselves, in place.

        At first it is the same mixture; its parameters are keys and values times the layers from `layer` on.
        """
        self.deep = KeysAndValues(*self.keys_and_values(model))
        del self.prompts
