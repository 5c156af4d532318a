"""Exact match of generated answers with those of held-out data: `answers.json` in a run's folder.

The trained model is asked the prompts of the first held-out samples and writes on greedily; what it says is right when its final answer
is, to the letter, that of the sample's own response. Losses can agree where this differs: it is what users of such data ask for.

Written down are ids, numbers and their counts, never text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from udsstream.compare.config import AnswersConfig
from udsstream.compare.results import ANSWERS
from udsstream.errors import DataError, ResumeError
from udsstream.run_config import RunConfig
from udsstream.run_folder import SUMMARY, write_atomically

__all__ = ["answer_run", "answers_are_there", "final_number", "generate", "split_at_response"]

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> str | None:
    """The answer of a text in GSM8K's form: the first number after the last `####`, without commas and currency signs.

    "6 + 3 = 9 dollars\\n#### 9" → "9"; "#### $1,200.50" → "1200.50"; None where there is no mark, or no number behind it on its line.
    (The form of GSM8K: Cobbe et al. 2021, arXiv 2110.14168; a response ends with "#### 72".)
    """
    _, mark, after = text.rpartition("####")
    if not mark:
        return None
    line = after.lstrip().partition("\n")[0]
    found = _NUMBER.search(re.sub(r"[$€£]", "", line))
    return found[0].replace(",", "") if found else None


def answers_are_there(folder: Path, settings: AnswersConfig) -> bool:
    """Whether this run's answers were generated already, with these settings."""
    path = folder / ANSWERS
    try:
        recorded = json.loads(path.read_text())["settings"] if path.exists() else None
    except (ValueError, KeyError, TypeError):
        return False
    return recorded == _recorded(settings)


def _recorded(settings: AnswersConfig) -> dict[str, Any]:
    return settings.model_dump(exclude={"batch_size"})


def split_at_response(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The prompt's tokens and those of the last response, from one row's tokens and labels (−100: no loss)."""
    end = max((i for i, label in enumerate(labels) if label != -100), default=-1) + 1
    begin = end
    while begin > 0 and labels[begin - 1] != -100:
        begin -= 1
    return list(input_ids[:begin]), list(input_ids[begin:end])


def answer_run(config: RunConfig, settings: AnswersConfig) -> float:
    """Generates a finished run's answers, writes `answers.json`, and returns the share that matches.

    Raises:
        DataError: the held-out data has no sample with a prompt and a final number.
        ResumeError: the run kept no checkpoint of its end.
    """
    from udsstream.pipeline import join_ranks
    from udsstream.sft import tokenize

    device = join_ranks(config.device)
    folder = Path(config.save_folder)
    model = _model_at_its_end(config, folder)
    tokenizer: Any = model.tokenizer
    ids, prompts, expected = [], [], []
    for row in _rows(config, settings.samples):
        tokens = tokenize(
            row,
            tokenizer,
            max_seq_len=1 << 30,  # only the prompt is used
            **config.data.row_form(),
        )
        prompt, response = split_at_response(tokens["input_ids"], tokens["labels"])
        answer = final_number(tokenizer.decode(response, skip_special_tokens=True))
        if len(prompt) < 2 or answer is None:
            raise DataError(
                f"answers.kind={settings.kind!r}: held-out sample {row['sample_id']} has no "
                + ("prompt to answer" if answer else "number after '####' in its response")
                + "; leave answers out, or give held-out data of that form"
            )
        ids.append(int(row["sample_id"]))
        prompts.append(prompt)
        expected.append(answer)
    texts = generate(
        model.model,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        device="cuda" if device == "gpu" else device,
    )
    found = [final_number(text) for text in texts]
    correct = [own == other for own, other in zip(found, expected, strict=True)]
    accuracy = sum(correct) / len(correct)
    value = {
        "settings": _recorded(settings),
        "accuracy": accuracy,
        "correct": sum(correct),
        "without_answer": found.count(None),
        "answers": [
            {"sample_id": sample, "expected": right, "found": own}
            for sample, right, own in zip(ids, expected, found, strict=True)
        ],
    }
    write_atomically(folder / ANSWERS, json.dumps(value, indent=1) + "\n")
    return accuracy


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[str]:
    """What the model writes on after each prompt, greedily, without special tokens; texts in the prompts' order.

    Prompts are padded on the left, so that all of a batch go on at once; they are taken by length, so that little is padded.
    """
    from transformers.generation.configuration_utils import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=_ends(model, tokenizer)
    )
    model = model.to(device).eval()
    # In the place of the model's own, which may sample or punish repetition: if it were only given to `generate`, transformers would
    # fill it up from them.
    own, model.generation_config = model.generation_config, how
    try:
        return _generate(model, tokenizer, prompts, pad, batch_size, device)
    finally:
        model.generation_config = own


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], pad: int, batch_size: int, device: str
) -> list[str]:
    import torch

    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        numbers = by_length[start : start + batch_size]
        width = max(len(prompts[i]) for i in numbers)
        ids = torch.full((len(numbers), width), pad)
        mask = torch.zeros(len(numbers), width, dtype=torch.int64)
        for row, i in enumerate(numbers):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode():
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        for row, i in enumerate(numbers):
            texts[i] = tokenizer.decode(out[row, width:], skip_special_tokens=True)
    return texts


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's and those that the model names."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})


def _rows(config: RunConfig, samples: int) -> list[dict[str, Any]]:
    from udsstream.mosaicml.dataset import UDSStreamingDataset

    held_out = config.eval
    if held_out is None:
        raise DataError("answers: they are asked of the held-out data, but eval names none")
    dataset = UDSStreamingDataset(
        local=held_out.local, remote=held_out.remote, split=held_out.split, batch_size=1, shuffle=False
    )
    return [dataset.get_item(number) for number in range(min(samples, dataset.num_samples))]


def _model_at_its_end(config: RunConfig, folder: Path) -> Any:
    from udsstream.mosaicml.checkpoint import checkpoints_in
    from udsstream.trained_model import load_trained_model

    last = json.loads((folder / SUMMARY).read_text())["batches"]
    if last not in checkpoints_in(folder / "checkpoints"):
        raise ResumeError(
            f"{folder} has no checkpoint of step {last}, its end, so that its model cannot be asked for answers; remove the folder to "
            "train it again, or leave answers out"
        )
    return load_trained_model(config, folder, step=last)
