import torch
from tiny_models import SPECIAL, counting_model, next_of

from mopcompress.models.sampling import sample_text


def test_sampled_text_depends_on_the_seed_alone(tiny_llama):
    first, again, other = (sample_text(tiny_llama, samples=3, length=6, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (3, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampled_text_has_no_special_tokens(tiny_llama):
    assert int(sample_text(tiny_llama, samples=8, length=32, seed=0).min()) >= len(SPECIAL)


def test_sampled_text_follows_the_model():
    """A model that is certain of the next token samples nothing else."""
    tokens = sample_text(counting_model(), samples=4, length=8, seed=0)
    assert torch.equal(tokens[:, 1:], next_of(tokens[:, :-1]))


def test_progress_counts_the_tokens_of_a_sample(tiny_llama):
    counts = []
    sample_text(tiny_llama, samples=2, length=5, seed=0, progress=counts.append)
    assert counts == [1, 2, 3, 4, 5]
