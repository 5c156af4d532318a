"""A model, a stream and a training run small enough for tests, but real: Composer's Trainer over a StreamingDataset.

Importable in a fresh process, so that runs can be killed (`tests/mosaicml/test_resume.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from composer import Trainer
from composer.core import Algorithm, DataSpec
from composer.models import HuggingFaceModel
from composer.utils import dist, reproducibility
from peft import LoraConfig
from streaming import MDSWriter, Stream
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from udsstream import OnlineBatchSelection, ReplaySelection, UDSStreamingDataset
from udsstream.mosaicml.lengths import count_lengths
from udsstream.mosaicml.selector import unwrapped
from udsstream.sft import num_tokens

VOCABULARY = 97


def write_stream(folder: Path, *, samples: int = 83, seed: int = 0, longest: int = 24, size_limit: int = 2048) -> Path:
    """An MDS stream of random token sequences of 3 to `longest` tokens, in several shards."""
    rng = np.random.default_rng(seed)
    with MDSWriter(
        out=str(folder), columns={"input_ids": "ndarray:int64"}, hashes=["sha1"], size_limit=size_limit
    ) as writer:
        for _ in range(samples):
            writer.write({"input_ids": rng.integers(3, VOCABULARY, size=rng.integers(3, longest + 1))})
    return folder


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded; loss on every token."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
        "labels": torch.full((len(rows), longest), -100),
        "sample_id": torch.tensor([row["sample_id"] for row in rows]),
    }
    for number, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        batch["input_ids"][number, : len(tokens)] = tokens
        batch["attention_mask"][number, : len(tokens)] = 1
        batch["labels"][number, : len(tokens)] = tokens
    return batch


def llama(*, dropout: float = 0.1, lora: bool = False, tie: bool = False, seed: int = 0) -> HuggingFaceModel:
    """Two layers, 32 wide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        tie_word_embeddings=tie,
    )
    adapters = (
        LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    )
    return HuggingFaceModel(LlamaForCausalLM(config), None, shift_labels=True, peft_config=adapters)


def gemma2(*, softcap: float = 30.0, scale: float = 1.0) -> HuggingFaceModel:
    """Two layers, 32 wide, with a tied head under a soft cap. `scale`: of its matrices, so that the cap bends what they give."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=softcap,
        attn_implementation="eager",
    )
    model = HuggingFaceModel(Gemma2ForCausalLM(config), None, shift_labels=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1)
    return model


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyRun:
    """The settings of one run; picklable, so that another process can be told to do it."""

    streams: tuple[str, ...]
    folder: str
    duration: str = "25ba"
    save_interval: str | None = None
    """None: no checkpoints."""
    autoresume: bool = False
    lora: bool = False
    tie: bool = False
    workers: int = 0
    dropout: float = 0.1
    batch_size: int = 8
    """Candidates of a global batch."""
    length_group_batches: int | None = None
    lr: float = 1e-2
    selection: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    """Settings of OnlineBatchSelection over the tiny defaults; None: train without it."""
    log: bool = True
    by_tokens: bool = False
    """Weight microbatches by their tokens, so that the loss does not depend on how rows are put together."""
    shard: Literal["full", "sharded"] | None = None
    """Shard the parameters over the ranks (FSDP2), and save checkpoints of this kind."""

    def trainer(self, *, replay: ReplaySelection | None = None, **overrides: Any) -> Trainer:
        """Builds the Trainer; `overrides` go to it as they are. `replay`: reads what that algorithm's log names, instead of selecting."""
        torch.set_num_threads(1)  # matrices this small only wait for the second thread
        dist.initialize_dist("cpu")
        per_rank = self.batch_size // dist.get_world_size()
        reproducibility.seed_all(5)
        model = llama(dropout=self.dropout, lora=self.lora, tie=self.tie)
        dataset = UDSStreamingDataset(
            streams=[Stream(local=stream) for stream in self.streams],
            shuffle=True,
            batch_size=per_rank,
            num_canonical_nodes=1,
        )
        if self.length_group_batches is not None and replay is None:
            lengths = count_lengths(dataset, lambda sample: len(sample["input_ids"]))
            dataset.group_by_length(self.length_group_batches, lengths)
        workers = {
            "collate_fn": collate,
            "num_workers": self.workers,
            "timeout": 60 if self.workers else 0,
            # A process that was itself spawned would spawn its workers too, and wait for their imports.
            "multiprocessing_context": "fork" if self.workers else None,
        }
        algorithms: list[Algorithm] = []
        if replay is not None:
            loader = replay.dataloader(dataset, **workers)
            algorithms = [replay]
        else:
            loader = DataLoader(dataset, batch_size=per_rank, **workers)
        if self.selection is not None and replay is None:
            settings = {"keep": 0.25, "max_seq_len": 32, "projection_dims": (16, 4), "buffer_size": 13} | self.selection
            log_dir = Path(self.folder) / "log" if self.log else None
            algorithms = [OnlineBatchSelection(log_dir=log_dir, autoresume=self.autoresume, **settings)]
        checkpoints = {}
        if self.save_interval is not None:
            checkpoints = {
                "run_name": "tiny",
                "save_folder": str(Path(self.folder) / "checkpoints"),
                "save_interval": self.save_interval,
                "save_overwrite": self.autoresume,
                "autoresume": self.autoresume,
            }
        if self.shard is not None:
            from composer.utils.parallelism import FSDP2Config

            checkpoints["parallelism_config"] = {"fsdp": FSDP2Config(state_dict_type=self.shard)}
        settings = {
            "model": model,
            "train_dataloader": DataSpec(loader, get_num_tokens_in_batch=num_tokens) if self.by_tokens else loader,
            "accumulate_train_batch_on_tokens": self.by_tokens,
            # gloo knows no mean: FSDP2's gradients are sums over the ranks there, which Adam does not see but for its ε.
            "optimizers": torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad],
                lr=self.lr,
                eps=1e-8 * (1 if self.shard is None else dist.get_world_size()),
            ),
            "max_duration": self.duration,
            "algorithms": algorithms,
            "device": "cpu",
            "device_train_microbatch_size": 2,
            "seed": 5,
            "progress_bar": False,
            "auto_log_hparams": False,
            **checkpoints,
            **overrides,
        }
        return Trainer(**settings)

    def run(self, *, replay: ReplaySelection | None = None, **overrides: Any) -> dict[str, torch.Tensor]:
        """Trains to the end; the trainable weights. The arguments are those of `trainer`."""
        trainer = self.trainer(replay=replay, **overrides)
        if (
            trainer.state.timestamp < self.duration
        ):  # else it was killed after its last checkpoint; Composer would refuse
            trainer.fit()
        model = unwrapped(trainer.state.model)
        weights = {name: _whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}
        trainer.close()
        return weights

    def run_and_save(self) -> None:
        """Trains to the end in a process of its own; rank 0's weights go to `weights.pt`."""
        weights = self.run()
        if dist.get_global_rank() == 0:
            torch.save(weights, Path(self.folder) / "weights.pt")
