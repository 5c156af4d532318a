"""intra and embeddings of every form against float64 NumPy, on shapes and spectra that a fast path could get wrong.

    N tokens, V vocabulary, D hidden width

Errors are judged twice: against the naive computation in float32 (explicit logits, SVD), and against a ceiling of 2e-5.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from udsstream.errors import SequenceTooLongError
from udsstream.scoring import scorer as scorer_module
from udsstream.scoring.lm_head import LMHead, factor_head
from udsstream.scoring.nuclear_norm import nuclear_norm_svd
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer, CandidateScores

CEILING = 2e-5
T = 512


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_head(v: int, d: int, *, seed: int = 1, bias: bool = False, **options) -> LMHead:
    return LMHead(weight=normal(v, d, seed=seed), bias=normal(v, seed=seed + 1) if bias else None, **options)


def make_scorer(v: int, *, scale="isometric", dims=(16, 4), longest: int = T, seed: int = 17, **options):
    projection = BilinearProjection.draw(vocab_size=v, max_seq_len=longest, dims=dims, scale=scale, seed=seed)
    return CandidateScorer(projection, **options)


def score(scorer: CandidateScorer, hidden: list[torch.Tensor], head: LMHead, form: str = "default") -> CandidateScores:
    if form == "logits":
        return scorer.score_logits([head.logits(states) for states in hidden])
    scorer._slices = {"hidden_space": False, "vocabulary_slices": True}.get(form)
    return scorer.score_hidden(hidden, head)


def check_against_oracle(scorer, hidden, head, form, *, ceiling: float = CEILING) -> None:
    found = score(scorer, hidden, head, form)
    gamma1, gamma2 = oracles.gamma(scorer.projection.vocabulary), oracles.gamma(scorer.projection.tokens)
    assert found.intra.dtype == found.embeddings.dtype == torch.float32
    for i, states in enumerate(hidden):
        matrix = oracles.logits(states, head.weight, head.bias, scale=head.scale, softcap=head.softcap)
        expected, z = oracles.nuclear_norm(matrix), oracles.embedding(matrix, gamma1, gamma2)
        naive_matrix = head.logits(states)
        naive = oracles.relative_error(nuclear_norm_svd(naive_matrix), expected)
        naive_z = oracles.relative_error(
            (
                torch.from_numpy(gamma2).float()[:, : len(states)] @ naive_matrix @ torch.from_numpy(gamma1).float().T
            ).flatten(),
            z,
        )
        error, error_z = (
            oracles.relative_error(found.intra[i], expected),
            oracles.relative_error(found.embeddings[i], z),
        )
        assert error <= ceiling, f"intra of candidate {i} {tuple(states.shape)}: {error:.1e}"
        assert error <= 3 * naive + 1e-6, f"intra of candidate {i}: {error:.1e}, naive float32 {naive:.1e}"
        assert error_z <= ceiling, f"embedding of candidate {i}: {error_z:.1e}"
        assert error_z <= 3 * naive_z + 1e-6, f"embedding of candidate {i}: {error_z:.1e}, naive float32 {naive_z:.1e}"


FORMS = ["hidden_space", "vocabulary_slices", "logits"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("lengths", "v", "d"),
    [
        ([1], 507, 123),
        ([123, 1, 252], 507, 123),  # N > D and N < D in one call
        ([252, 123], 123, 252),  # V < D
        ([33], 33, 33),
        ([123], 507, 508),  # V = D - 1
        ([123, 64], 8192 + 507, 123),  # crosses a slice
        ([7], 2 * 8192, 61),  # ends on a slice
        ([507], 252, 5),
        ([3], 2, 1),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_agrees_with_the_definition(form, lengths, v, d, bias):
    head = make_head(v, d, bias=bias)
    hidden = [normal(n, d, seed=10 + n) for n in lengths]
    check_against_oracle(make_scorer(v, dims=(min(16, v), 4)), hidden, head, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["isometric", "reference"])
def test_both_scalings_and_a_scaled_head(form, scale):
    head = make_head(507, 123, bias=True, scale=0.0625)
    check_against_oracle(make_scorer(507, scale=scale), [normal(64, 123), normal(252, 123)], head, form)


@pytest.mark.parametrize("form", ["vocabulary_slices", "logits"])
@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_soft_capped_heads(form, cap):
    head = make_head(8192 + 252, 123, softcap=cap, bias=True, scale=0.7)
    hidden = [normal(50, 123), normal(252, 123, seed=5)]
    uncapped = head.__class__(weight=head.weight, bias=head.bias, scale=head.scale)
    assert oracles.relative_error(head.logits(hidden[0]), uncapped.logits(hidden[0])) > 0.01  # the cap matters here
    check_against_oracle(make_scorer(head.vocab_size), hidden, head, form)


def test_a_soft_capped_head_never_takes_the_linear_form():
    head = make_head(252, 33, softcap=0.5)
    found = make_scorer(252).score_hidden([normal(20, 33)], head).intra[0]
    assert oracles.relative_error(found, oracles.nuclear_norm(oracles.logits(normal(20, 33), head.weight))) > 0.1
    assert (
        oracles.relative_error(found, oracles.nuclear_norm(oracles.logits(normal(20, 33), head.weight, softcap=0.5)))
        < CEILING
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_weights_without_full_column_rank(form, rank):
    """WᵀW is singular, so it has no Cholesky factor."""
    head = LMHead(weight=normal(507, rank) @ normal(rank, 123, seed=1))
    check_against_oracle(make_scorer(507), [normal(252, 123), normal(30, 123, seed=3)], head, form)


@pytest.mark.parametrize("form", FORMS)
def test_tied_duplicate_rows_and_columns(form):
    weight = normal(507, 123)
    weight[1::2] = weight[0:-1:2]  # an embedding padded with copies
    weight[:, 60:] = weight[:, :63]
    weight[500:] = 0
    check_against_oracle(make_scorer(507), [normal(123, 123)], LMHead(weight=weight), form)


@pytest.mark.parametrize("form", FORMS)
def test_rank_deficient_and_repeated_hidden_states(form):
    repeated = normal(1, 123).expand(252, 123).contiguous()
    thin = normal(252, 3) @ normal(3, 123, seed=1)
    check_against_oracle(make_scorer(507), [repeated, thin], make_head(507, 123), form)


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_matrix_scores_zero(form):
    found = score(make_scorer(507), [torch.zeros(33, 123), normal(33, 123)], make_head(507, 123), form)
    assert found.intra[0] == 0
    assert torch.equal(found.embeddings[0], torch.zeros(64))
    assert found.intra[1] > 0
    zero_head = score(make_scorer(507), [normal(33, 123)], LMHead(weight=torch.zeros(507, 123)), form)
    assert zero_head.intra[0] == 0
    assert not zero_head.embeddings.any()


def with_spectrum(values: torch.Tensor, n: int, v: int, d: int) -> tuple[torch.Tensor, LMHead]:
    """Hidden states and a head whose logits have exactly these singular values."""
    left = torch.linalg.qr(normal(n, len(values)).double()).Q
    right = torch.linalg.qr(normal(d, len(values), seed=1).double()).Q
    weight = torch.linalg.qr(normal(v, d, seed=2).double()).Q
    return ((left * values.double()) @ right.T).float(), LMHead(weight=weight.float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(torch.cat([torch.tensor([1e4]), torch.ones(99)]), id="one huge"),
        pytest.param(torch.ones(100), id="flat"),
        pytest.param(torch.cat([torch.ones(1), torch.full((99,), 1e-6)]), id="tail of 1e-6"),
        pytest.param(torch.cat([torch.ones(50), torch.full((50,), 1e-6)]), id="half of it 1e-6"),
        pytest.param(torch.logspace(0, -7, 100), id="seven decades"),
        pytest.param(torch.ones(2), id="exact rank 2"),
        pytest.param(torch.full((100,), 1e-15), id="tiny"),
        pytest.param(torch.full((100,), 1e15), id="large"),
    ],
)
def test_adversarial_spectra(form, values):
    hidden, head = with_spectrum(values, n=123, v=507, d=123)
    found = score(make_scorer(507), [hidden], head, form).intra[0]
    exact = oracles.nuclear_norm(oracles.logits(hidden, head.weight))
    assert (
        oracles.relative_error(found, float(values.double().sum())) <= 3 * CEILING
    )  # float32 inputs already differ a little
    assert oracles.relative_error(found, exact) <= CEILING


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(form, half):
    head = LMHead(weight=normal(507, 123).to(half), bias=normal(507, seed=4).to(half))
    hidden = [normal(64, 123).to(half), normal(252, 123, seed=2).to(half)]
    check_against_oracle(make_scorer(507), hidden, head, form)


# Properties ------------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=25)
@given(lengths=LENGTHS, data=st.data())
def test_permuting_candidates_permutes_the_results(lengths, data):
    order = data.draw(st.permutations(range(len(lengths))))
    hidden = [normal(n, 33, seed=place) for place, n in enumerate(lengths)]
    scorer, head = make_scorer(252), make_head(252, 33)
    straight = scorer.score_hidden(hidden, head)
    permuted = scorer.score_hidden([hidden[place] for place in order], head)
    torch.testing.assert_close(permuted.intra, straight.intra[list(order)], rtol=1e-6, atol=0)
    torch.testing.assert_close(permuted.embeddings, straight.embeddings[list(order)], rtol=1e-5, atol=1e-4)


@settings(max_examples=25)
@given(lengths=LENGTHS, form=st.sampled_from(FORMS), bias=st.booleans())
def test_a_candidate_does_not_depend_on_the_others_in_the_call(lengths, form, bias):
    hidden = [normal(n, 33, seed=place) for place, n in enumerate(lengths)]
    scorer, head = make_scorer(252), make_head(252, 33, bias=bias)
    together = score(scorer, hidden, head, form)
    for place, states in enumerate(hidden):
        alone = score(scorer, [states], head, form)
        assert oracles.relative_error(alone.intra[0], together.intra[place]) <= 1e-6
        assert oracles.relative_error(alone.embeddings[0], together.embeddings[place]) <= 1e-6


@settings(max_examples=25)
@given(factor=st.floats(1e-3, 1e3), n=st.integers(1, 60), where=st.sampled_from(["hidden", "weight", "scale"]))
def test_scores_are_homogeneous(factor, n, where):
    head = make_head(252, 33)
    hidden = normal(n, 33, seed=n)
    scorer = make_scorer(252)
    plain = scorer.score_hidden([hidden], head)
    scaled_head = {
        "hidden": head,
        "weight": LMHead(weight=head.weight * factor),
        "scale": dataclasses.replace(head, scale=factor),
    }[where]
    scaled = scorer.score_hidden([hidden * factor if where == "hidden" else hidden], scaled_head)
    assert oracles.relative_error(scaled.intra, plain.intra.double() * factor) <= CEILING
    assert oracles.relative_error(scaled.embeddings, plain.embeddings.double() * factor) <= CEILING


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("norm", "divisor"), [("none", lambda n: 1), ("sqrt", math.sqrt), ("tokens", lambda n: n)])
def test_length_norm_divides_intra_and_embedding(form, norm, divisor):
    hidden, head = [normal(n, 33, seed=n) for n in (1, 7, 60)], make_head(252, 33)
    plain = score(make_scorer(252), hidden, head, form)
    normed = score(make_scorer(252, length_norm=norm), hidden, head, form)
    for i, states in enumerate(hidden):
        by = divisor(len(states))
        assert oracles.relative_error(normed.intra[i], plain.intra[i].double() / by) < 1e-6
        assert oracles.relative_error(normed.embeddings[i], plain.embeddings[i].double() / by) < 1e-6


# The token side --------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_from_the_first_real_one():
    """A prefix of a sample is projected with the first columns of Γ2, whatever T is left over."""
    scorer, head = make_scorer(252, longest=100), make_head(252, 33)
    hidden = normal(40, 33)
    padded = torch.cat([hidden, torch.zeros(20, 33)])
    short, long = scorer.score_hidden([hidden], head), scorer.score_hidden([padded], head)
    torch.testing.assert_close(short.embeddings, long.embeddings)  # zero rows add nothing after the real ones
    shifted = scorer.score_hidden([torch.cat([torch.zeros(20, 33), hidden])], head)
    assert oracles.relative_error(shifted.embeddings, short.embeddings) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_of_exactly_the_longest_length_is_scored_and_one_more_is_refused(form):
    scorer, head = make_scorer(252, longest=40), make_head(252, 33)
    score(scorer, [normal(40, 33)], head, form)
    with pytest.raises(SequenceTooLongError, match=r"41 tokens.*max_seq_len=40; raise max_seq_len"):
        score(scorer, [normal(5, 33), normal(41, 33)], head, form)


def test_project_logits_is_the_definition():
    scorer = make_scorer(507)
    matrix = normal(60, 507)
    expected = oracles.embedding(
        matrix, oracles.gamma(scorer.projection.vocabulary), oracles.gamma(scorer.projection.tokens)
    )
    assert oracles.relative_error(scorer.projection.project_logits(matrix), expected) <= 2e-6


# What is kept of the head ----------------------------------------------------------------------------------------------


@pytest.fixture
def factorings(monkeypatch):
    """How often the head was factored."""
    count = SimpleNamespace(value=0)

    def counted(*args):
        count.value += 1
        return factor_head(*args)

    monkeypatch.setattr(scorer_module, "factor_head", counted)
    return count


def test_the_head_is_factored_once_per_version(factorings):
    scorer, head, hidden = make_scorer(252, slices=False), make_head(252, 33), [normal(20, 33)]
    for version in ("a", "a", "a"):
        scorer.score_hidden(hidden, head, version=version)
    assert factorings.value == 1
    scorer.score_hidden(hidden, head, version="b")
    assert factorings.value == 2
    for _ in range(2):
        scorer.score_hidden(hidden, head, version=None)  # unknown: never kept
    assert factorings.value == 4
    scorer.score_hidden(hidden, head, version="c")
    assert factorings.value == 5


def test_an_optimizer_step_in_place_changes_the_version_and_so_the_score(factorings):
    weight = torch.nn.Parameter(normal(252, 33))
    scorer, hidden = make_scorer(252), [normal(20, 33)]

    def found() -> torch.Tensor:
        with torch.no_grad():
            return scorer.score_hidden(
                hidden, LMHead(weight=weight), version=(weight.data_ptr(), weight._version)
            ).intra

    before = found()
    assert torch.equal(found(), before)
    assert factorings.value == 1
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.5).step()
    after = found()
    assert factorings.value == 2
    assert oracles.relative_error(after, before) > 0.01
    assert oracles.relative_error(after[0], oracles.nuclear_norm(oracles.logits(hidden[0], weight))) <= CEILING


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor):
                self.seen.add(tuple(item.shape))
        return result


def test_no_array_of_the_logits_size_is_made():
    n, v, d = 100, 3 * 8192, 48
    scorer, head, hidden = make_scorer(v), make_head(v, d), [normal(n, d)]
    with Shapes() as first:
        scorer.score_hidden(hidden, head, version=1)
    assert max(math.prod(shape) for shape in first.seen) < n * v
    assert (n, v) not in first.seen
    with Shapes() as second:
        scorer.score_hidden(hidden, head, version=1)
    assert max(max(shape, default=1) for shape in second.seen) <= T  # the vocabulary is not met again
    with Shapes() as naive:
        head.logits(hidden[0])
    assert (n, v) in naive.seen  # the check can fail


@pytest.mark.parametrize(("n", "side"), [(20, 20), (100, 48)])
def test_the_smaller_gram_matrix_is_decomposed(n, side, monkeypatch):
    shapes, original = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: shapes.append(tuple(gram.shape)) or original(gram))
    make_scorer(507).score_hidden([normal(n, 48)], make_head(507, 48))
    assert shapes == [(side, side)]


# Values that are not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_spoils_its_own_candidate_only(form, bad):
    scorer, head = make_scorer(252), make_head(252, 33)
    hidden = [normal(20, 33, seed=i) for i in range(3)]
    clean = score(scorer, hidden, head, form)
    hidden[1] = hidden[1].clone()
    hidden[1][4, 5] = bad
    found = score(scorer, hidden, head, form)
    assert torch.isnan(found.intra[1])
    assert torch.equal(found.intra[[0, 2]], clean.intra[[0, 2]])
    assert torch.equal(found.embeddings[[0, 2]], clean.embeddings[[0, 2]])
    assert not torch.isfinite(found.embeddings[1]).any()


def test_a_head_that_is_not_finite_gives_nan_and_no_exception():
    head = make_head(252, 33)
    head.weight[3, 3] = float("nan")
    assert torch.isnan(make_scorer(252).score_hidden([normal(20, 33)], head).intra).all()


def test_scoring_draws_nothing_and_keeps_its_inputs():
    torch.manual_seed(5)
    state = torch.random.get_rng_state().clone()
    head, hidden = make_head(252, 33, bias=True), [normal(20, 33)]
    copies = head.weight.clone(), hidden[0].clone()
    make_scorer(252).score_hidden(hidden, head)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(head.weight, copies[0])
    assert torch.equal(hidden[0], copies[1])


def test_the_oracle_itself_on_numbers_done_by_hand():
    assert oracles.nuclear_norm([[3.0, 0.0], [0.0, -4.0]]) == pytest.approx(7)
    assert oracles.nuclear_norm(np.full((2, 2), 1.0)) == pytest.approx(2)
    gamma = oracles.isometric_gamma(4, [0, 1, 2, 3], [1, 1, 1, 1])
    np.testing.assert_allclose(gamma @ gamma.T, np.eye(4), atol=1e-15)  # all rows: an orthonormal map
    np.testing.assert_allclose(oracles.reference_gamma(4, [1], [1, -1, 1, 1]), [[2, 0, -2, 0]], atol=1e-15)
    assert oracles.embedding([[1.0, 2.0]], np.eye(2), np.array([[3.0, 9.0]])).tolist() == [3, 6]
