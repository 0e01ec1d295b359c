"""The gate: which experts an instruction should hear.

It reads the mean over instruction tokens of the hidden states that enter the prompts' layer, never the response (Dun
et al., 2310.02842: a light MLP over the tenth layer's hidden state of the instruction).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

WIDTH = 128


class Gate(nn.Module):
    """Standardise, Linear, GELU, Linear; gives log(experts * softmax), so that no preference is log 1 = 0 for all.

    Standardising by the training instructions' own mean and deviation (ours; the design is a LayerNorm) takes out what
    all instructions share, such as the chat template's system prompt.
    """

    mean: Float[Tensor, " hidden"]
    deviation: Float[Tensor, " hidden"]

    def __init__(
        self, hidden: int, experts: int, *, width: int = WIDTH, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("deviation", torch.ones(hidden))
        self.inner = nn.Linear(hidden, width)
        self.outer = nn.Linear(width, experts)
        self.draw(generator or torch.Generator())

    def forward(self, summary: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch experts"]:
        return self.logits(summary).log_softmax(-1) + math.log(self.outer.out_features)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Random weights, in place; equal states of the generator give equal weights on every device."""
        for linear in (self.inner, self.outer):
            drawn = torch.empty(linear.weight.shape).normal_(std=linear.in_features**-0.5, generator=generator)
            linear.weight.copy_(drawn)
            linear.bias.zero_()

    def logits(self, summary: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch experts"]:
        """Unnormalised scores of the experts."""
        return self.outer(nn.functional.gelu(self.inner((summary - self.mean) / self.deviation)))

    def standardise_by(self, summaries: Float[Tensor, "documents hidden"]) -> None:
        """Set, in place, the mean and deviation that inputs are measured with."""
        self.mean.copy_(summaries.mean(0))
        self.deviation.copy_(summaries.std(0, correction=0).clamp_min(1e-6))

    @torch.no_grad()
    def temper(self, factor: float) -> None:
        """Scale the logits, in place: 0 makes the mixture a plain prompt, 1 leaves the gate as it is.

        A gate that starts near one-hot leaves every example a fraction of the prompts and every expert a fraction of
        the steps, while a damaged model first needs the same repair on every task.
        """
        self.outer.weight.mul_(factor)
        self.outer.bias.mul_(factor)


def pretrain(
    gate: Gate, summaries: Float[Tensor, "documents hidden"], experts: Int[Tensor, " documents"], *, steps: int
) -> None:
    """Teach the gate, in place, a map from instructions to experts by cross-entropy, the whole set in each step."""
    gate.standardise_by(summaries)
    optimiser = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(gate.logits(summaries), experts).backward()
        optimiser.step()
