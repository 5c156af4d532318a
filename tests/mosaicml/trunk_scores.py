"""Random candidates, their scores as the algorithm takes them from a model, and the logits that the model has for one alone.

B rows, N columns, V vocabulary
"""

from __future__ import annotations

import torch

from udsstream.mosaicml.batch import check_candidates, real_tokens, scoring_microbatches
from udsstream.mosaicml.trunk import ScoringForm, choose_form, neutral
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer

V, LONGEST = 97, 40


def projection() -> BilinearProjection:
    return BilinearProjection.draw(vocab_size=V, max_seq_len=LONGEST, dims=(8, 4), scale="isometric", seed=1)


def make_batch(lengths, *, side="right", spare=0, seed=0, labels=True) -> dict:
    width = max(lengths) + spare
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(1, V, (len(lengths), width), generator=generator),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "sample_id": torch.arange(len(lengths)),
        "note": ["kept"] * len(lengths),
    }
    for row, n in enumerate(lengths):
        tokens = torch.randint(1, V, (n,), generator=torch.Generator().manual_seed(1000 * seed + row))
        place = slice(0, n) if side == "right" else slice(width - n, width)
        batch["input_ids"][row, place] = tokens
        batch["attention_mask"][row, place] = 1
    if labels:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def rows_of(batch, rows) -> dict:
    return {
        key: value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
        for key, value in batch.items()
    }


def score(model, parts, batch, *, max_tokens=10_000, form: ScoringForm | None = None):
    """As the algorithm does it: (B,) intra and (B, d) embeddings in the order of the rows."""
    scorer, mask = CandidateScorer(projection()), real_tokens(batch)
    lengths = check_candidates(batch, mask, batch["sample_id"].tolist(), LONGEST)
    intra, embeddings = torch.zeros(len(lengths)), torch.zeros(len(lengths), 32)
    with neutral(model):
        for rows, packed in scoring_microbatches(batch, mask, lengths, max_tokens):
            form = form or choose_form(parts, packed)
            if form.form == "logits":
                matrices = parts.hidden_states_and_logits(packed)[1]
                found = scorer.score_logits([matrices[place, : lengths[row]] for place, row in enumerate(rows)])
            else:
                matrices = parts.hidden_states(packed)
                found = scorer.score_hidden(
                    [matrices[place, : lengths[row]] for place, row in enumerate(rows)],
                    parts.head(form),
                    version=parts.head_version(),
                )
            intra[rows], embeddings[rows] = found.intra, found.embeddings
    return intra, embeddings


def logits_alone(model, batch, row: int) -> torch.Tensor:
    """(n, V): what the model makes of this row by itself, without padding, in eval mode."""
    real = batch["attention_mask"][row].bool()
    alone = {
        "input_ids": batch["input_ids"][row][real][None],
        "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.int64),
    }
    with neutral(model):
        output = model(alone)
    return (output["logits"] if not isinstance(output, torch.Tensor) else output)[0]
