import os
import tempfile

import pytest
import torch
from tiny_models import HIDDEN, random_documents
from torch.testing import assert_close

from mopcompress.data.encoding import Document
from mopcompress.errors import StorageError
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.storage.memmap import map_anonymous, reserve

DOCUMENTS = random_documents(10)
LAYER = 2


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def test_a_batch_holds_the_states_of_each_document_alone(tiny_llama, states):
    rows = [7, 0, 3]
    batch = states.batch(rows)
    assert batch.hidden.shape == (3, max(len(DOCUMENTS[row].tokens) for row in rows), HIDDEN)
    for found, row in zip(batch.hidden, rows, strict=True):
        tokens = torch.tensor([DOCUMENTS[row].tokens])
        assert_close(found[: tokens.shape[1]], tiny_llama.run_lower(tokens, LAYER)[0], rtol=1e-5, atol=1e-5)
        assert not bool(found[tokens.shape[1] :].any())


def test_the_summary_is_the_mean_over_the_instruction_alone(tiny_llama, states):
    batch = states.batch([5, 2])
    for found, row in zip(batch.instructions.mean, [5, 2], strict=True):
        instruction = torch.tensor([DOCUMENTS[row].tokens[: DOCUMENTS[row].context_tokens]])
        assert_close(found, tiny_llama.run_lower(instruction, LAYER)[0].mean(0), rtol=1e-5, atol=1e-5)


def test_what_an_adapter_may_read_ends_with_the_instruction(states):
    rows = [5, 2, 8]
    read = states.batch(rows).instructions
    for hidden, count, row in zip(read.hidden, read.lengths.tolist(), rows, strict=True):
        assert count == DOCUMENTS[row].context_tokens
        assert bool(hidden[:count].any(1).all())
        assert not bool(hidden[count:].any())


def test_every_response_token_is_predicted_from_the_position_before_it(states):
    rows = [4, 9, 1]
    batch = states.batch(rows)
    found = list(zip(batch.example.tolist(), batch.position.tolist(), batch.target.tolist(), strict=True))
    expected = [
        (index, position - 1, DOCUMENTS[row].tokens[position])
        for index, row in enumerate(rows)
        for position in range(DOCUMENTS[row].context_tokens, len(DOCUMENTS[row].tokens))
    ]
    assert found == expected


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_how_documents_were_batched_does_not_matter(tiny_llama, states, batch_size):
    again = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=batch_size)
    assert_close(again.means, states.means, rtol=1e-5, atol=1e-5)
    everything = range(len(DOCUMENTS))
    assert_close(again.batch(everything).hidden, states.batch(everything).hidden, rtol=1e-5, atol=1e-5)


def test_progress_counts_documents(tiny_llama):
    told = []
    HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4, progress=told.append)
    assert told == [4, 8, 10]


def test_nothing_is_left_on_the_disk(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    assert not list(tmp_path.iterdir())
    assert bool(states.batch([0]).hidden.any())


def test_some_states_are_those_of_instructions_never_the_first_token(tiny_llama, states):
    rows = [2, 6]
    allowed = [
        state
        for row in rows
        for state in tiny_llama.run_lower(torch.tensor([DOCUMENTS[row].tokens]), LAYER)[0][
            1 : DOCUMENTS[row].context_tokens
        ]
    ]
    picked = states.sample_states(rows, 40, torch.Generator().manual_seed(0))
    distances = (picked[:, None] - torch.stack(allowed)).norm(dim=2)
    assert float(distances.amin(1).max()) < 1e-4
    assert len(distances.argmin(1).unique()) == len(allowed)


def test_the_state_of_an_instruction_of_one_token_is_never_one_of_its_response(tiny_llama):
    short = Document(task="", tokens=(5, 9, 11, 13), context_tokens=1)
    states = HiddenStateDataset(tiny_llama, [short], LAYER, batch_size=1)
    first = tiny_llama.run_lower(torch.tensor([short.tokens]), LAYER)[0, :1]
    assert_close(states.sample_states([0], 5, torch.Generator().manual_seed(0)), first.expand(5, -1))


# --- batches


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_every_document_once(seed, batch_size):
    documents = random_documents(50)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = batches_by_length(documents, batch_size, generator=generator)
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert max(map(len, batches)) == batch_size
    assert len(batches) <= 50 // batch_size + 8


def test_without_a_generator_documents_come_by_length():
    batches = batches_by_length(DOCUMENTS, 3, generator=None)
    lengths = [len(DOCUMENTS[row].tokens) for batch in batches for row in batch]
    assert lengths == sorted(lengths)


def test_the_order_depends_on_the_generator_alone():
    documents = random_documents(50)
    first, again, other = (
        batches_by_length(documents, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_shuffled_batches_are_of_similar_length_and_in_no_order_of_length():
    documents = random_documents(200)
    batches = batches_by_length(documents, 5, generator=torch.Generator().manual_seed(0))
    lengths = [[len(documents[row].tokens) for row in batch] for batch in batches]
    spread = sum(max(batch) - min(batch) for batch in lengths) / len(lengths)
    everything = [length for batch in lengths for length in batch]
    assert spread < 0.3 * (max(everything) - min(everything))
    assert [max(batch) for batch in lengths] != sorted(max(batch) for batch in lengths)


def test_less_than_a_tenth_of_a_training_is_padding():
    """Of rows of 16 to 128 tokens, 8 a batch; in random order it is a third."""
    lengths = torch.randint(16, 129, (960,), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [Document("add", (1,) * length, 8) for length in lengths]
    batches = batches_by_length(documents, 8, generator=torch.Generator().manual_seed(0))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sum(lengths) > 0.9 * padded


def test_states_without_room_are_refused_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(StorageError, match=r"bytes of hidden states find no room in .*; free some, or set TMPDIR"):
        map_anonymous(2**50, 2**8, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_room_is_reserved_where_the_system_has_no_call_for_it_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    for size in (0, 12):
        reserve(tmp_path / "states", size)
        assert (tmp_path / "states").stat().st_size == size
