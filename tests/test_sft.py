"""Rows to tokens and labels to batches, with tokenizers built here; the real SmolLM2 one is in tests/demo."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from udsstream.errors import ConfigError, DataError, MissingSampleIdError, SequenceTooLongError
from udsstream.sft import IGNORED, SFTCollator, num_tokens, tokenize

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops what an earlier assistant turn thought, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXTRA_PROMPT = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
SHRINKING = "{% if messages[-1]['role'] == 'assistant' %}" + CHATML + "{% endif %}"  # nothing for an open question
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must begin with user') }}{% endif %}" + CHATML
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CORPUS = ["the cat sat on the mat", "assistant user system", "def f(x): return x + 1", "naïve café 日本 🐍"] * 4


def byte_level(template: str | None = None, *, bos: bool = False, **special: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines; it can spell any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
        )
    special = {"pad_token": "<|pad|>", "eos_token": "<|eos|>", "bos_token": "<|bos|>"} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )
    tokenizer.chat_template = template
    return tokenizer


def merging() -> PreTrainedTokenizerFast:
    """Its only merges are a+b and ab+c, so that "ab" + "c" joins over the border."""
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "abc", "</s>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")])), eos_token="</s>"
    )
    assert tokenizer("abc")["input_ids"] == [5]
    return tokenizer


def spacing() -> PreTrainedTokenizerFast:
    """Puts a space before whatever begins a text, as Llama 2's does."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "h", "i", "o", "k", "▁h", "▁o"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "h"), ("▁", "o")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(  # pyright: ignore
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


PLAIN = byte_level()
CHAT = byte_level(CHATML)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on what"},
    {"role": "assistant", "content": "the mat 🐍"},
]


def learnt(item, tokenizer) -> str:
    """The text that bears loss, its stretches joined by |."""
    parts, open_ = [], False
    for token, label in zip(item["input_ids"], item["labels"], strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            parts = [*parts[:-1], [*parts[-1], token]] if open_ else [*parts, [token]]
        open_ = label != IGNORED
    return "|".join(tokenizer.decode(part) for part in parts)


# Prompt and response


def test_plain_prompt_and_response_are_joined_and_ended():
    item = tokenize({"prompt": "the cat", "response": " sat"}, PLAIN, max_seq_len=99)
    assert PLAIN.decode(item["input_ids"]) == "the cat sat<|eos|>"
    assert learnt(item, PLAIN) == " sat<|eos|>"
    assert item["truncated"] == 0


def test_chat_template_gives_user_and_assistant_turns():
    item = tokenize({"prompt": "the cat", "response": "sat"}, CHAT, max_seq_len=99)
    rendered = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    assert CHAT.decode(item["input_ids"]) == rendered
    assert item["input_ids"] == CHAT(rendered)["input_ids"]
    assert learnt(item, CHAT) == "sat<|im_end|>"  # not the line feed behind it


def test_loss_on_all_leaves_out_only_the_first_token():
    item = tokenize({"prompt": "the cat", "response": "sat"}, CHAT, max_seq_len=99, loss_on="all")
    assert item["labels"] == [IGNORED, *item["input_ids"][1:]]


def test_keys_can_be_named():
    row = {"question": "the", "answer": "cat"}
    item = tokenize(row, PLAIN, max_seq_len=99, prompt_key="question", response_key="answer")
    assert item == tokenize({"prompt": "the", "response": "cat"}, PLAIN, max_seq_len=99)


def test_bos_is_added_where_the_tokenizer_adds_it():
    tokenizer = byte_level(bos=True)
    for row in ({"prompt": "the", "response": "cat"}, {"prompt": "<|bos|>the", "response": "cat"}, {"text": "thecat"}):
        item = tokenize(row, tokenizer, max_seq_len=99)
        assert tokenizer.decode(item["input_ids"]) == "<|bos|>thecat<|eos|>"
        assert item["labels"][0] == IGNORED


def test_a_rendered_template_gets_no_second_bos():
    tokenizer = byte_level("{{ bos_token }}" + CHATML, bos=True)
    item = tokenize({"prompt": "the", "response": "cat"}, tokenizer, max_seq_len=99)
    assert item["input_ids"].count(tokenizer.bos_token_id) == 1


def test_eos_is_not_doubled():
    item = tokenize({"prompt": "the", "response": "cat<|eos|>"}, PLAIN, max_seq_len=99)
    assert item["input_ids"].count(PLAIN.eos_token_id) == 1
    assert learnt(item, PLAIN) == "cat<|eos|>"


def test_an_empty_prompt_is_allowed():
    item = tokenize({"prompt": "", "response": "the cat"}, PLAIN, max_seq_len=99)
    assert PLAIN.decode(item["input_ids"]) == "the cat<|eos|>"
    item = tokenize({"prompt": "", "response": "the cat"}, CHAT, max_seq_len=99)
    assert learnt(item, CHAT) == "the cat<|im_end|>"


# The join


def test_a_merge_does_not_reach_across_the_join():
    item = tokenize({"prompt": "ab", "response": "c"}, merging(), max_seq_len=9)
    assert item["input_ids"] == [4, 2, 6]  # ab, c, </s>, not abc, </s>
    assert item["labels"] == [IGNORED, 2, 6]


def test_a_space_is_not_put_before_a_response():
    tokenizer = spacing()
    item = tokenize({"prompt": "hi", "response": "ok"}, tokenizer, max_seq_len=9)
    assert tokenizer.convert_ids_to_tokens(item["input_ids"]) == ["▁h", "i", "o", "k", "</s>"]
    item = tokenize({"prompt": "hi", "response": " ok"}, tokenizer, max_seq_len=9)
    assert tokenizer.convert_ids_to_tokens(item["input_ids"]) == ["▁h", "i", "▁o", "k", "</s>"]


def test_a_template_without_generation_prompt_works():
    tokenizer = byte_level(LLAMA2)
    item = tokenize({"prompt": "the cat", "response": "sat"}, tokenizer, max_seq_len=99)
    assert tokenizer.decode(item["input_ids"]) == "[INST] the cat [/INST] sat <|eos|>"
    assert learnt(item, tokenizer) == " sat <|eos|>"


text = st.text(max_size=40).filter(lambda s: "<|" not in s)


@settings(deadline=None, max_examples=150)
@given(prompt=text, response=text.filter(lambda s: s.strip()), chat=st.booleans())
def test_the_prompt_is_a_prefix_and_nothing_is_lost(prompt, response, chat):
    tokenizer = CHAT if chat else PLAIN
    item = tokenize({"prompt": prompt, "response": response}, tokenizer, max_seq_len=10_000)
    asked, end = prompt, "<|eos|>"
    if chat:
        turns = [{"role": "user", "content": prompt}]
        asked, end = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), "<|im_end|>\n"
    head = tokenizer(asked)["input_ids"]
    assert item["input_ids"][: len(head)] == head
    assert item["labels"][: len(head)] == [IGNORED] * len(head)
    assert tokenizer.decode(item["input_ids"]) == (asked + response + end).encode("utf-8", "replace").decode()
    ignored = max(1, len(head))
    loss = item["labels"][ignored:]
    assert IGNORED not in loss[: -1 if chat else None]


# Messages


@pytest.mark.parametrize("as_json", [False, True])
def test_every_assistant_turn_bears_loss(as_json):
    row = {"messages": json.dumps(TURNS) if as_json else TURNS}
    item = tokenize(row, CHAT, max_seq_len=199)
    assert learnt(item, CHAT) == "sat<|im_end|>|the mat 🐍<|im_end|>"
    assert CHAT.decode(item["input_ids"]) == CHAT.apply_chat_template(TURNS, tokenize=False)


def test_a_conversation_may_end_with_the_user():
    item = tokenize({"messages": TURNS[:4]}, CHAT, max_seq_len=199)
    assert learnt(item, CHAT) == "sat<|im_end|>"
    assert CHAT.decode(item["input_ids"]).endswith("on what<|im_end|>\n")


def test_a_turn_without_content_bears_no_loss():
    turns = [*TURNS[:2], {"role": "assistant", "content": " \n"}, *TURNS[3:]]
    item = tokenize({"messages": turns}, CHAT, max_seq_len=199)
    assert learnt(item, CHAT) == "the mat 🐍<|im_end|>"


def test_a_call_of_a_tool_bears_loss():
    template = CHATML.replace("m['content']", "(m['content'] or m['tool_calls'][0])")
    turns = [TURNS[1], {"role": "assistant", "content": None, "tool_calls": ["sit()"]}]
    tokenizer = byte_level(template)
    assert learnt(tokenize({"messages": turns}, tokenizer, max_seq_len=199), tokenizer) == "sit()<|im_end|>"


def test_a_response_that_begins_with_white_space_keeps_it():
    item = tokenize({"prompt": "the", "response": "\n\n  cat "}, CHAT, max_seq_len=99)
    assert learnt(item, CHAT) == "\n\n  cat <|im_end|>"


@pytest.mark.parametrize(("template", "turns"), [(FORGETFUL, 5), (FORGETFUL, 4), (EXTRA_PROMPT, 3), (SHRINKING, 5)])
def test_a_template_that_does_not_only_append_is_refused(template, turns):
    messages = [dict(m, content="<think>hm</think>" + m["content"]) for m in TURNS[:turns]]
    with pytest.raises(
        DataError, match=r"sample 7: the chat template renders .* message [24] differently once more .*"
    ):
        tokenize({"messages": messages, "sample_id": 7}, byte_level(template), max_seq_len=999)


def test_a_template_without_special_end_token_teaches_its_line_feed():
    tokenizer = byte_level("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    item = tokenize({"messages": TURNS[1:3]}, tokenizer, max_seq_len=99)
    assert learnt(item, tokenizer) == "assistant: sat\n"  # no generation prompt, so the header is part of the turn


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{nope", r"column 'messages' is a string but not JSON"),
        ('"hi"', r"column 'messages' is a str, expected a list"),
        ([], r"column 'messages' is an empty list"),
        (None, r"column 'messages' is a NoneType"),
        (["hi"], r"message 0 of 'messages' is a str"),
        ([{"role": "user"}], r"message 0 of 'messages' has no 'content'; it has 'role'"),
        ([{"content": "x"}], r"message 0 of 'messages' has no 'role'; it has 'content'"),
        ([{"role": 1, "content": "x"}], r"'role' is of type int"),
        ([TURNS[1], {"role": "assistant", "content": [{"type": "text"}]}], r"message 1 .*'content' is of type list"),
        ([TURNS[1], {"role": "assistant", "content": None}], r"message 1 .*'content' is of type NoneType"),
        (TURNS[2:], r"begins with an assistant turn"),
        ("[" * 100_000, r"not JSON"),
    ],
)
def test_bad_messages(value, message):
    with pytest.raises(DataError, match=r"sample 3.*" + message):
        tokenize({"messages": value, "sample_id": 3}, CHAT, max_seq_len=99)


def test_turns_that_the_template_refuses():
    with pytest.raises(DataError, match=r"sample 3: .*refused the turns \(system, user, .*roles must begin with user"):
        tokenize({"messages": TURNS, "sample_id": 3}, byte_level(STRICT), max_seq_len=99)


def test_messages_need_a_template():
    with pytest.raises(ConfigError, match=r"needs a chat template.*has none: use the model's instruct variant"):
        tokenize({"messages": TURNS}, PLAIN, max_seq_len=99)


# Text


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_text_bears_loss_everywhere_but_at_its_first_token(tokenizer):
    item = tokenize({"text": "the cat 日本"}, tokenizer, max_seq_len=99)
    assert tokenizer.decode(item["input_ids"]) == "the cat 日本<|eos|>"
    assert item["labels"] == [IGNORED, *item["input_ids"][1:]]


# Which format


def test_columns_decide_the_format():
    with pytest.raises(DataError, match=r"sample 3 has none of the known forms: its columns are 'a', 'sample_id', exp"):
        tokenize({"a": "b", "sample_id": 3}, PLAIN, max_seq_len=9)
    with pytest.raises(DataError, match=r"a sample without sample_id has none .* are no columns"):
        tokenize({}, PLAIN, max_seq_len=9)
    row = {"prompt": "the", "response": "cat", "text": "sat"}
    with pytest.raises(DataError, match=r"could be read as prompt_response or text.*say which with format="):
        tokenize(row, PLAIN, max_seq_len=9)
    assert learnt(tokenize(row, PLAIN, max_seq_len=9, format="text"), PLAIN).endswith("at<|eos|>")


@pytest.mark.parametrize(("format", "key"), [("prompt_response", "prompt"), ("messages", "messages"), ("text", "text")])
def test_a_missing_column_lists_those_that_exist(format, key):
    with pytest.raises(
        DataError, match=rf"sample 3 has no column '{key}'; it has 'response', 'sample_id'; set the key"
    ):
        tokenize({"response": "x", "sample_id": 3}, CHAT, max_seq_len=9, format=format)


@pytest.mark.parametrize("value", [None, b"bytes", 3, ["x"]])
def test_a_column_that_is_not_text(value):
    with pytest.raises(
        DataError, match=rf"sample 3: column 'response' is of type {type(value).__name__}, expected tex"
    ):
        tokenize({"prompt": "x", "response": value, "sample_id": 3}, PLAIN, max_seq_len=9)


# Length


def test_a_long_sample_is_an_error_and_never_shortened():
    row = {"prompt": "the", "response": "cat sat", "sample_id": 12}
    n = len(tokenize(row, PLAIN, max_seq_len=99)["input_ids"])
    assert len(tokenize(row, PLAIN, max_seq_len=n)["input_ids"]) == n
    with pytest.raises(
        SequenceTooLongError, match=rf"sample 12 has {n} tokens, but max_seq_len is {n - 1}: raise max_se"
    ):
        tokenize(row, PLAIN, max_seq_len=n - 1)


def test_truncation_cuts_at_the_end_and_says_so():
    row = {"prompt": "the", "response": "cat sat", "sample_id": 12}
    whole = tokenize(row, PLAIN, max_seq_len=99)
    n = len(whole["input_ids"])
    cut = tokenize(row, PLAIN, max_seq_len=n - 2, overlong="truncate")
    assert cut == {"input_ids": whole["input_ids"][:-2], "labels": whole["labels"][:-2], "truncated": 2}


@pytest.mark.parametrize(
    ("row", "kwargs", "cause"),
    [
        (
            {"prompt": "the cat sat", "response": "on"},
            {"max_seq_len": 2, "overlong": "truncate"},
            r"max_seq_len=2 left",
        ),
        ({"prompt": "the cat", "response": ""}, {}, "the response is empty"),
        ({"prompt": "the cat", "response": " \n"}, {}, "the response is empty"),
        ({"messages": TURNS[:2]}, {}, "no assistant turn with content"),
        ({"text": ""}, {}, "the text is empty"),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_labels_that_are_all_ignored(row, kwargs, cause, chat):
    if "messages" in row and not chat:
        pytest.skip("messages need a template")
    with pytest.raises(DataError, match=rf"sample 5 has labels that are all ignored \(.*{cause}"):
        tokenize(row | {"sample_id": 5}, CHAT if chat else PLAIN, **({"max_seq_len": 99} | kwargs))


def test_no_end_token():
    tokenizer = byte_level(eos_token=None)
    for row in ({"prompt": "the", "response": "cat"}, {"text": "the"}):
        with pytest.raises(ConfigError, match=r"has no eos_token.*set tokenizer.eos_token"):
            tokenize(row, tokenizer, max_seq_len=9)


# The collator


ROWS = [
    {"prompt": "the", "response": "cat", "sample_id": 4, "module": "ast"},
    {"prompt": "the cat sat", "response": "on the mat", "sample_id": np.int64(2), "module": "json"},
    {"prompt": "naïve", "response": "日本", "sample_id": 9, "module": "re"},
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT, byte_level(pad_token="<|eos|>"), byte_level(pad_token=None)])
def test_batches_are_padded_by_position(tokenizer, side):
    batch = SFTCollator(tokenizer=tokenizer, max_seq_len=99, padding_side=side)(ROWS)
    assert list(batch) == ["input_ids", "attention_mask", "labels", "sample_id"]
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["sample_id"].tolist() == [4, 2, 9]
    items = [tokenize(row, tokenizer, max_seq_len=99) for row in ROWS]
    width = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (3, width)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for i, item in enumerate(items):
        n = len(item["input_ids"])
        filler = [pad] * (width - n)
        ids, ignored, ones, zeros = item["input_ids"], [IGNORED] * len(filler), [1] * n, [0] * len(filler)
        if side == "right":
            expected = ids + filler, item["labels"] + ignored, ones + zeros
        else:
            expected = filler + ids, ignored + item["labels"], zeros + ones
        found = (batch[key][i].tolist() for key in ("input_ids", "labels", "attention_mask"))
        assert tuple(found) == expected
        assert item["labels"][-1] == (IGNORED if tokenizer is CHAT else tokenizer.eos_token_id)  # eos keeps its loss


def test_truncation_is_visible_in_the_batch():
    collate = SFTCollator(tokenizer=PLAIN, max_seq_len=6, overlong="truncate")
    batch = collate(ROWS)
    lengths = [len(tokenize(row, PLAIN, max_seq_len=99)["input_ids"]) for row in ROWS]
    assert batch["truncated"].tolist() == [max(0, n - 6) for n in lengths]
    assert batch["truncated"].sum() > 0
    assert batch["input_ids"].shape[1] == 6


def test_the_collator_is_deterministic_draws_nothing_and_leaves_rows_alone():
    collate = SFTCollator(tokenizer=CHAT, max_seq_len=99)
    rows = [dict(row) for row in ROWS]
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    first, second = collate(rows), pickle.loads(pickle.dumps(collate))(rows)  # noqa: S301
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert rows == ROWS


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers(method):
    collate = SFTCollator(tokenizer=CHAT, max_seq_len=99)
    loader = DataLoader(
        ROWS, batch_size=3, num_workers=1, collate_fn=collate, multiprocessing_context=method, timeout=60
    )  # pyright: ignore
    (batch,) = loader
    assert all(torch.equal(batch[key], value) for key, value in collate(ROWS).items())


def test_a_worker_names_the_sample():
    rows = [{"prompt": "the", "response": "", "sample_id": 31}]
    collate = SFTCollator(tokenizer=CHAT, max_seq_len=99)
    with pytest.raises(DataError, match="sample 31 has labels that are all ignored"):
        list(DataLoader(rows, batch_size=1, num_workers=1, collate_fn=collate, multiprocessing_context="fork"))  # pyright: ignore


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_counted_after_the_shift(side):
    collate = SFTCollator(tokenizer=PLAIN, max_seq_len=99, padding_side=side)
    for rows in (ROWS, [{"text": "the cat", "sample_id": 0}, {"text": "a", "sample_id": 1}]):
        items = [tokenize(row, PLAIN, max_seq_len=99) for row in rows]
        assert num_tokens(collate(rows)) == {
            "total": sum(len(item["input_ids"]) for item in items),
            "loss_generating": sum(label != IGNORED for item in items for label in item["labels"]),
        }
    # A label at position 0, which a caller's own collator may leave there, is never judged.
    batch = {"attention_mask": torch.ones(1, 3), "labels": torch.tensor([[5, IGNORED, 6]])}
    assert num_tokens(batch) == {"total": 3, "loss_generating": 1}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"format": "chat"}, r"format='chat' is unknown; it is one of 'auto', 'prompt_response', 'messages', 'text'"),
        ({"loss_on": "prompt"}, r"loss_on='prompt' is unknown; it is one of 'response', 'all'"),
        ({"overlong": "drop"}, r"overlong='drop' is unknown; it is one of 'error', 'truncate'"),
        ({"padding_side": "both"}, r"padding_side='both' is unknown"),
        ({"max_seq_len": 1}, r"max_seq_len=1 must be a whole number of tokens, at least 2"),
        ({"max_seq_len": True}, r"max_seq_len=True must be"),
        ({"max_seq_len": 9.0}, r"max_seq_len=9.0 must be"),
        ({"format": "messages"}, r"needs a chat template"),
        ({"format": "text", "tokenizer": byte_level(eos_token=None)}, r"has no eos_token"),
        ({"format": "prompt_response", "tokenizer": byte_level(eos_token=None)}, r"has no eos_token"),
        ({"tokenizer": byte_level(eos_token=None, pad_token=None)}, r"has neither pad_token nor eos_token"),
    ],
)
def test_impossible_settings(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        SFTCollator(**({"tokenizer": PLAIN, "max_seq_len": 99} | kwargs))


@pytest.mark.parametrize("kwargs", [{"format": "chat"}, {"loss_on": "prompt"}, {"overlong": "drop"}])
def test_impossible_settings_of_tokenize(kwargs):
    with pytest.raises(ConfigError, match="is unknown; it is one of"):
        tokenize({"text": "the"}, PLAIN, max_seq_len=9, **kwargs)


def test_a_template_makes_eos_unnecessary():
    tokenizer = byte_level(CHATML, eos_token=None)
    batch = SFTCollator(tokenizer=tokenizer, max_seq_len=99, format="prompt_response")(ROWS)
    assert batch["input_ids"].shape[0] == 3


def test_a_row_without_sample_id():
    collate = SFTCollator(tokenizer=PLAIN, max_seq_len=99)
    with pytest.raises(MissingSampleIdError, match=r"no 'sample_id'; it has 'prompt', 'response'.*UDSStreamingDataset"):
        collate([{"prompt": "a", "response": "b"}])


@pytest.mark.parametrize("value", ["3", 3.0, None, True])
def test_a_sample_id_that_is_no_int(value):
    collate = SFTCollator(tokenizer=PLAIN, max_seq_len=99)
    with pytest.raises(DataError, match=r"'sample_id' is .* of type .*, expected an int"):
        collate([{"prompt": "a", "response": "b", "sample_id": value}])


def test_no_rows():
    with pytest.raises(DataError, match="called with no rows"):
        SFTCollator(tokenizer=PLAIN, max_seq_len=99)([])


def test_the_longest_text_of_a_tokenizer_gives_our_message_alone(caplog):
    tokenizer = byte_level()
    tokenizer.model_max_length = 4
    tokenize({"prompt": "the cat sat", "response": "on the mat"}, tokenizer, max_seq_len=99)
    assert "longer than the specified maximum" not in caplog.text


def test_importing_it_loads_neither_torch_nor_transformers():
    code = "import sys, udsstream.sft; print([m for m in ('torch', 'transformers', 'composer') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_special_tokens_of_these_tests_are_special():
    assert isinstance(PLAIN.added_tokens_decoder[0], AddedToken)
    assert "<|im_end|>" in PLAIN.all_special_tokens
