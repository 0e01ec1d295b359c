import pytest
import torch
from tiny_models import saved, tiny_model

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.errors import DataError
from mopcompress.models.dense_weights import open_dense_weights
from mopcompress.models.repair import write_repairs
from mopcompress.models.weight_files import REPAIR

CPU = torch.device("cpu")
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"


def test_a_dense_weight_includes_its_repair(tmp_path):
    model = tiny_model()
    folder = saved(model, tmp_path / "model")
    up, down = torch.randn(32, 2), torch.randn(2, 48)
    write_repairs(folder / REPAIR, {DOWN: LowRankFactors(up, down)})
    read_weight = open_dense_weights(folder, model.tokenizer, device=CPU)
    assert torch.equal(read_weight(UP), model.network.get_submodule(UP).weight)
    torch.testing.assert_close(read_weight(DOWN), model.network.get_submodule(DOWN).weight + up @ down)


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj", "model.layers.1.mlp.no_proj", "lm_head"])
def test_an_unknown_linear_is_a_data_error(name, tmp_path):
    model = tiny_model()
    folder = saved(model, tmp_path / "model")
    with pytest.raises(DataError, match="has no linear"):
        open_dense_weights(folder, model.tokenizer, device=CPU)(name)
