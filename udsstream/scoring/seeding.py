"""Randomness from (seed, purpose, epoch, batch), never from a global generator.

Only the raw 64-bit stream of PCG64 is used, because NumPy keeps that stable between versions while it may change what
`Generator.choice` makes of it (NEP 19): a log written today must be replayable in five years.
"""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["draw_signs", "draw_with_replacement", "draw_without_replacement", "raw_bits"]


def raw_bits(count: int, *, seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> np.ndarray:
    """`count` uint64 words that depend on the four coordinates alone.

    `purpose` enters as the first 16 bytes of its SHA-256, so that two purposes never share a stream.
    """
    words = np.frombuffer(hashlib.sha256(purpose.encode()).digest()[:16], dtype="<u4").tolist()
    entropy = np.random.SeedSequence([seed, *words, epoch, batch])
    return np.random.PCG64(entropy).random_raw(count)


def draw_signs(count: int, **coordinates) -> np.ndarray:
    """`count` independent signs, int8, each -1 or +1."""
    return np.where(raw_bits(count, **coordinates) >> np.uint64(63), 1, -1).astype(np.int8)


def draw_without_replacement(count: int, population: int, **coordinates) -> np.ndarray:
    """`count` distinct integers of [0, population), int64, in random order (the places of the smallest of `population` words)."""
    return np.argsort(raw_bits(population, **coordinates), kind="stable")[:count].astype(np.int64)


def draw_with_replacement(count: int, population: int, **coordinates) -> np.ndarray:
    """`count` independent integers of [0, population), int64 (the high half of a 128-bit product: bias below population/2⁶⁴)."""
    return np.array([(int(word) * population) >> 64 for word in raw_bits(count, **coordinates)], dtype=np.int64)
