import pytest
import torch
from tiny_models import tiny_model

from mopcompress.errors import DataError
from mopcompress.models.modules import set_weight
from mopcompress.models.resizing import find_attention, find_mlp


def test_groups_are_channels_and_key_value_heads():
    model = tiny_model()  # hidden 32, 48 channels, 4 heads of 8 on 2 key-value heads
    assert (find_mlp(model, 0).groups, find_mlp(model, 0).weights) == (48, 3 * 48 * 32)
    attention = find_attention(model, 1)
    assert (attention.groups, attention.segments) == (2, ((32,), (16,), (16,)))
    block = model.blocks[1].self_attn
    shapes = {block.q_proj: (16, 32), block.k_proj: (8, 32), block.v_proj: (8, 32), block.o_proj: (32, 16)}
    assert attention.shapes(1) == shapes


@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(4, 3, 24), (5, 5, 30), (4, 2, 24)])
def test_heads_that_do_not_fit_are_a_data_error(heads, kv_heads, rows):
    model = tiny_model()
    model.config.num_attention_heads, model.config.num_key_value_heads = heads, kv_heads
    for linear in (model.blocks[0].self_attn.k_proj, model.blocks[0].self_attn.v_proj):
        set_weight(linear, torch.zeros(rows, 32), None)
    with pytest.raises(DataError, match=f"do not fit {heads} heads on {kv_heads} key-value heads"):
        find_attention(model, 0)
