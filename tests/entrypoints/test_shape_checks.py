"""Shapes are checked before any work, and from the files alone where those tell them."""

import pytest
from cli_runner import invoke
from tiny_models import saved, tiny_model

from mopcompress.compress.sequential import linears_of
from mopcompress.entrypoints.compress import _linear_shapes
from mopcompress.entrypoints.shape_checks import check_shapes, shapes_on_disk
from mopcompress.errors import RecipeError
from mopcompress.recipe import SparseGPTModifier, load_recipe

SHAPES = {"model.layers.0.q": (576, 576), "model.layers.0.down": (576, 1536), "model.layers.1.q": (576, 576)}


def gptq(group_size, **changes):
    return load_recipe(None).modifier_for("gptq").with_bits(4, group_size).model_copy(update=changes)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_shapes_on_disk_are_those_of_the_loaded_model(family, tmp_path):
    model = tiny_model(family)
    loaded = _linear_shapes(model)
    assert len(loaded) == sum(len(linears_of(model, index)) for index in range(len(model.blocks)))
    assert shapes_on_disk(saved(model, tmp_path / "model")) == loaded


def test_shapes_of_experts_are_left_out(tmp_path):
    on_disk = shapes_on_disk(saved(tiny_model("mixtral"), tmp_path / "model"))
    assert on_disk
    assert not any("expert" in name for name in on_disk)


def test_an_unreadable_folder_has_no_shapes(tmp_path):
    assert shapes_on_disk(tmp_path) == {}
    (tmp_path / "config.json").write_text("[]")
    assert shapes_on_disk(tmp_path) == {}


def test_an_unsuitable_group_size_is_an_error_with_others():
    for size in (32, 64, None):
        check_shapes(SHAPES, [gptq(size)])
    with pytest.raises(RecipeError) as caught:
        check_shapes(SHAPES, [gptq(128)])
    assert str(caught.value) == (
        "group_size 128 does not divide the 576 inputs of model.layers.0.q (and of 1 more); choose 32 or 64, or ignore "
        "those linears"
    )
    with pytest.raises(RecipeError, match=r"of model\.layers\.1\.q; choose -1 \(one scale for a whole row\)"):
        check_shapes(SHAPES | {"model.layers.1.q": (576, 10)}, [gptq(64)])


def test_ignored_linears_need_not_fit():
    check_shapes(SHAPES, [gptq(128, ignore=("re:.*q$",))])
    check_shapes(SHAPES, [SparseGPTModifier(sparsity=0.6, mask_structure="3:5", targets=("nothing",))])


def test_an_unsuitable_structure_is_an_error():
    check_shapes(SHAPES, [SparseGPTModifier(sparsity=0.5, mask_structure="2:4")])
    with pytest.raises(RecipeError, match=r"3:5 does not divide the 576 inputs of .* \(and of 2 more\)"):
        check_shapes(SHAPES, [SparseGPTModifier(sparsity=0.6, mask_structure="3:5")])


def test_unsuitable_shapes_fail_a_dry_run(stories, tmp_path):
    words = ("--output-dir", tmp_path / "out", "--dry-run")
    for name, flags in (("quantize", "--group-size 32"), ("bench", "--bits 4 --set run.group_size=32")):
        outcome = invoke(name, stories, *flags.split(), *words)
        assert (outcome.code, len(outcome.errors)) == (78, 1), outcome.err
        assert "group_size 32 does not divide the 172 inputs of model.layers.0.mlp.down_proj" in outcome.errors[0]
        assert "choose -1 (one scale for a whole row)" in outcome.errors[0]
    outcome = invoke("prune", stories, "--pattern", "3:5", *words)
    assert outcome.code == 78
