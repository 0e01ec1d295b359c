"""LoRA and MaskLoRA: first values, pruned zeros, and the rank that fits the budget of `mop`."""

import pytest
from factories import adapter_config, adapter_init, initialized_adapter, pruned_model, training_config
from tiny_models import random_documents, tiny_model

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.adapter import trained_parameters
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.training import fit

LAYER = 2


def built(model, arm="lora", **changes):
    config = adapter_config(arm, model, **{"layer": LAYER, "tasks": [], "rank": 2} | changes)
    return RECOVERY_METHODS[arm].build(model, config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pruned_zeros_stay_unless_the_update_is_dense(family):
    model = pruned_model(family)
    states = HiddenStateDataset(model, random_documents(6), LAYER, batch_size=4)
    for arm, zeros_stay in (("masklora", True), ("ia3", True), ("lora", False)):
        adapter, _ = initialized_adapter(arm, model, states, tasks=[], rank=2)
        fit(adapter, model, states, training_config(steps=4, learning_rate=0.05, gate_learning_rate=0.0))
        merged = adapter.merged(model)
        changed = 0
        for name, value in merged.items():
            before = model.network.get_parameter(name)
            zeros = before == 0
            if value.ndim == 2:
                assert 0.4 < float(zeros.float().mean()) < 0.6
                assert bool((value[zeros] == 0).all()) == zeros_stay, (arm, name)
            changed += int((value != before).sum())
        assert changed > 1000


def test_first_values_are_those_of_a_new_linear_and_zero(tiny_llama):
    states = HiddenStateDataset(tiny_llama, random_documents(6), LAYER, batch_size=4)
    adapter, _ = initialized_adapter("lora", tiny_llama, states, init=adapter_init(), rank=16)
    for patch in adapter.patches_by_name().values():
        assert not patch.up.any()
        down = patch.down.detach()
        bound = down.shape[1] ** -0.5
        assert 0.9 * bound < float(down.abs().max()) <= bound
        assert float(down.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_targets_choose_the_patched_linears(tiny_llama):
    patches = built(tiny_llama, targets=["q_proj", "re:.*3.self_attn.o"]).patches_by_name()
    names = ("2.self_attn.q_proj", "3.self_attn.q_proj", "3.self_attn.o_proj")
    assert set(patches) == {f"model.layers.{name}" for name in names}


# --- the budget


def test_the_default_rank_is_the_largest_within_the_budget(tiny_llama):
    budget = trained_parameters(built(tiny_llama, "mop"))
    for arm in ("lora", "masklora"):
        trained = {  # with these targets the budget decides, not the smallest linear
            rank: trained_parameters(built(tiny_llama, arm, rank=rank, targets=["Linear"]))
            for rank in (*range(1, 8), None)
        }
        assert trained[None] == max(count for count in trained.values() if count <= budget)
        assert trained[6] == 6 * trained[1] > budget > trained[None] == trained[5]


def test_the_default_rank_is_possible_for_every_linear(tiny_llama):
    adapter = built(tiny_llama, rank=None, targets=["v_proj"])
    ranks = {len(patch.down) for patch in adapter.patches_by_name().values()}
    assert ranks == {16}  # a value projection is 16 x 32


def test_the_budget_grows_with_the_experts(tiny_llama):
    sizes = [
        trained_parameters(built(tiny_llama, rank=None, targets=["Linear"], experts=experts)) for experts in (1, 40)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 33}, r"rank: 33 is more than model\.layers\.2\.self_attn\.o_proj can have, .* 32 x 32"),
        (
            {"rank": None, "layer": 0, "targets": ["Linear"]},
            r"rank 1 on 28 linears trains 6080 numbers, and mop with 3 experts of 2 prompts 4",
        ),
        ({"targets": ["query"]}, r"no linear .* is 'query'; there are self_attn\.q_proj, .*name some"),
    ],
)
def test_an_impossible_rank_or_target_raises(changes, message):
    model = tiny_model(intermediate_size=400) if changes.get("layer") == 0 else tiny_model()
    with pytest.raises(DataError, match=message):
        built(model, **changes)


def test_a_family_without_mop_needs_a_rank():
    model = tiny_model("bloom")
    with pytest.raises(DataError, match=r"trains as much as mop where no rank is given; .*; or give one"):
        built(model, rank=None)
    adapter = built(model, rank=1)
    writers = ("self_attention.dense", "mlp.dense_4h_to_h")
    assert set(adapter.patches_by_name()) == {f"transformer.h.{block}.{name}" for block in (2, 3) for name in writers}
