"""A training job small enough for tests, from a configuration file: model, tokenizer, streams, and the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from streaming import MDSWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from udsstream import cli

SENTENCES = ["the cat sat on the mat", "a dog ran over the hill", "what is two and two", "four it is", "say the word"]


def write_model(folder: Path) -> str:
    """A folder with a two-layer Llama and a word-level tokenizer, as `from_pretrained` takes it."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def write_rows(folder: Path, rows: list[dict[str, str]]) -> Path:
    with MDSWriter(out=str(folder), columns=dict.fromkeys(rows[0], "str"), hashes=["sha1"], size_limit=1024) as writer:
        for row in rows:
            writer.write(row)
    return folder


def write_data(root: Path) -> Path:
    """Two training streams of prompts and responses, and a held-out one."""
    pairs = [{"prompt": SENTENCES[i % 5], "response": f"{SENTENCES[i * 2 % 5]} {'the ' * (i % 7)}"} for i in range(60)]
    write_rows(root / "train" / "animals", pairs[:30])
    write_rows(root / "train" / "numbers", pairs[30:48])
    write_rows(root / "held_out", pairs[48:])
    return root


def write_config(folder: Path, model: str, data: Path) -> Path:
    """A job of 5 steps into `folder/run`; the path of its configuration."""
    settings = {
        "save_folder": str(folder / "run"),
        "max_duration": "5ba",
        "model": {"name": model, "lora": {"r": 4}},
        "data": {"streams_root": str(data / "train"), "batch_size": 8},
        "eval": {"local": str(data / "held_out"), "batch_size": 4},
        "selection": {"keep": 2, "projection_dims": [8, 4], "buffer_size": 16},
        "max_seq_len": 32,
        "save_interval": "2ba",
        "progress_bar": False,
        "device": "cpu",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def udsstream(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """What the command exits with, prints, and complains of."""
    monkeypatch.setattr(sys, "argv", ["udsstream", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), printed.out, printed.err
