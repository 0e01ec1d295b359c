"""SMoP (Choi et al., EMNLP 2023, https://aclanthology.org/2023.emnlp-main.884): several short prompts at the input.

A linear router without bias reads the mean embedding of the instruction. Only the likeliest prompt is used, and the
router learns through its probability p. In training the router's scores are multiplied by 1 + N(0, 1), as in the
authors' code, so that all prompts are used.

The difference (ours): SMoP scales the chosen prompt's embeddings, p * P. Keys and values then depend on p, so on the
example, and the prompts would have to run once per example. Blocks that begin with a norm do not even see the scale,
only the residual stream does. Here all prompts run once per step, unscaled, and log p is added to the chosen prompt's
scores: the gate mode `renormalised` of `mop`. Both are the plain prompt at p = 1.
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
    """Short prompts, each as if it alone came before the text, and the router that chooses one per example."""

    layer = 0
    noise_seed: Int[Tensor, ""]  # of the next step; a buffer, so that a resumed training draws the same noise

    def __init__(
        self, initial_prompts: Float[Tensor, "experts prompts hidden"], *, seed: int = 0, noise: float = 1.0
    ) -> None:
        super().__init__()
        experts, _, hidden = initial_prompts.shape
        generator = torch.Generator().manual_seed(seed)
        self.prompts = nn.Parameter(initial_prompts.clone())
        self.router = nn.Linear(hidden, experts, bias=False)
        nn.init.orthogonal_(self.router.weight, generator=generator)
        self.register_buffer("noise_seed", torch.randint(2**62, (), generator=generator))
        self.noise = noise

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Put the chosen prompt before each text inside the `with` block, with gradients to prompt and router.

        In training mode the router's scores are perturbed.
        """
        means = instructions.mean
        factors = 1 + self.noise * self._draw_noise(len(means)).to(means) if self.training else 1.0
        keys, values = prefix_kv(model, self.prompts)
        return attend_to(Prefix(keys, values, self.log_gate(means, factors)))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Compile the prompts to constant keys and values; the router, without noise, still runs per example."""
        with torch.no_grad():
            keys, values = prefix_kv(model, self.prompts)
        return lambda instructions: attend_to(Prefix(keys, values, self.log_gate(instructions.mean)))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the prompts, and the router."""
        return {"adapter": [self.prompts], "gate": list(self.router.parameters())}

    def expert_weights(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
        """Return the probability of the prompt that acts, 0 for the others."""
        return self._log_weights(instructions.mean, 1.0).exp()

    def log_gate(
        self, means: Float[Tensor, "batch hidden"], factors: Float[Tensor, "batch experts"] | float = 1.0
    ) -> Float[Tensor, "batch prompts"]:
        """Return the log probability of the likeliest prompt; -inf, which is exact absence, for the others."""
        return self._log_weights(means, factors).repeat_interleave(self.prompts.shape[1], dim=1)

    def _log_weights(
        self, means: Float[Tensor, "batch hidden"], factors: Float[Tensor, "batch experts"] | float
    ) -> Float[Tensor, "batch experts"]:
        log_probabilities = (self.router(means) * factors).log_softmax(-1)
        experts = torch.arange(log_probabilities.shape[1], device=means.device)
        is_likeliest = experts == log_probabilities.argmax(-1, keepdim=True)
        return torch.where(is_likeliest, log_probabilities, -math.inf)

    def _draw_noise(self, rows: int) -> Float[Tensor, "rows experts"]:
        """Draw standard normal noise, different in every step."""
        generator = torch.Generator().manual_seed(int(self.noise_seed))
        self.noise_seed += 1
        return torch.randn(rows, self.router.out_features, generator=generator)


def build(model: LanguageModel, config: AdapterConfig) -> RoutedPrompts:
    """Return as many prompts in all as the other arms have.

    Raises `DataError` for families without prompt attention or rotary positions.
    """
    return _routed_prompts(model, config, seed=0)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> RoutedPrompts:
    """Return prompts that begin with the embeddings that `input` begins with, and a random router."""
    adapter = _routed_prompts(inputs.model, config, seed=init.seed)
    experts, prompts, _ = adapter.prompts.shape
    with torch.no_grad():
        adapter.prompts.copy_(sample_token_embeddings(inputs.states, experts * prompts, init).view_as(adapter.prompts))
    return adapter


def _routed_prompts(model: LanguageModel, config: AdapterConfig, *, seed: int) -> RoutedPrompts:
    require_prefix_support(model)
    prompts = torch.zeros(config.groups, config.prompts_per_expert, config.hidden_size)
    return RoutedPrompts(prompts, seed=seed).to(model.device)
