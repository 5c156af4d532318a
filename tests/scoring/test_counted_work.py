"""What scoring costs, counted and never timed: multiplications, kernels, and bytes, so that a slower scorer fails on any machine.

B candidates, N tokens, V vocabulary, D hidden width
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from udsstream.bench import _peak_bytes
from udsstream.scoring.lm_head import LMHead, factor_head
from udsstream.scoring.nuclear_norm import nuclear_norms
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer

V, D, LENGTHS = 20_000, 448, (95, 101, 124, 130, 132, 150, 180, 188)
MEGABYTE = 2**20


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def head() -> LMHead:
    return LMHead(weight=normal(V, D))


@pytest.fixture(scope="module")
def projection() -> BilinearProjection:
    return BilinearProjection.draw(vocab_size=V, max_seq_len=2048, dims=(128, 8), scale="isometric", seed=17)


@pytest.fixture
def scorer(head, projection) -> CandidateScorer:
    """With the head's factors made."""
    scorer = CandidateScorer(projection)
    scorer.score_hidden(states((3,)), head, version=1)
    return scorer


def states(lengths) -> list[torch.Tensor]:
    return [normal(n, D, seed=n) for n in lengths]


def flops(action) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


class Kernels(TorchDispatchMode):
    """Counts the operations that do work, views left out."""

    VIEWS = (
        "slice",
        "view",
        "transpose",
        "t",
        "split",
        "split_with_sizes",
        "unsqueeze",
        "select",
        "diagonal",
        "detach",
        "expand",
        "unbind",
        "alias",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket._qualified_op_name.removeprefix("aten::") not in self.VIEWS
        return func(*args, **(kwargs or {}))


def kernels(action) -> int:
    with Kernels() as counter:
        action()
    return counter.count


# Multiplications ---------------------------------------------------------------------------------------------------------


def test_scoring_multiplies_as_little_as_the_method_says(head, scorer):
    """Triangular products with R (4/7 of N·D²), one Gram matrix (N²·D), and an embedding that costs next to nothing."""
    hidden = states(LENGTHS)
    counted = flops(lambda: scorer.score_hidden(hidden, head, version=1))
    roots = sum(2 * n * D * D * 4 / 7 for n in LENGTHS)
    grams = sum(2 * n * n * D for n in LENGTHS)
    embeddings = sum(2 * 8 * n * D for n in LENGTHS) + len(LENGTHS) * 2 * 8 * D * 128
    assert counted <= 1.001 * (roots + grams + embeddings)
    assert embeddings < 0.06 * counted
    definition = sum(2 * n * D * V for n in LENGTHS)  # of the logits alone, without their singular values
    assert counted < definition / 40


def test_candidates_longer_than_the_width_cost_a_gram_matrix_of_the_width(head, scorer):
    n = 3 * D
    counted = flops(lambda: scorer.score_hidden(states((n,)), head, version=1))
    assert counted <= 1.001 * (2 * n * D * D * 4 / 7 + 2 * n * D * D * 5 / 7 + 2 * 8 * n * D + 2 * 8 * D * 128)


def test_of_large_gram_matrices_half_is_formed():
    n, r = 1024, 1500
    counted = flops(lambda: nuclear_norms([normal(n, r)], form="gram"))
    assert counted < 0.6 * 2 * n * n * r


def test_a_head_is_factored_with_a_little_more_than_half_the_products(head, projection):
    assert flops(lambda: factor_head(head, projection)) <= 1.001 * (2 * V * D * D * 4 / 7 + 2 * 128 * V * D)


def test_polar_costs_ten_iterations_of_three_products_without_padding():
    n = 120
    counted = flops(lambda: nuclear_norms([normal(n, D, seed=i) for i in range(4)], form="polar"))
    assert counted == 4 * (2 * n * n * D + 10 * 3 * 2 * n**3)


def test_polar_wastes_less_than_a_fifth_on_padding():
    draw = random.Random(7)
    lengths = [draw.randint(50, 200) for _ in range(64)]
    counted = flops(lambda: nuclear_norms([normal(n, D, seed=n) for n in lengths], form="polar"))
    needed = sum(2 * n * n * D + 10 * 3 * 2 * n**3 for n in lengths)
    assert needed < counted < 1.2 * needed


# Kernels -----------------------------------------------------------------------------------------------------------------


def test_a_candidate_adds_few_operations(head, scorer):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other threads' operations are not counted
    try:
        counts = [kernels(lambda b=b: scorer.score_hidden(states((60,) * b), head, version=1)) for b in (1, 9)]
        assert (counts[1] - counts[0]) / 8 <= 18
        assert counts[0] <= 50
        polar = CandidateScorer(scorer.projection, nuclear_norm="polar")
        polar.score_hidden(states((3,)), head, version=1)
        counts = [kernels(lambda b=b: polar.score_hidden(states((60,) * b), head, version=1)) for b in (1, 9)]
        assert (counts[1] - counts[0]) / 8 <= 6  # ten iterations for all of them together
    finally:
        torch.set_num_threads(threads)


# Bytes -------------------------------------------------------------------------------------------------------------------


def test_scoring_keeps_little_and_needs_little(head, scorer):
    hidden = states(LENGTHS)
    peak = _peak_bytes(lambda: scorer.score_hidden(hidden, head, version=1), torch.device("cpu"))
    stacked = 4 * D * sum(LENGTHS)
    assert peak <= 3 * stacked + 8 * (D + max(LENGTHS)) * max(LENGTHS) * len(LENGTHS)
    kept = sum(block.untyped_storage().nbytes() for _, block in scorer._factors.blocks)
    assert kept <= 0.6 * 4 * D * D  # a triangle


def test_many_candidates_need_no_more_than_some(head, scorer):
    """They are scored in groups of 16 MB, whatever the scoring microbatch holds."""
    hidden = states((100,) * 400)  # 72 MB
    peak = _peak_bytes(lambda: scorer.score_hidden(hidden, head, version=1), torch.device("cpu"))
    assert peak < 64 * MEGABYTE


def test_factoring_needs_slices_and_a_triangle_of_the_width(projection):
    d = 1500
    head = LMHead(weight=normal(V, d).bfloat16())
    peak = _peak_bytes(lambda: factor_head(head, projection), torch.device("cpu"))
    assert peak <= (32 + 2 * 16) * MEGABYTE + 0.6 * 8 * d * d + 8 * 128 * d


@pytest.mark.soak
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 9e9, reason="needs 9 GB of free memory"
)
@pytest.mark.parametrize("tokens", [1100, 4096])
def test_at_the_shapes_of_qwen_7b_scoring_stays_within_64_mb_of_the_trunks_forward(tokens):
    """One layer of that width, with its whole vocabulary; the first step, which factors the head, and a later one."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=1,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.01) if parameter.ndim == 1 else parameter.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    ids = torch.randint(152_064, (8, tokens // 8))
    scorer = CandidateScorer(
        BilinearProjection.draw(vocab_size=152_064, max_seq_len=2048, dims=(128, 8), scale="isometric", seed=17)
    )
    head = LMHead(weight=model.lm_head.weight.detach())

    def trunk() -> torch.Tensor:
        with torch.no_grad():
            return model.model(ids).last_hidden_state

    def step() -> None:
        hidden = trunk()
        scorer.score_hidden(list(hidden), head, version=1)

    alone = _peak_bytes(trunk, torch.device("cpu"))
    first = _peak_bytes(step, torch.device("cpu"))
    later = _peak_bytes(step, torch.device("cpu"))
    kept = sum(block.untyped_storage().nbytes() for _, block in scorer._factors.blocks)
    print(
        f"{tokens}: trunk {alone / 2**20:.0f} MB, first step {first / 2**20:.0f} MB, later {later / 2**20:.0f} + {kept / 2**20:.0f} kept"
    )
    assert first <= alone + 64 * MEGABYTE
    assert later + kept <= alone + 64 * MEGABYTE
