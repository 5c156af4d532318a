"""Heads that train: which form is cheaper for them, by count, and that no score is ever one of an earlier weight.

N tokens, V vocabulary, D hidden width
"""

from __future__ import annotations

import logging

import oracles
import pytest
import torch
from largest_tensor import LargestTensor
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from udsstream.errors import ModelError
from udsstream.mosaicml.head_module import head_version, read_head
from udsstream.scoring import scorer as scorer_module
from udsstream.scoring.lm_head import LMHead, factor_head, factoring_flops, slices_are_cheaper, slices_flops
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer

CEILING = 2e-5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(v: int, *, dims=(16, 4)) -> BilinearProjection:
    return BilinearProjection.draw(vocab_size=v, max_seq_len=4096, dims=dims, scale="isometric", seed=1)


# The cost rule ----------------------------------------------------------------------------------------------------------


class Multiplications(TorchDispatchMode):
    """Counts the operations of matrix products, a float64 one as two float32 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            weight = 2 if left.dtype == torch.float64 else 1
            self.flops += weight * 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("lengths", "v", "d"), [([33, 60], 8000, 96), ([300], 4000, 200), ([20] * 8, 12_000, 448), ([7], 64, 96)]
)
def test_the_rule_counts_what_is_done(lengths, v, d):
    projection, head = draw(v), LMHead(weight=normal(v, d))
    hidden = [normal(n, d, seed=n) for n in lengths]
    for slices, rule in ((True, slices_flops), (False, factoring_flops)):
        with Multiplications() as counted:
            CandidateScorer(projection, slices=slices).score_hidden(hidden, head)
        # Beside the products: a Cholesky factor (d³/3), Γ2 on hidden states, triangles instead of squares.
        assert counted.flops == pytest.approx(rule(head, lengths, projection), rel=0.1)


@pytest.mark.parametrize(("n", "slices"), [(8, True), (2000, False)])
def test_few_tokens_take_slices_and_many_take_factors(n, slices, monkeypatch):
    factored = []
    monkeypatch.setattr(scorer_module, "factor_head", lambda *args: factored.append(1) or factor_head(*args))
    v, d = 4000, 96
    head, hidden, projection = LMHead(weight=normal(v, d)), [normal(n, d)], draw(v)
    assert slices_are_cheaper(head, [n], projection) == slices
    found = CandidateScorer(projection).score_hidden(hidden, head, version=None)
    assert bool(factored) != slices
    assert (
        oracles.relative_error(found.intra[0], oracles.nuclear_norm(oracles.logits(hidden[0], head.weight))) < CEILING
    )
    CandidateScorer(projection).score_hidden(hidden, head, version="frozen")
    assert factored  # a head that stays is always worth it


def test_the_rule_at_the_shapes_of_known_models():
    """Full fine-tuning, 8 candidates: of a small model with many tokens the head is factored, of a large one it is not."""
    meta = torch.device("meta")
    qwen = LMHead(weight=torch.empty(152_064, 3584, device=meta))
    smollm2 = LMHead(weight=torch.empty(49_152, 576, device=meta))
    assert slices_are_cheaper(qwen, [150] * 8, draw(152_064, dims=(128, 8)))
    assert not slices_are_cheaper(qwen, [1024] * 8, draw(152_064, dims=(128, 8)))
    assert not slices_are_cheaper(smollm2, [150] * 8, draw(49_152, dims=(128, 8)))
    assert slices_are_cheaper(smollm2, [30] * 8, draw(49_152, dims=(128, 8)))


@pytest.mark.parametrize("slices", [True, False])
def test_a_head_is_taken_in_slices_of_bounded_size(slices):
    v, d = 60_000, 256
    head, hidden = LMHead(weight=normal(v, d).bfloat16()), [normal(40, d), normal(25, d)]
    with LargestTensor() as seen:
        CandidateScorer(draw(v), slices=slices).score_hidden(hidden, head)
    assert seen.bytes <= 2**25 < head.weight.numel() * 4


# Optimizer steps --------------------------------------------------------------------------------------------------------


def tied_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class PastTheCounters(torch.optim.Optimizer):
    """Writes as optimizers with their own kernels do: PyTorch's version counters do not see it."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-1.0)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0),
    "past the counters": PastTheCounters,
}


def score(scorer: CandidateScorer, model, tokens: torch.Tensor, version) -> float:
    """The score that is found, once it is that of the model's own logits now."""
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    head = read_head(model.get_output_embeddings())
    found = scorer.score_hidden([output.hidden_states[-1][0]], head, version=version)
    assert oracles.relative_error(found.intra[0], oracles.nuclear_norm(output.logits[0])) < CEILING
    return float(found.intra[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("slices", [None, True, False])
def test_after_a_step_on_a_tied_head_scores_are_those_of_the_new_weight(optimizer, slices):
    model, tokens = tied_model(), torch.arange(1, 20)[None]
    step = OPTIMIZERS[optimizer](model.parameters())
    scorer = CandidateScorer(draw(97), slices=slices)
    found = []
    for _ in range(3):
        version = head_version(model.get_output_embeddings())
        assert version is None  # it trains
        found.append(score(scorer, model, tokens, version))
        model(tokens, labels=tokens).loss.backward()
        step.step()
        step.zero_grad()
    assert len(set(found)) == 3


def test_a_step_that_no_version_tells_of_is_found(caplog):
    """The head counts as frozen, and the write goes past the counters: the kept factors are another weight's."""
    model, tokens = tied_model(), torch.arange(1, 20)[None]
    scorer = CandidateScorer(draw(97))
    head = model.get_output_embeddings().requires_grad_(False)
    version = head_version(head)
    before = score(scorer, model, tokens, version)
    with caplog.at_level(logging.WARNING):
        assert score(scorer, model, tokens, version) == before
        assert not caplog.records
        head.weight.data.add_(normal(97, 32))
        assert head_version(head) == version
        assert score(scorer, model, tokens, version) != before
    assert "changed past PyTorch's version counters" in caplog.text


def test_without_that_check_the_score_would_be_stale(monkeypatch):
    model, tokens = tied_model(), torch.arange(1, 20)[None]
    scorer = CandidateScorer(draw(97))
    score(scorer, model, tokens, "a")
    model.get_output_embeddings().weight.data.mul_(-2).add_(normal(97, 32))
    monkeypatch.setattr(scorer_module.HeadFactors, "differs_from", lambda *_: torch.tensor(False))
    with pytest.raises(AssertionError):
        score(scorer, model, tokens, "a")


# Heads that are no matrix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("Linear4bit", torch.uint8), ("Linear8bitLt", torch.int8)])
def test_a_quantised_head_is_refused_by_name_with_the_remedy(name, dtype):
    quantised = type(name, (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(4, 8)
    quantised.weight = torch.nn.Parameter(torch.zeros(16, 1, dtype=dtype), requires_grad=False)
    with pytest.raises(
        ModelError, match=rf'bitsandbytes\.nn\.modules\.{name}, torch\.\w+ \(16, 1\).*skip_modules=\["lm_head"\]'
    ):
        read_head(quantised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_read_by_its_factors_and_left_alone(dtype):
    """It adds no V×D matrix, and its parameters stay where they are."""
    v, d = 4000, 96
    layer = LoraLinear(torch.nn.Linear(d, v, bias=False), "default", r=4, lora_alpha=8).to(dtype)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    places = [parameter.data_ptr() for parameter in layer.parameters()]

    with LargestTensor() as seen, torch.no_grad():
        head = read_head(layer)
    assert [parameter.data_ptr() for parameter in layer.parameters()] == places
    assert seen.bytes < v * d * dtype.itemsize / 10
    scale, a, b = layer.scaling["default"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.double() + scale * b.double() @ a.double()
    assert oracles.relative_error(head.weight_rows(slice(None)).detach().numpy(), expected.detach().numpy()) < 1e-6
    hidden = normal(20, d)
    found = CandidateScorer(draw(v)).score_hidden([hidden], head).intra[0]
    assert oracles.relative_error(found, oracles.nuclear_norm(head.logits(hidden).detach().double().numpy())) < CEILING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_refused(dtype):
    """It scales the rows of the sum too, which its product alone does not tell."""
    linear = torch.nn.Linear(96, 400, bias=False)
    layer = LoraLinear(linear, "default", r=4, lora_alpha=8, use_dora=True).to(dtype)
    with pytest.raises(ModelError, match=r"adapted by 'default', a Linear \(peft.*more than add a low-rank product"):
        read_head(layer)
