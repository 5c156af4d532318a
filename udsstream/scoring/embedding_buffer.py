"""The memory of what was trained on: the last M selected embeddings, first in, first out, and a digest of all that ever went in.

    M capacity, m rows held (m ≤ M), d components, B candidates

The i-th embedding ever pushed lies in row i mod M, so the number of pushes alone says where everything lies, and a buffer restored
from (rows, oldest first; number of pushes) is the same array, bit for bit, as the one that was never interrupted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EmbeddingBuffer", "mean_distance"]

EMPTY_DIGEST = bytes(32)
"""The digest before the first push."""


def mean_distance(embeddings: Tensor, memory: Tensor) -> Tensor:
    """embeddings (B, d), memory (m, d) → (B,) float32: mean Euclidean distance to the rows of the memory; 0 when it is empty.

    Distances are taken by differences, not by expanding the square: near-duplicates are what matters here, and
    `‖a‖² + ‖b‖² − 2⟨a,b⟩` in float32 cannot tell them from zero. On the CPU each candidate's value is the same, bit for bit, whichever
    others it comes with. The differences take 1 MB at a time there, the size of a core's cache, and no memory elsewhere.
    """
    count, rows = embeddings.shape[0], memory.shape[0]
    if rows == 0 or count == 0:
        return embeddings.new_zeros(count, dtype=torch.float32)
    embeddings, memory = embeddings.float(), memory.float()
    if embeddings.device.type != "cpu":
        return torch.cdist(embeddings, memory, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1)
    # torch sums in another order when there is a single sum to make: there are never fewer than two.
    embeddings = embeddings if count > 1 else embeddings.expand(2, -1)
    chunk = max(1, _DIFFERENCE_BYTES // (4 * embeddings.numel()))
    distances = embeddings.new_empty(embeddings.shape[0], rows)
    differences = embeddings.new_empty(embeddings.shape[0], min(chunk, rows), embeddings.shape[1])
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        difference = torch.sub(memory[None, start:stop], embeddings[:, None], out=differences[:, : stop - start])
        torch.linalg.vector_norm(difference, dim=2, out=distances[:, start:stop])
    return distances.mean(dim=1)[:count]


_DIFFERENCE_BYTES = 2**20


@dataclass
class EmbeddingBuffer:
    """A FIFO of at most `rows.shape[0]` embeddings.

    Attributes:
        rows: (M, d) float32; row `i % M` holds the i-th embedding ever pushed.
        pushed: how many were ever pushed.
        digest: SHA-256 chained over the pushes: `digest ← SHA256(digest ‖ the new rows, float32, little-endian)`.
    """

    rows: Tensor
    pushed: int = 0
    digest: bytes = EMPTY_DIGEST

    @classmethod
    def empty(cls, capacity: int, dim: int, *, device: torch.device | str = "cpu") -> EmbeddingBuffer:
        """A buffer of `capacity` rows of `dim` components that holds nothing yet."""
        return cls(rows=torch.zeros(capacity, dim, device=device))

    @classmethod
    def restore(
        cls, oldest_first: Tensor, *, pushed: int, digest: bytes, capacity: int, device: torch.device | str = "cpu"
    ) -> EmbeddingBuffer:
        """The buffer that `oldest_first()` and the two attributes were taken from, bit for bit.

        Raises:
            ValueError: the number of rows is not min(pushed, capacity).
        """
        held = min(pushed, capacity)
        if oldest_first.shape[0] != held:
            raise ValueError(
                f"a buffer of capacity {capacity} after {pushed} pushes holds {held} rows, but {oldest_first.shape[0]} were given"
            )
        buffer = cls.empty(capacity, oldest_first.shape[1], device=device)
        if held:
            slots = torch.arange(pushed - held, pushed) % capacity
            buffer.rows[slots.to(buffer.rows.device)] = oldest_first.to(buffer.rows)
        buffer.pushed = pushed
        buffer.digest = digest
        return buffer

    def __len__(self) -> int:
        """m: how many rows are held."""
        return min(self.pushed, self.rows.shape[0])

    def held(self) -> Tensor:
        """The m rows held, (m, d), as they lie (a view)."""
        return self.rows[: len(self)]

    def oldest_first(self) -> Tensor:
        """The m rows held, (m, d), in the order they were pushed (a copy)."""
        slots = torch.arange(self.pushed - len(self), self.pushed) % self.rows.shape[0]
        return self.rows[slots.to(self.rows.device)]

    def push(self, embeddings: Tensor) -> None:
        """Adds embeddings (k, d), the first one first; the oldest rows make room. More than M at once leave the last M.

        Copies the rows to the host once, for the digest.
        """
        new = embeddings.detach().float()
        host = new.cpu().contiguous()
        self.digest = hashlib.sha256(self.digest + host.numpy().astype("<f4", copy=False).tobytes()).digest()
        capacity = self.rows.shape[0]
        kept = new[-capacity:]
        self.pushed += new.shape[0]
        slots = torch.arange(self.pushed - kept.shape[0], self.pushed) % capacity
        self.rows.index_copy_(0, slots.to(self.rows.device), kept.to(self.rows))

    def mean_distance(self, embeddings: Tensor) -> Tensor:
        """`inter` of candidates: embeddings (B, d) → (B,) float32; see the function of this name."""
        return mean_distance(embeddings.to(self.rows.device), self.held())
