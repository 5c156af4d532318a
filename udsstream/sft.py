"""From one row of a stream to token ids and labels, and from rows to a padded batch.

Owns the three data forms of supervised fine-tuning, told apart by a row's columns or by `format`:

- `prompt_response`: two strings. With a chat template they are one user and one assistant turn; without, the
  sequence is bos? + prompt + response + eos (bos where the tokenizer itself puts one).
- `messages`: a list of `{"role", "content"}`, or the same as a JSON string, rendered with the chat template.
- `text`: one string, bos? + text + eos, loss on every token.

**Loss** (`loss_on="response"`): the assistant turns' content and end token. Not the headers, not the white space that a
template puts after the end token, not a turn without content. A sequence's first token never bears loss: no model
predicts it, and with left padding it would be predicted from padding.

**The join.** What stands before a response is tokenised as it will be when the model is asked, without the response.
The response's tokens are those of the joined text wherever that text's tokens begin with the prompt's; where a merge
would reach across the join ("ab" + "c" with a token "abc") the response is tokenised on its own. So the prompt's tokens
are always a prefix of the sequence, and never depend on the response.

Not covered: packing, images, encoder-decoder models. Text that spells a special token becomes that token, as in
`apply_chat_template(tokenize=True)`: clean untrusted text first. Templates that render an earlier turn differently once
later turns follow (some hide their reasoning) are refused, not guessed at.

Letters: B rows of a batch, N tokens of the longest row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from udsstream.errors import ConfigError, DataError, MissingSampleIdError, SequenceTooLongError

if TYPE_CHECKING:
    import torch
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "LossOn",
    "Overlong",
    "SFTCollator",
    "SFTFormat",
    "TokenizedRow",
    "check_columns",
    "num_tokens",
    "tokenize",
]

IGNORED = -100
"""The label of a token without loss: PyTorch's and transformers' `ignore_index`."""

SFTFormat = Literal["auto", "prompt_response", "messages", "text"]
LossOn = Literal["response", "all"]
Overlong = Literal["error", "truncate"]

_Piece = tuple[str, bool]
"""A stretch of text and whether it bears loss."""


class TokenizedRow(TypedDict):
    """One row as a model takes it, before padding."""

    input_ids: list[int]
    """(N,) token ids."""
    labels: list[int]
    """(N,) the same ids, `IGNORED` where there is no loss; not shifted."""
    truncated: int
    """Tokens cut off at the end; 0 unless `overlong="truncate"`."""


def tokenize(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    format: SFTFormat = "auto",
    prompt_key: str = "prompt",
    response_key: str = "response",
    messages_key: str = "messages",
    text_key: str = "text",
    loss_on: LossOn = "response",
    overlong: Overlong = "error",
) -> TokenizedRow:
    """Token ids and labels of one row; a pure function of its arguments.

    Raises `DataError` for a row that lacks the columns, holds something else than text, or would bear no loss at all;
    `SequenceTooLongError` for one of more than `max_seq_len` tokens with `overlong="error"`; `ConfigError` for a
    tokenizer without the chat template or the end token that the format needs.
    """
    _check_choices(format=format, loss_on=loss_on, overlong=overlong)
    where = _name(row)
    if format == "auto":
        format = _find_format(row, where, prompt_key, response_key, messages_key, text_key)
    special = False  # a rendered chat template carries its own special tokens
    if format == "text":
        special, pieces = True, [(_text(row, text_key, where), True)]
    elif format == "messages":
        pieces = _render(_parse_messages(row, messages_key, where), tokenizer, where)
    else:
        prompt, response = _text(row, prompt_key, where), _text(row, response_key, where)
        if _has_template(tokenizer):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            pieces = _render(turns, tokenizer, where)
        else:
            special, pieces = True, [(prompt, False), (response, bool(response.strip()))]

    ids, bears_loss = _encode(pieces, tokenizer)
    if special:
        ids, bears_loss = _add_special_tokens(ids, bears_loss, tokenizer)
    labels = [token if loss or loss_on == "all" else IGNORED for token, loss in zip(ids, bears_loss, strict=True)]
    labels[:1] = [IGNORED] * len(labels[:1])

    truncated = max(0, len(ids) - max_seq_len)
    if truncated and overlong == "error":
        raise SequenceTooLongError(
            f"{where} has {len(ids)} tokens, but max_seq_len is {max_seq_len}: raise max_seq_len, leave the sample out "
            'of the stream, or set overlong="truncate" to cut it at the end'
        )
    ids, labels = ids[:max_seq_len], labels[:max_seq_len]
    if all(label == IGNORED for label in labels):
        cause = "the response is empty"
        if truncated:
            cause = f"cutting it to max_seq_len={max_seq_len} left nothing of the response, raise max_seq_len"
        elif format == "messages":
            cause = 'it has no assistant turn with content (loss_on="all" would train on the other turns)'
        elif format == "text":
            cause = "the text is empty"
        raise DataError(
            f"{where} has labels that are all ignored ({len(ids)} tokens): {cause}; a model learns nothing from it and "
            "its mean loss is NaN; leave it out of the stream"
        )
    return {"input_ids": ids, "labels": labels, "truncated": truncated}


@dataclass(frozen=True, kw_only=True)
class SFTCollator:
    """Rows as a StreamingDataset yields them -> a padded batch, tokenised on the fly.

    Picklable, deterministic and free of global random draws: safe in DataLoader workers, forked or spawned. A missing
    pad token falls back to eos: mask and labels go by position, never by a token's value, so pad and eos may be one.

    Each row needs `sample_id`, an int, beside the columns of its format. Returns int64 tensors

    - `input_ids`, `attention_mask`, `labels`: (B, N), N the tokens of the batch's longest row
    - `sample_id`: (B,)
    - `truncated`: (B,) tokens cut off, only with `overlong="truncate"` (in the batch and not counted here, since a
      worker's collator is a copy)

    Raises as `tokenize`, and `MissingSampleIdError`; `ConfigError` when it is made with impossible settings.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int
    """Tokens, at least 2: the first bears no loss."""
    format: SFTFormat = "auto"
    prompt_key: str = "prompt"
    response_key: str = "response"
    messages_key: str = "messages"
    text_key: str = "text"
    loss_on: LossOn = "response"
    overlong: Overlong = "error"
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        _check_choices(format=self.format, loss_on=self.loss_on, overlong=self.overlong)
        if self.padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side={self.padding_side!r} is unknown; it is one of 'right', 'left'")
        if not isinstance(self.max_seq_len, int) or self.max_seq_len < 2:
            raise ConfigError(f"max_seq_len={self.max_seq_len!r} must be a whole number of tokens, at least 2")
        if self.format == "messages":
            _require_template(self.tokenizer)
        if self.format == "text" or (self.format == "prompt_response" and not _has_template(self.tokenizer)):
            _eos(self.tokenizer)
        _pad(self.tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        if not rows:
            raise DataError("the collator was called with no rows; give it at least one (is the stream empty?)")
        ids = [_sample_id(row) for row in rows]
        items = [self._tokenized(row) for row in rows]
        shape = (len(items), max(len(item["input_ids"]) for item in items))
        batch = {
            "input_ids": torch.full(shape, _pad(self.tokenizer), dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
            "sample_id": torch.tensor(ids, dtype=torch.int64),
        }
        for i, item in enumerate(items):
            n = len(item["input_ids"])
            at = slice(0, n) if self.padding_side == "right" else slice(shape[1] - n, shape[1])
            batch["input_ids"][i, at] = torch.tensor(item["input_ids"], dtype=torch.int64)
            batch["attention_mask"][i, at] = 1
            batch["labels"][i, at] = torch.tensor(item["labels"], dtype=torch.int64)
        if self.overlong == "truncate":
            batch["truncated"] = torch.tensor([item["truncated"] for item in items], dtype=torch.int64)
        return batch

    def length_of(self, row: Mapping[str, Any]) -> int:
        """How many tokens a batch will hold of this row, padding left out. Raises as `tokenize`."""
        return len(self._tokenized(row)["input_ids"])

    def _tokenized(self, row: Mapping[str, Any]) -> TokenizedRow:
        return tokenize(
            row,
            self.tokenizer,
            max_seq_len=self.max_seq_len,
            format=self.format,
            prompt_key=self.prompt_key,
            response_key=self.response_key,
            messages_key=self.messages_key,
            text_key=self.text_key,
            loss_on=self.loss_on,
            overlong=self.overlong,
        )


def num_tokens(batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Tokens of a batch for Composer's `DataSpec(get_num_tokens_in_batch=…)`, padding left out.

    `total`: tokens that the model sees. `loss_generating`: tokens that it is judged on, after the causal shift, so a
    label at position 0 does not count. Composer weights microbatches by the latter when it accumulates on tokens.
    """
    return {
        "total": int(batch["attention_mask"].sum()),
        "loss_generating": int((batch["labels"][:, 1:] != IGNORED).sum()),
    }


def check_columns(
    columns: Sequence[str],
    where: str,
    *,
    format: SFTFormat = "auto",
    prompt_key: str = "prompt",
    response_key: str = "response",
    messages_key: str = "messages",
    text_key: str = "text",
) -> None:
    """Whether rows with these columns can be tokenised, before any is read.

    Raises:
        DataError: they lack what the format needs; the message begins with `where`.
    """
    row = dict.fromkeys(columns)
    if format == "auto":
        format = _find_format(row, where, prompt_key, response_key, messages_key, text_key)
    needed = {"prompt_response": (prompt_key, response_key), "messages": (messages_key,), "text": (text_key,)}
    for key in needed[format]:
        _value(row, key, where)


def _check_choices(**settings: str) -> None:
    allowed = {"format": get_args(SFTFormat), "loss_on": get_args(LossOn), "overlong": get_args(Overlong)}
    for field, value in settings.items():
        if value not in allowed[field]:
            raise ConfigError(f"{field}={value!r} is unknown; it is one of {', '.join(map(repr, allowed[field]))}")


def _name(row: Mapping[str, Any]) -> str:
    return f"sample {row['sample_id']}" if "sample_id" in row else "a sample without sample_id"


def _sample_id(row: Mapping[str, Any]) -> int:
    if "sample_id" not in row:
        raise MissingSampleIdError(
            f"a row has no 'sample_id'; it has {_keys(row)}. Stream it with UDSStreamingDataset, which adds one, or "
            "add it in your data set's get_item(sample_id)"
        )
    try:
        if isinstance(row["sample_id"], bool):
            raise TypeError
        return row["sample_id"].__index__()  # int and NumPy integers, but not 3.0 or "3"
    except (AttributeError, TypeError):
        raise DataError(
            f"'sample_id' is {row['sample_id']!r} of type {type(row['sample_id']).__name__}, expected an int: the "
            "sample's global position over the streams, as StreamingDataset.get_item takes it"
        ) from None


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "no columns"


def _find_format(
    row: Mapping[str, Any], where: str, prompt_key: str, response_key: str, messages_key: str, text_key: str
) -> SFTFormat:
    found: list[SFTFormat] = []
    if prompt_key in row and response_key in row:
        found.append("prompt_response")
    if messages_key in row:
        found.append("messages")
    if text_key in row:
        found.append("text")
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{where} could be read as {' or '.join(found)}: its columns are {_keys(row)}; say which with format="
        )
    raise DataError(
        f"{where} has none of the known forms: its columns are {_keys(row)}, expected {prompt_key!r} and "
        f"{response_key!r}, or {messages_key!r}, or {text_key!r}; name yours with prompt_key and response_key, or with "
        "messages_key, or text_key (in a job's configuration they stand under data:)"
    )


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where} has no column {key!r}; it has {_keys(row)}; set the key to one of these")
    return row[key]


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _value(row, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {key!r} is of type {type(value).__name__}, expected text (str)")
    return value


def _parse_messages(row: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    value = _value(row, key, where)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: column {key!r} is a string but not JSON ({error}); expected a list of "
                '{"role": …, "content": …}'
            ) from None
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise DataError(f'{where}: column {key!r} is {found}, expected a list of {{"role": …, "content": …}}')
    for i, message in enumerate(value):
        place = f"{where}: message {i} of {key!r}"
        if not isinstance(message, dict):
            raise DataError(f'{place} is a {type(message).__name__}, expected {{"role": …, "content": …}}')
        for field in ("role", "content"):
            if field not in message:
                raise DataError(f"{place} has no {field!r}; it has {_keys(message)}")
        if not isinstance(message["role"], str):
            raise DataError(f"{place}: 'role' is of type {type(message['role']).__name__}, expected text (str)")
        # A call of a tool has no text of its own.
        if not isinstance(message["content"], str) and not (message["content"] is None and message.get("tool_calls")):
            raise DataError(
                f"{place}: 'content' is of type {type(message['content']).__name__}, expected text (str); parts and "
                "images are not supported"
            )
    return value


def _has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not _has_template(tokenizer):
        raise ConfigError(
            f"format='messages' needs a chat template, but the tokenizer {tokenizer.name_or_path!r} has none: use the "
            "model's instruct variant, set tokenizer.chat_template, or give the data as prompt and response"
        )


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, so that a response could not be ended: set "
            "tokenizer.eos_token"
        )
    return tokenizer.eos_token_id  # pyright: ignore[reportReturnType]


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has neither pad_token nor eos_token, one of which is needed to "
            "pad a batch: set tokenizer.pad_token"
        )
    return pad  # pyright: ignore[reportReturnType]


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> list[_Piece]:
    """The conversation as the template writes it, cut where loss begins and ends.

    An assistant turn begins where the rendering of the turns before it ends, with the generation prompt, and ends where
    the rendering that includes it ends. Each must be a prefix of the next, or a cut would fall at a wrong place.
    """
    _require_template(tokenizer)
    whole = _apply_template(messages, tokenizer, where, add_generation_prompt=False)
    pieces: list[_Piece] = []
    done = ""
    at = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not ((message["content"] or "").strip() or message.get("tool_calls")):
            continue
        if i == 0:
            raise DataError(f"{where} begins with an assistant turn; put the user's turn before it, it may be empty")
        before = _apply_template(messages[:i], tokenizer, where, add_generation_prompt=True)
        upto = _apply_template(messages[: i + 1], tokenizer, where, add_generation_prompt=False)
        for shorter, longer in ((done, before), (before, upto), (upto, whole)):
            if not longer.startswith(shorter):
                k = next(k for k, (a, b) in enumerate(zip(shorter + "\0", longer + "\1", strict=False)) if a != b)
                raise DataError(
                    f"{where}: the chat template renders what stands before or in message {i} differently once more "
                    f"follows, so that the response cannot be told from the rest: at character {k} first "
                    f"{shorter[k : k + 40]!r}, then {longer[k : k + 40]!r}. Set tokenizer.chat_template to one that "
                    "only appends (no hidden reasoning, nothing extra in the generation prompt), or split the "
                    "conversation into one sample per response"
                )
        end = len(upto) - _space_after_end_token(upto[len(before) :], tokenizer)
        pieces += [(whole[at : len(before)], False), (whole[len(before) : end], True)]
        done, at = upto, end
    return [*pieces, (whole[at:], False)]


def _apply_template(messages: list[dict[str, Any]], tokenizer: Any, where: str, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: the tokenizer's chat template refused the turns ({roles}): {error}; change the turns to what "
            "the template takes, or set tokenizer.chat_template"
        ) from error


def _space_after_end_token(turn: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of white space behind a turn's end token, 0 when it does not end in a special token."""
    stripped = turn.rstrip()
    return len(turn) - len(stripped) if stripped.endswith(tuple(tokenizer.all_special_tokens)) else 0


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # `verbose=False`: the length is checked here, against max_seq_len, with a message that names the sample.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []  # pyright: ignore


def _encode(pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of the joined pieces and whether each bears loss; see "The join" above.

    A piece sees only the one before it, which keeps the work linear in the length of a conversation. It must see that
    much for tokenizers that put a space before whatever begins a text (SentencePiece): each piece would get one.
    """
    ids: list[int] = []
    bears_loss: list[bool] = []
    previous = ""
    for text, loss in pieces:
        if not text:
            continue
        head, joined = _ids(previous, tokenizer), _ids(previous + text, tokenizer)
        new = joined[len(head) :] if joined[: len(head)] == head else _ids(text, tokenizer)
        ids += new
        bears_loss += [loss] * len(new)
        previous = text
    return ids, bears_loss


def _add_special_tokens(
    ids: list[int], bears_loss: list[bool], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """bos where the tokenizer itself begins a text with one, and eos, which bears loss when anything does."""
    bos = tokenizer.bos_token_id
    # Asked by example: settings such as add_bos_token do not exist for every tokenizer, nor always tell the truth.
    begins: list[int] = tokenizer("a", verbose=False)["input_ids"][:1]  # pyright: ignore
    if bos is not None and begins == [bos] and ids[:1] != [bos]:
        ids, bears_loss = [bos, *ids], [False, *bears_loss]  # pyright: ignore[reportAssignmentType]
    eos = _eos(tokenizer)
    if ids[-1:] != [eos] or len(ids) == 1:
        ids, bears_loss = [*ids, eos], [*bears_loss, any(bears_loss)]
    return ids, bears_loss
