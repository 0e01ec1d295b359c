"""Linears of a model by their role."""

from mopcompress.recover.methods.target_linears import linears_from_layer


def test_targets_are_ends_of_names_or_patterns(tiny_llama):
    def matches(*targets):
        names = linears_from_layer(tiny_llama, 2, targets)
        return {name.removeprefix("model.layers.") for name in names}

    assert matches("q_proj") == {"2.self_attn.q_proj", "3.self_attn.q_proj"}
    assert matches("mlp.up_proj", "re:.*3.self_attn.o") == {"2.mlp.up_proj", "3.mlp.up_proj", "3.self_attn.o_proj"}
    assert matches("model.layers.3.mlp.down_proj") == {"3.mlp.down_proj"}
    assert len(matches("Linear")) == 14
