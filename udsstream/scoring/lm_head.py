"""The language-model head as scoring sees it: `L = cap(scale · (H Wᵀ + 1 bᵀ))`, and what stands in for it so that L is never built.

    N tokens, V vocabulary, D hidden width (D' = D + 1 with a bias), d1 and d2 rows of Γ1 and Γ2

For a head without a cap, two small matrices replace W, and both come from sums over slices of the vocabulary:

    R (r×D')   with RᵀR = WᵀW, so that H Rᵀ has the singular values of L; upper triangular but for exceptions, and kept by its blocks
    P (d1×D')  = Γ1 W, so that Γ2 H Pᵀ = Γ2 L Γ1ᵀ

With a bias, H gains a column of ones and W a column b; the scale multiplies both.

**The cost rule.** R and P cost about V·D² multiplications and are kept while the head does not change. A head that trains changes at every
step; then a few tokens are scored for less by slices of the vocabulary, `L_c = H W_cᵀ`, `G = Σ L_c L_cᵀ`, about N·V·D + N²·V.
`slices_are_cheaper` counts both. A capped head (`cap · tanh(x / cap)`, Gemma 2) is not linear and always takes the slices.

**Shards.** A head may hold a rank's rows of the vocabulary alone (`VocabularyShard`). Then WᵀW and P are sums over the ranks of what each
makes of its rows, by one all-reduce each, and no rank ever holds the whole weight; slices are sent by their owners, one after the other.

What is not here: finding the head in a model, and the check that this formula is the model's (`udsstream/mosaicml/trunk.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from udsstream.scoring.nuclear_norm import choose_dtype, exact_float32
from udsstream.scoring.projection import BilinearProjection

__all__ = [
    "HeadFactors",
    "LMHead",
    "LowRankUpdate",
    "VocabularyShard",
    "append_ones",
    "factor_head",
    "factoring_flops",
    "slices_are_cheaper",
    "slices_flops",
]

_SLICE_BYTES = 32 * 2**20
"""What a slice of the vocabulary may take in float64, the largest temporary that a head causes beside R itself."""

_BLOCKS = 7
"""Column blocks of a triangular R: a product with n of them costs (1 + 1/n) / 2 of the full one, narrower ones idle the cores."""

_FLOAT64_COST = 2
"""A float64 operation in float32 ones: half as many fit into a vector register. (On GPUs made for graphics it is 32 or 64.)"""


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """Which rows of the vocabulary a rank holds, when each rank of a group holds some."""

    starts: tuple[int, ...]
    """First row of each rank of the group, ascending, and V at the end."""
    group: torch.distributed.ProcessGroup

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return torch.distributed.get_rank(self.group)

    @property
    def start(self) -> int:
        """This rank's first row."""
        return self.starts[self.rank]

    def add_up(self, part: Tensor) -> None:
        """Replaces the tensor by its sum over the group. A collective."""
        torch.distributed.all_reduce(part, group=self.group)

    def send(self, rows: Tensor, owner: int) -> None:
        """Replaces the tensor by that of the group's rank `owner`. A collective."""
        torch.distributed.broadcast(rows, src=torch.distributed.get_global_rank(self.group, owner), group=self.group)


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """What a LoRA adapter adds to a weight: `scale · up · down`, never built whole."""

    up: Tensor
    """(V, r)."""
    down: Tensor
    """(r, D)."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """A head: weight (V, D), bias (V,) or None, logit scale, soft cap or None, and low-rank updates of the weight.

    With a `shard` weight, bias and `up` are this rank's rows alone, and what says so below is a collective of the shard's group.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabularyShard | None = None
    updates: tuple[LowRankUpdate, ...] = ()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0] if self.shard is None else self.shard.starts[-1]

    @property
    def width(self) -> int:
        """D', the columns of [W b]."""
        return self.weight.shape[1] + (self.bias is not None)

    @property
    def is_linear(self) -> bool:
        """Whether R and P can stand in for the weight."""
        return self.softcap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """The definition: hidden (N, D) → logits (N, V) float32; of a shard its rows' columns alone. Builds N×V; for reference, tests
        and the self-check."""
        return torch.cat(
            [self._logits_of(hidden.float(), rows) for _, rows in self._own_slices(max(hidden.shape))], dim=-1
        )

    def sliced_logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first vocabulary row, logits (N, slice) float32) for one slice of the vocabulary after the other. With a shard a collective."""
        hidden = hidden.float()
        for start, rows in self._all_slices(max(hidden.shape)):
            yield start, self._logits_of(hidden, rows)

    def augmented_slices(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, scale · [W b] (slice, D') float32) for one slice of the vocabulary, or of this rank's rows, after the other."""
        for start, rows in self._own_slices(self.width):
            yield start, rows if self.scale == 1 else rows * self.scale

    def add_up(self, part: Tensor) -> Tensor:
        """A sum over this rank's rows → the sum over all. With a shard a collective."""
        if self.shard is not None:
            self.shard.add_up(part)
        return part

    def _logits_of(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden (N, D), rows [w b] (slice, D') → (N, slice)."""
        width = hidden.shape[1]
        part = hidden @ rows[:, :width].T
        if self.bias is not None:
            part += rows[:, width]
        if self.scale != 1:
            part *= self.scale
        if self.softcap is not None:
            part = part.div_(self.softcap).tanh_().mul_(self.softcap)
        return part

    def _rows(self, start: int, stop: int) -> Tensor:
        """[W b][start:stop] of what this rank holds, float32."""
        rows = self.weight_rows(slice(start, stop)).float()
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias[start:stop].float()[:, None]], dim=1)

    def weight_rows(self, rows: slice) -> Tensor:
        """Those rows of the weight that this rank holds: in its own dtype as they are, in float32 with what is added to them."""
        found = self.weight[rows]
        for update in self.updates:
            found = torch.addmm(found.float(), update.up[rows].float(), update.down.float(), alpha=update.scale)
        return found

    def _own_slices(self, width: int) -> Iterator[tuple[int, Tensor]]:
        first = 0 if self.shard is None else self.shard.start
        for start, stop in _slices(self.weight.shape[0], width):
            yield first + start, self._rows(start, stop)

    def _all_slices(self, width: int) -> Iterator[tuple[int, Tensor]]:
        if self.shard is None:
            yield from self._own_slices(width)
            return
        for owner, first in enumerate(self.shard.starts[:-1]):
            for start, stop in _slices(self.shard.starts[owner + 1] - first, width):
                if owner == self.shard.rank:
                    rows = self._rows(start, stop).contiguous()
                else:
                    rows = torch.empty(stop - start, self.width, device=self.weight.device)
                self.shard.send(rows, owner)
                yield first + start, rows


@dataclass(frozen=True, kw_only=True)
class HeadFactors:
    """What stands in for a linear head."""

    blocks: tuple[tuple[int, Tensor], ...]
    """Rᵀ by blocks of columns: (first row that is not zero, that block from there on) float32."""
    projected: Tensor
    """P (d1, D') float32."""
    sample: Tensor
    """Some rows of the weight that they were made of, as it was."""

    def differs_from(self, head: LMHead) -> Tensor:
        """Whether the head's weight is another one than these were made of, judged by some of its rows; a boolean on its device.

        An optimizer moves every row at once. This finds a step that was written past PyTorch's version counters (`.data`, foreign
        kernels); versions find all others.
        """
        return (_sampled_rows(head) != self.sample).any()

    def times_root(self, hidden: Tensor) -> Tensor:
        """H (N, D') float32 → H Rᵀ (N, r), whose singular values are those of the logits."""
        if len(self.blocks) == 1 and self.blocks[0][0] == 0:
            return hidden @ self.blocks[0][1]
        product = hidden.new_empty(hidden.shape[0], sum(block.shape[1] for _, block in self.blocks))
        done = 0
        for first, block in self.blocks:
            torch.mm(hidden[:, first:], block, out=product[:, done : done + block.shape[1]])
            done += block.shape[1]
        return product


def append_ones(hidden: Tensor) -> Tensor:
    """H (N, D) → [H 1] (N, D+1): how a bias enters a linear map."""
    return torch.cat([hidden, hidden.new_ones(hidden.shape[0], 1)], dim=1)


@torch.no_grad()
def factor_head(head: LMHead, projection: BilinearProjection) -> HeadFactors:
    """R and P of a linear head, on the device of its weight, in one pass over slices of the vocabulary. With a shard a collective.

    WᵀW is formed in float64 where the device has it: its eigenvalues are squares, and in float32 those below 1e-7 of the largest
    would be rounding, which the nuclear norm sums up (5e-4 of it for a weight of low rank). Of its blocks only those on and below
    the diagonal are formed. R is its Cholesky factor, and W itself when V ≤ D'.

    When W has not full column rank there is no such factor. On the CPU the square root from the eigenvalues takes its place. Elsewhere,
    where to ask would be to wait, a jitter of a few roundings on the diagonal always makes one: it adds singular values of 6e-8·‖W‖_F.
    """
    sample = _sampled_rows(head).clone()
    device = head.weight.device
    dtype = choose_dtype(device)
    with exact_float32():
        if head.shard is None and head.vocab_size <= head.width:
            rows = torch.cat([rows for _, rows in head.augmented_slices()])
            return HeadFactors(blocks=((0, rows.T),), projected=_project_head(head, projection), sample=sample)
        edges = _edges(head.width)
        strips = _gram_strips(head, edges, dtype)
        if device.type != "cpu":
            _add_jitter(strips)
        singular = _factor_in_place(strips, edges)
        if device.type != "cpu" or not bool(singular):
            blocks = tuple((start, strip.float()) for (start, _), strip in zip(edges, strips, strict=True))
        else:
            del strips
            [gram] = _gram_strips(head, [(0, head.width)], dtype)
            eigenvalues, vectors = torch.linalg.eigh(gram)
            blocks = ((0, (vectors * eigenvalues.clamp_min(0).sqrt()).float()),)
        return HeadFactors(blocks=blocks, projected=_project_head(head, projection), sample=sample)


def _project_head(head: LMHead, projection: BilinearProjection) -> Tensor:
    """P = Γ1 [W b], (d1, D') float32."""
    projected = torch.zeros(projection.vocabulary.d, head.width, device=head.weight.device)
    for start, rows in head.augmented_slices():
        projected.addmm_(projection.vocabulary.columns(start, start + rows.shape[0]).to(rows.device), rows)
    return head.add_up(projected)


def _gram_strips(head: LMHead, edges: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Columns start:stop of [W b]ᵀ[W b] from row `start` on, for each of the edges; views of one piece of memory, added up at once."""
    width = head.width
    shapes = [(width - start, stop - start) for start, stop in edges]
    whole = torch.zeros(sum(rows * columns for rows, columns in shapes), dtype=dtype, device=head.weight.device)
    parts = whole.split([rows * columns for rows, columns in shapes])
    strips = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    for _, rows in head.augmented_slices():
        exact = rows.to(dtype)
        for (start, stop), strip in zip(edges, strips, strict=True):
            strip.addmm_(exact[:, start:].T, exact[:, start:stop])
        del exact  # before the next slice is made
    head.add_up(whole)
    return strips


def _add_jitter(strips: list[Tensor]) -> None:
    """Adds a few roundings of the trace to the diagonal, in place, without a wait."""
    diagonals = [strip.diagonal() for strip in strips]
    jitter = 16 * torch.finfo(strips[0].dtype).eps * torch.cat(diagonals).sum()
    for diagonal in diagonals:
        diagonal.add_(jitter)


def _factor_in_place(strips: list[Tensor], edges: list[tuple[int, int]]) -> Tensor:
    """Strips of a matrix → strips of its lower Cholesky factor, one after the other, so that no second matrix is needed.

    Returns, on the device, whether it has none; what the strips hold then is of no use.
    """
    failed = torch.zeros((), dtype=torch.bool, device=strips[0].device)
    for place, ((start, stop), strip) in enumerate(zip(edges, strips, strict=True)):
        for (earlier, _), done in zip(edges[:place], strips[:place], strict=True):
            strip.addmm_(done[start - earlier :], done[start - earlier : stop - earlier].T, alpha=-1)
        diagonal, below = strip.split([stop - start, strip.shape[0] - (stop - start)])
        lower, info = torch.linalg.cholesky_ex(diagonal)
        failed = failed | (info != 0)
        below.copy_(torch.linalg.solve_triangular(lower.T, below, upper=True, left=False))
        diagonal.copy_(lower)
    return failed


def _sampled_rows(head: LMHead) -> Tensor:
    return head.weight_rows(slice(None, None, -(-max(1, head.weight.shape[0]) // 64)))


def slices_are_cheaper(head: LMHead, lengths: Sequence[int], projection: BilinearProjection) -> bool:
    """Whether candidates of these lengths are scored for less by slices of the vocabulary than by factoring the head for them alone."""
    return slices_flops(head, lengths, projection) < factoring_flops(head, lengths, projection)


def factoring_flops(head: LMHead, lengths: Sequence[int], projection: BilinearProjection) -> float:
    """Float32 operations of R, P and the candidates' products with them, a float64 one counted twice; a multiply-add is two."""
    v, d, d1 = head.vocab_size, head.width, projection.vocabulary.d
    share = (1 + 1 / len(_edges(d))) / 2
    root = 0 if v <= d else _FLOAT64_COST * (2 * v * d * d * share + d**3 / 3)
    grams = sum(_FLOAT64_COST * 2 * min(n, d) ** 2 * max(n, d) for n in lengths)
    return root + 2 * d1 * v * d + 2 * sum(lengths) * d * d * share + grams


def slices_flops(head: LMHead, lengths: Sequence[int], projection: BilinearProjection) -> float:
    """The same of logits by slices of the vocabulary, their Gram matrices and projections."""
    v, d, d1, d2 = head.vocab_size, head.weight.shape[1], projection.vocabulary.d, projection.tokens.d
    grams = sum(_FLOAT64_COST * 2 * n * n * v for n in lengths)
    return 2 * sum(lengths) * d * v + grams + 2 * d2 * v * (sum(lengths) + d1 * len(lengths))


def _slices(vocab_size: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of slices whose rows of `width` values take 32 MB in float64 at most, but for slices of 128 rows."""
    step = max(128, _SLICE_BYTES // (8 * width) // 128 * 128)
    for start in range(0, vocab_size, step):
        yield start, min(start + step, vocab_size)


def _edges(width: int) -> list[tuple[int, int]]:
    """(start, stop) of the column blocks of a triangular factor."""
    step = max(64, -(-width // _BLOCKS // 32) * 32)
    return [(start, min(start + step, width)) for start in range(0, width, step)]
