"""The worker of GPTQModel without its library: what it requests of it, and what it reads in its answers."""

import pytest
import torch
from tiny_models import tiny_model

from mopcompress.backends.gptqmodel_worker import excluded_modules, find_fallbacks, unpack_weight


def packed_columns(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack by the definition: bit after bit down every column into words of 32, the lowest first."""
    words = []
    for column in numbers.T.tolist():
        stream = sum(number << (bits * index) for index, number in enumerate(column))
        words.append([(stream >> 32 * word) & 0xFFFFFFFF for word in range(len(column) * bits // 32)])
    signed = torch.tensor(words).T
    return torch.where(signed >= 2**31, signed - 2**32, signed).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_gptq_v1_weights_are_unpacked_exactly(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 32), generator=generator)  # [in, out]
    zeros = torch.randint(1, 2**bits, (2, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator)
    groups = torch.arange(64) // 32
    packed = {
        "a.qweight": packed_columns(codes, bits),
        "a.qzeros": packed_columns((zeros - 1).T, bits).T,
        "a.scales": scales,
        "a.g_idx": groups.to(torch.int32),
    }
    expected = (codes - zeros[groups]) * scales[groups]
    assert torch.equal(unpack_weight(packed, "a", bits), expected.T)


def test_other_linears_are_excluded_by_name() -> None:
    network = tiny_model("llama").network
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    assert excluded_modules(network, names) is None
    assert excluded_modules(network, names[1:]) == {"-:^model\\.layers\\.0\\.self_attn\\.q_proj$": {}}


def test_fallbacks_are_read_from_the_column_loss() -> None:
    log = {
        "gptq": [
            {"layer": 1, "module": "mlp.up_proj", "loss": "fallback(rtn): 0.0012"},
            {"layer": 1, "module": "mlp.down_proj", "loss": "0.0004"},
        ]
    }
    linears = [f"model.layers.{layer}.mlp.{name}" for layer in (1, 11) for name in ("up_proj", "down_proj")]
    assert find_fallbacks(log, linears) == ["model.layers.1.mlp.up_proj"]
