import pytest
import torch
from tiny_models import HIDDEN, random_documents
from torch.testing import assert_close

from mopcompress.data.encoding import Document
from mopcompress.evaluation.hidden_states import HiddenStateDataset, PackedStates

DOCUMENTS = random_documents(10)
LAYER = 2


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def test_a_batch_holds_the_states_of_each_document_alone(tiny_llama, states):
    rows = [7, 0, 3]
    batch = states.batch(rows)
    assert batch.hidden.shape == (3, max(len(DOCUMENTS[row].tokens) for row in rows), HIDDEN)
    for hidden, row in zip(batch.hidden, rows, strict=True):
        tokens = torch.tensor([DOCUMENTS[row].tokens])
        assert_close(hidden[: tokens.shape[1]], tiny_llama.run_lower(tokens, LAYER)[0], rtol=1e-5, atol=1e-5)
        assert not bool(hidden[tokens.shape[1] :].any())


def test_the_mean_is_over_the_instruction_alone(tiny_llama, states):
    batch = states.batch([5, 2])
    for mean, row in zip(batch.instructions.mean, [5, 2], strict=True):
        instruction = torch.tensor([DOCUMENTS[row].tokens[: DOCUMENTS[row].context_tokens]])
        assert_close(mean, tiny_llama.run_lower(instruction, LAYER)[0].mean(0), rtol=1e-5, atol=1e-5)


def test_an_adapter_reads_nothing_past_the_instruction(states):
    rows = [5, 2, 8]
    read = states.batch(rows).instructions
    for hidden, count, row in zip(read.hidden, read.lengths.tolist(), rows, strict=True):
        assert count == DOCUMENTS[row].context_tokens
        assert bool(hidden[:count].any(1).all())
        assert not bool(hidden[count:].any())


def test_response_tokens_are_predicted_one_position_earlier(states):
    rows = [4, 9, 1]
    batch = states.batch(rows)
    triples = list(zip(batch.example.tolist(), batch.position.tolist(), batch.target.tolist(), strict=True))
    expected = [
        (index, position - 1, DOCUMENTS[row].tokens[position])
        for index, row in enumerate(rows)
        for position in range(DOCUMENTS[row].context_tokens, len(DOCUMENTS[row].tokens))
    ]
    assert triples == expected


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_does_not_matter(tiny_llama, states, batch_size):
    again = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=batch_size)
    assert_close(again.means, states.means, rtol=1e-5, atol=1e-5)
    rows = range(len(DOCUMENTS))
    assert_close(again.batch(rows).hidden, states.batch(rows).hidden, rtol=1e-5, atol=1e-5)


def test_progress_counts_documents(tiny_llama):
    counts = []
    HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4, progress=counts.append)
    assert counts == [4, 8, 10]


def test_nothing_is_left_on_the_disk(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    assert not list(tmp_path.iterdir())
    assert bool(states.batch([0]).hidden.any())


def test_sampled_states_are_of_instructions_after_position_0(tiny_llama, states):
    rows = [2, 6]
    allowed = [
        state
        for row in rows
        for state in tiny_llama.run_lower(torch.tensor([DOCUMENTS[row].tokens]), LAYER)[0][
            1 : DOCUMENTS[row].context_tokens
        ]
    ]
    samples = states.sample_states(rows, 40, torch.Generator().manual_seed(0))
    distances = (samples[:, None] - torch.stack(allowed)).norm(dim=2)
    assert float(distances.amin(1).max()) < 1e-4
    assert len(distances.argmin(1).unique()) == len(allowed)


def test_a_one_token_instruction_gives_its_only_state(tiny_llama):
    short = Document(task="", tokens=(5, 9, 11, 13), context_tokens=1)
    states = HiddenStateDataset(tiny_llama, [short], LAYER, batch_size=1)
    first = tiny_llama.run_lower(torch.tensor([short.tokens]), LAYER)[0, :1]
    assert_close(states.sample_states([0], 5, torch.Generator().manual_seed(0)), first.expand(5, -1))


def test_packed_states_are_taken_as_they_are(tiny_llama, states):
    tokens = sum(len(document.tokens) for document in DOCUMENTS)
    hidden = torch.arange(float(tokens)).repeat_interleave(HIDDEN).view(tokens, HIDDEN)
    packed = PackedStates(hidden, torch.ones(len(DOCUMENTS), HIDDEN))
    given = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4, packed=packed)
    start = sum(len(document.tokens) for document in DOCUMENTS[:3])
    batch = given.batch([3])
    assert batch.hidden[0, :, 0].tolist() == list(range(start, start + len(DOCUMENTS[3].tokens)))
    assert torch.equal(batch.instructions.mean, torch.ones(1, HIDDEN))


def test_the_shuffled_mean_is_of_another_document_in_any_batch(states):
    shuffled = states.batch([5, 2]).instructions.shuffled_mean
    assert torch.equal(states.batch([2]).instructions.shuffled_mean[0], shuffled[1])
    sources = [
        int((states.means == mean).all(1).nonzero()) for mean in states.batch(range(10)).instructions.shuffled_mean
    ]
    assert sorted(sources) == list(range(10))
    assert all(source != row for row, source in enumerate(sources))


def test_a_single_document_has_no_shuffled_mean(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS[:1], LAYER, batch_size=1)
    assert states.batch([0]).instructions.shuffled_mean is None
