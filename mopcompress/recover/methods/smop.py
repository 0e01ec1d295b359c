"""SMoP (Choi et al., EMNLP 2023, https://aclanthology.org/2023.emnlp-main.884): several short prompts at the input.

A linear router without bias reads the mean embedding of the instruction; the likeliest prompt alone is used, and its
probability p is what teaches the router. In training the router's scores are multiplied by 1 + N(0, 1), as in the
authors' code, so that all prompts get their share.

The difference: SMoP scales the chosen prompt's embeddings, p * P. Then keys and values depend on p, so on the example,
and the prompts would have to run once an example; and blocks that begin with a norm do not even see the scale, only
the residual stream does. Here all prompts run once a step, unscaled, and log p is added to the chosen one's scores:
the reading of the gate that `mop` has. Both are the plain prompt at p = 1.
"""

import math
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.attention import Prefix, attend_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.prompt_initialization import sample_token_embeddings
from mopcompress.recover.methods.prompt_tuning import prefix_kv, require_prefix_support


class RoutedPrompts(nn.Module):
    """Short prompts, each as if it alone stood before the text, and the router that chooses one an example."""

    layer = 0
    noise_seed: Int[Tensor, ""]  # of the next step; stored, so that training that goes on draws what it would have

    def __init__(self, start: Float[Tensor, "experts prompts hidden"], *, seed: int = 0, noise: float = 1.0) -> None:
        super().__init__()
        experts, _, hidden = start.shape
        generator = torch.Generator().manual_seed(seed)
        self.prompts = nn.Parameter(start.clone())
        self.router = nn.Linear(hidden, experts, bias=False)
        nn.init.orthogonal_(self.router.weight, generator=generator)
        self.register_buffer("noise_seed", torch.randint(2**62, (), generator=generator))
        self.noise = noise

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Inside it, text stands behind the prompt that the router chose for it, with gradients to both.

        In training mode the router is perturbed.
        """
        summary = instructions.mean
        factors = 1 + self.noise * self._noise(len(summary)).to(summary) if self.training else 1.0
        keys, values = prefix_kv(model, self.prompts)
        return attend_to(Prefix(keys, values, self.log_gate(summary, factors)))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Constant keys and values; what is left an example is the router, without noise."""
        with torch.no_grad():
            keys, values = prefix_kv(model, self.prompts)
        return lambda instructions: attend_to(Prefix(keys, values, self.log_gate(instructions.mean)))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Prompts, and the router."""
        return {"adapter": [self.prompts], "gate": list(self.router.parameters())}

    def chosen(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
        """The probability of the prompt that acts, 0 for the others."""
        return self._log_weights(instructions.mean, 1.0).exp()

    def log_gate(
        self, summary: Float[Tensor, "batch hidden"], factors: Float[Tensor, "batch experts"] | float = 1.0
    ) -> Float[Tensor, "batch prompts"]:
        """The log probability of the likeliest prompt; minus infinity, which is exact absence, for the others."""
        return self._log_weights(summary, factors).repeat_interleave(self.prompts.shape[1], dim=1)

    def _log_weights(
        self, summary: Float[Tensor, "batch hidden"], factors: Float[Tensor, "batch experts"] | float
    ) -> Float[Tensor, "batch experts"]:
        log_probabilities = (self.router(summary) * factors).log_softmax(-1)
        experts = torch.arange(log_probabilities.shape[1], device=summary.device)
        likeliest = experts == log_probabilities.argmax(-1, keepdim=True)
        return torch.where(likeliest, log_probabilities, -math.inf)

    def _noise(self, rows: int) -> Float[Tensor, "rows experts"]:
        """Standard normal, other in every step."""
        generator = torch.Generator().manual_seed(int(self.noise_seed))
        self.noise_seed += 1
        return torch.randn(rows, self.router.out_features, generator=generator)


def build(model: LanguageModel, config: AdapterConfig) -> RoutedPrompts:
    """As many prompts in all as the other arms have. Raises `DataError` for some families."""
    return _routed(model, config, seed=0)


def initialize(config: AdapterConfig, material: AdapterInputs, start: AdapterInit) -> RoutedPrompts:
    """Prompts that begin with the embeddings that `input` begins with."""
    adapter = _routed(material.model, config, seed=start.seed)
    experts, prompts, _ = adapter.prompts.shape
    with torch.no_grad():
        adapter.prompts.copy_(
            sample_token_embeddings(material.states, experts * prompts, start).view_as(adapter.prompts)
        )
    return adapter


def _routed(model: LanguageModel, config: AdapterConfig, *, seed: int) -> RoutedPrompts:
    require_prefix_support(model)
    prompts = torch.zeros(config.groups, config.prompts_per_expert, config.hidden_size)
    return RoutedPrompts(prompts, seed=seed).to(model.device)
