import pytest
import torch
from tiny_models import random_documents

from mopcompress.data.encoding import Document
from mopcompress.evaluation.batching import batches_by_length, derangement, left_padded, positions

DOCUMENTS = random_documents(50)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_every_document_once(seed, batch_size):
    batches = batches_by_length(DOCUMENTS, batch_size, generator=None if seed is None else generator(seed))
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert max(map(len, batches)) == batch_size
    assert len(batches) <= 50 // batch_size + 8


def test_without_a_generator_documents_come_by_length():
    batches = batches_by_length(DOCUMENTS, 3, generator=None)
    lengths = [len(DOCUMENTS[row].tokens) for batch in batches for row in batch]
    assert lengths == sorted(lengths)


def test_the_order_depends_on_the_generator_alone():
    first, again, other = (batches_by_length(DOCUMENTS, 4, generator=generator(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_shuffled_batches_have_similar_lengths_in_random_order():
    documents = random_documents(200)
    batches = batches_by_length(documents, 5, generator=generator(0))
    lengths = [[len(documents[row].tokens) for row in batch] for batch in batches]
    spread = sum(max(batch) - min(batch) for batch in lengths) / len(lengths)
    all_lengths = [length for batch in lengths for length in batch]
    assert spread < 0.3 * (max(all_lengths) - min(all_lengths))
    assert [max(batch) for batch in lengths] != sorted(max(batch) for batch in lengths)


def test_less_than_a_tenth_of_a_training_is_padding():
    """Rows have 16 to 128 tokens, 8 rows per batch; in random order a third would be padding."""
    lengths = torch.randint(16, 129, (960,), generator=generator(0)).tolist()
    documents = [Document("add", (1,) * length, 8) for length in lengths]
    batches = batches_by_length(documents, 8, generator=generator(0))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sum(lengths) > 0.9 * padded


@pytest.mark.parametrize("count", [2, 3, 8, 50, 65])
def test_a_derangement_is_one_cycle_and_the_same_every_time(count):
    order = derangement(count)
    cycle = [0]
    while order[cycle[-1]] != 0:
        cycle.append(order[cycle[-1]])
    assert sorted(cycle) == list(range(count))
    assert derangement(count) == order


def test_a_large_derangement_is_in_no_simple_order():
    steps = {(after - index) % 50 for index, after in enumerate(derangement(50))}
    assert len(steps) > 10


def test_padding_goes_to_the_left_and_is_masked():
    tokens, mask = left_padded([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_positions_count_tokens_without_the_padding():
    assert positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
