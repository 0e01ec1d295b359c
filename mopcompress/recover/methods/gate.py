"""The gate: the network that weighs the experts for an instruction.

It reads the mean over instruction tokens of the hidden states that enter the prompts' layer, never the response (Dun
et al., 2310.02842: a light MLP over the tenth layer's hidden state of the instruction).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

WIDTH = 128


class Gate(nn.Module):
    """Standardization, Linear, GELU, Linear; gives log(experts * softmax), so that no preference is log 1 = 0 for all.

    Standardization by the training instructions' own mean and deviation (ours; the design is a LayerNorm) removes the
    part that all instructions share, such as the chat template's system prompt.
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
        self.reset_parameters(generator or torch.Generator())

    def forward(self, means: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch experts"]:
        return self.logits(means).log_softmax(-1) + math.log(self.outer.out_features)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw random weights, in place; equal states of the generator give equal weights on every device."""
        for linear in (self.inner, self.outer):
            weight = torch.empty(linear.weight.shape).normal_(std=linear.in_features**-0.5, generator=generator)
            linear.weight.copy_(weight)
            linear.bias.zero_()

    def logits(self, means: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch experts"]:
        """Return unnormalized scores of the experts."""
        return self.outer(nn.functional.gelu(self.inner((means - self.mean) / self.deviation)))

    def fit_standardization(self, means: Float[Tensor, "documents hidden"]) -> None:
        """Set, in place, the mean and deviation that inputs are standardized with."""
        self.mean.copy_(means.mean(0))
        self.deviation.copy_(means.std(0, correction=0).clamp_min(1e-6))

    @torch.no_grad()
    def scale_logits(self, factor: float) -> None:
        """Scale the logits, in place: 0 makes the mixture a plain prompt, 1 leaves the gate as it is.

        A gate that begins near one-hot gives every example a fraction of the prompts and every expert a fraction of
        the steps, while a damaged model first needs the same repair on every task.
        """
        self.outer.weight.mul_(factor)
        self.outer.bias.mul_(factor)


def pretrain(
    gate: Gate, means: Float[Tensor, "documents hidden"], experts: Int[Tensor, " documents"], *, steps: int
) -> None:
    """Train the gate, in place, to map instructions to experts by cross-entropy, the whole set in each step."""
    gate.fit_standardization(means)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gate.logits(means), experts).backward()
        optimizer.step()
