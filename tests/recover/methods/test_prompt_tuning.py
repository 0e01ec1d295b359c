"""One prompt at the input, against its definition."""

import pytest
import torch
from factories import response_nll
from tiny_models import HIDDEN, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.data.encoding import Document
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.recover.methods.prompt_tuning import InputPrompt

DOCUMENTS = random_documents(9)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_a_prompt_at_the_input_is_longer_input(family):
    """The definition: embeddings put before the text's own, and the whole network run on both (Lester et al.)."""
    model, count = tiny_model(family, sliding_window=32) if family == "gemma3" else tiny_model(family), 5
    prompts = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(0))
    states = HiddenStateDataset(model, DOCUMENTS, 0, batch_size=4)
    lengths = [len(document.tokens) - document.context_tokens for document in DOCUMENTS]
    nll = response_nll(model, states, InputPrompt(prompts)).split(lengths)
    for document, document_nll in zip(DOCUMENTS, nll, strict=True):
        text = model.network.get_input_embeddings()(torch.tensor([document.tokens]))
        logits = model.network(inputs_embeds=torch.cat([prompts[None], text], dim=1)).logits[0, count:]
        scored = torch.arange(document.context_tokens, len(document.tokens))
        expected = -logits.log_softmax(-1)[scored - 1, torch.tensor(document.tokens)[scored]]
        assert_close(document_nll, expected, rtol=1e-4, atol=1e-4)


def test_embedded_text_before_the_text_is_that_text(tiny_llama):
    """Prompts that are embeddings of tokens do what those tokens do."""
    tokens = random_tokens(1, 12)
    longer = Document("add", tuple(tokens[0].tolist()), 8)
    shorter = Document("add", tuple(tokens[0, 4:].tolist()), 4)
    with torch.no_grad():
        prompt = InputPrompt(tiny_llama.run_lower(tokens[:, :4], 0)[0])
        nll = response_nll(tiny_llama, HiddenStateDataset(tiny_llama, [shorter], 0, batch_size=1), prompt)
        states = HiddenStateDataset(tiny_llama, [longer], 0, batch_size=1)
        expected = score_responses(tiny_llama, states.batch([0]), 0).nll
    assert_close(nll, expected, rtol=1e-4, atol=1e-4)
