"""Slow, obvious float64 references, written from the formulas alone. Imports nothing of udsstream (a test checks it).

N tokens, V vocabulary, D hidden width, T longest sample, M buffer rows, d1 and d2 rows of Γ1 (d1×V) and Γ2 (d2×T)

L = cap(scale · (H Wᵀ + 1 bᵀ)),  intra = Σ σ_j(L),  z = vec(Γ2 L Γ1ᵀ),  inter = mean_j ‖z − q_j‖₂
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np


def f64(values) -> np.ndarray:
    """Any array or tensor (bfloat16 too) as float64, exactly."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def logits(hidden, weight, bias=None, *, scale: float = 1.0, softcap: float | None = None) -> np.ndarray:
    """(N, V)."""
    result = f64(hidden) @ f64(weight).T
    if bias is not None:
        result = result + f64(bias)
    result = scale * result
    return result if softcap is None else softcap * np.tanh(result / softcap)


def nuclear_norm(matrix) -> float:
    """Σ σ_j, from the singular values themselves."""
    return float(np.linalg.svd(f64(matrix), compute_uv=False).sum())


def isometric_gamma(n: int, frequencies, signs) -> np.ndarray:
    """(d, n): rows of the orthonormal DCT-II of length n, times √(n/d), columns times the signs."""
    rows = []
    for k in np.asarray(frequencies).tolist():
        amplitude = math.sqrt(1 / n) if k == 0 else math.sqrt(2 / n)
        rows.append(amplitude * np.cos(math.pi * (np.arange(n) + 0.5) * k / n))
    return math.sqrt(n / len(rows)) * np.array(rows) * f64(signs)


def reference_gamma(n: int, frequencies, signs) -> np.ndarray:
    """(d, n): √(n/d) · cos(2πkj/n) · s_j, the published code's map."""
    rows = [np.cos(2 * math.pi * np.arange(n) * k / n) for k in np.asarray(frequencies).tolist()]
    return math.sqrt(n / len(rows)) * np.array(rows) * f64(signs)


def gamma(sketch) -> np.ndarray:
    """Γ of anything with `scale`, `n`, `frequencies` and `signs`."""
    build = {"isometric": isometric_gamma, "reference": reference_gamma}[sketch.scale]
    return build(sketch.n, sketch.frequencies, sketch.signs)


def embedding(matrix, gamma1: np.ndarray, gamma2: np.ndarray) -> np.ndarray:
    """logits (N, V), N ≤ T → vec(Γ2[:, :N] L Γ1ᵀ), row-major over (d2, d1)."""
    matrix = f64(matrix)
    return (gamma2[:, : len(matrix)] @ matrix @ gamma1.T).reshape(-1)


def mean_distance(embedding, memory: Sequence) -> float:
    """Mean Euclidean distance to the rows of the memory; 0 when it is empty."""
    if len(memory) == 0:
        return 0.0
    return sum(math.sqrt(sum((f64(embedding) - f64(row)) ** 2)) for row in memory) / len(memory)


def mean_loss(logits, labels) -> float:
    """logits (N, V), labels (N,): mean over t with labels[t + 1] ≥ 0 of −log softmax(logits[t])[labels[t + 1]], nats."""
    losses = []
    for row, label in zip(f64(logits)[:-1], np.asarray(labels)[1:], strict=True):
        if label >= 0:
            shifted = row - row.max()
            losses.append(math.log(np.exp(shifted).sum()) - shifted[label])
    return sum(losses) / len(losses)


class Fifo:
    """The memory as a list: at most `capacity` rows, oldest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[np.ndarray] = []

    def push(self, rows) -> None:
        """One row after the other; the oldest goes when there is no room."""
        for row in rows:
            self.rows.append(np.array(row))
            if len(self.rows) > self.capacity:
                self.rows.pop(0)


def top_k(scores: Sequence[float], k: int) -> list[int]:
    """Places of the k largest, ascending; of equal scores the smaller place."""
    places = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return sorted(places[:k])


def digest_chain(pushes: Sequence) -> bytes:
    """SHA-256 over (digest so far ‖ the pushed rows as little-endian float32), from 32 zero bytes on."""
    digest = b"\0" * 32
    for rows in pushes:
        digest = hashlib.sha256(digest + np.asarray(rows).astype("<f4").tobytes(order="C")).digest()
    return digest


def relative_error(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖; the norm of `found` when nothing is expected."""
    found, expected = f64(found), f64(expected)
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / (size if size > 0 else 1.0)


def head_gradients(hidden: Sequence, labels: Sequence, weight, bias=None, *, scale: float = 1.0, softcap=None) -> list:
    """(V, D) float64 of each sample: the gradient of its mean loss with respect to the head's weight, by autograd on explicit logits."""
    import torch

    found = []
    for states, label in zip(hidden, labels, strict=True):
        w = torch.tensor(f64(weight), requires_grad=True)
        x = torch.tensor(f64(states)) @ w.T
        if bias is not None:
            x = x + torch.tensor(f64(bias))
        x = scale * x
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        targets = torch.as_tensor(np.asarray(label))
        torch.nn.functional.cross_entropy(x[:-1], targets[1:], ignore_index=-100).backward()
        assert w.grad is not None
        found.append(w.grad.numpy())
    return found


def greats_order(gradients: Sequence, validation, learning_rate: float) -> list[int]:
    """Greedily the largest η⟨g_i, g_val⟩ − η² ⟨g_i, Σ of the taken g_j⟩, from the gradients themselves."""
    gradients = [f64(g).ravel() for g in gradients]
    order: list[int] = []
    while len(order) < len(gradients):
        taken = sum((gradients[j] for j in order), np.zeros_like(gradients[0]))
        direction = learning_rate * f64(validation).ravel() - learning_rate**2 * taken
        gains = [g @ direction if i not in order else -math.inf for i, g in enumerate(gradients)]
        order.append(int(np.argmax(gains)))
    return order


def divbs_order(gradients: Sequence) -> list[int]:
    """Greedily the largest |⟨e, Σ_j g_j⟩| over unit vectors e: what of g_i is orthogonal to those taken (by least squares), normalised."""
    gradients = [f64(g).ravel() for g in gradients]
    total, order = sum(gradients), []
    while len(order) < len(gradients):
        values = []
        for i, g in enumerate(gradients):
            rest = g
            if order:
                basis = np.stack([gradients[j] for j in order], axis=1)
                rest = g - basis @ np.linalg.lstsq(basis, g, rcond=None)[0]
            length = np.linalg.norm(rest)
            values.append(
                -math.inf if i in order else abs(rest @ total) / length if length > 1e-5 * np.linalg.norm(g) else 0.0
            )
        order.append(int(np.argmax(values)))
    return order
