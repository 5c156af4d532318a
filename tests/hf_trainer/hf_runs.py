"""Runs of a Hugging Face Trainer small enough for tests, but real; importable in a fresh process, so that runs can be killed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer import Trainer
from transformers.training_args import TrainingArguments

from udsstream.hf_trainer.trainer import SelectingTrainer

VOCABULARY = 97


class Rows(Dataset):
    """Random token sequences of 3 to 24 tokens, by number; nothing in a row says which it is."""

    def __init__(self, count: int = 43, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = [rng.integers(3, VOCABULARY, size=rng.integers(3, 25)).tolist() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "note": "a column that the model's forward does not name"}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded to a multiple of 4; loss on every token. Knows nothing of ids."""
    longest = -(-max(len(row["input_ids"]) for row in rows) // 4) * 4
    ids = torch.full((len(rows), longest), 2)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        assert "note" not in row  # remove_unused_columns
        tokens = torch.tensor(row["input_ids"])
        ids[number, : len(tokens)] = labels[number, : len(tokens)] = tokens
        mask[number, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def llama(*, dropout: float = 0.1, lora: bool = False) -> torch.nn.Module:
    """Two layers, 32 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
    )
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    return get_peft_model(
        model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFRun:
    """The settings of one run; picklable."""

    folder: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of TrainingArguments, over the tiny defaults."""
    selection: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    """Settings over the tiny defaults; None: a Trainer without selection."""
    lora: bool = False
    dropout: float = 0.1
    log: bool = True

    @property
    def log_dir(self) -> Path:
        return Path(self.folder) / "log"

    def training_arguments(self, **changes: Any) -> TrainingArguments:
        return TrainingArguments(
            **{
                "output_dir": self.folder,
                "per_device_train_batch_size": 8,
                "max_steps": 13,  # epochs of 6 batches, the last one of 3
                "learning_rate": 1e-2,
                "save_strategy": "no",
                "logging_steps": 2,
                "seed": 5,
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | self.arguments
            | changes
        )

    def trainer(self, cls: Callable[..., Trainer] | None = None, **overrides: Any) -> Any:
        torch.set_num_threads(1)
        settings: dict[str, Any] = {}
        if self.selection is not None:
            cls = cls or SelectingTrainer
            settings = {"keep": 0.25, "max_seq_len": 32, "projection_dims": (16, 4), "buffer_size": 13}
            settings |= {"log_dir": self.log_dir if self.log else None} | self.selection
        given = {
            "model": llama(dropout=self.dropout, lora=self.lora),
            "args": self.training_arguments(),
            "train_dataset": Rows(),
            "data_collator": collate,
        }
        return (cls or Trainer)(**(given | settings | overrides))

    def run(self, resume: bool | str | None = None, **overrides: Any) -> dict[str, torch.Tensor]:
        """Trains to the end; the trainable weights."""
        trainer = self.trainer(**overrides)
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(trainer)

    def run_and_save(self) -> None:
        """Trains to the end in a process of its own, from the newest checkpoint if there is one; the weights go to `weights.pt`."""
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
        ):  # of another test's Trainer, which the fork server inherits
            os.environ.pop(name, None)
        resume = any(Path(self.folder).glob("checkpoint-*/trainer_state.json"))
        torch.save(self.run(resume=resume), Path(self.folder) / "weights.pt")


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.model is not None
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
