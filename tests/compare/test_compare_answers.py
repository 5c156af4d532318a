"""Exact match of answers: the number of a text, what a model says greedily, and models that learned an answer or did not."""

from __future__ import annotations

import json
from pathlib import Path

import jobs
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from udsstream import pipeline
from udsstream.compare.answers import answer_run, answers_are_there, final_number, generate, split_at_response
from udsstream.compare.config import AnswersConfig
from udsstream.errors import DataError, ResumeError
from udsstream.run_config import RunConfig, parse_run_config


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 / 2 = <<48/2=24>>24\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,200.50 in all", "1200.50"),
        ("#### -5.", "-5"),
        ("####18", "18"),
        ("####\n72", "72"),
        ("#### 3\nno, wait\n#### 4", "4"),
        ("#### about 3 or 4", "3"),
        ("#### .5", ".5"),
        ("the answer is 72", None),
        ("#### none\n72", None),
        ("####", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_a_row_is_split_before_its_last_response():
    assert split_at_response([5, 6, 7, 8], [-100, -100, 7, 8]) == ([5, 6], [7, 8])
    # Two turns, with a token of the template after the last one.
    assert split_at_response([1, 2, 3, 4, 5, 6], [-100, 2, -100, -100, 5, -100]) == ([1, 2, 3, 4], [5])
    assert split_at_response([1, 2], [-100, -100]) == ([], [])


# Generating ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A model that has learned nothing, with weights large enough to say different things after different prompts."""
    torch.manual_seed(3)
    folder = jobs.write_model(tmp_path_factory.mktemp("speaker"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 8.0)
    return model, AutoTokenizer.from_pretrained(folder)


PROMPTS = [[2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 12, 2, 2], [3, 3, 3, 3, 3]]


def said_by_argmax(model, tokenizer, prompt: list[int], count: int) -> str:
    """The naive reference: one prompt, no padding, no cache, the whole forward for every token."""
    ids = list(prompt)
    ends = (tokenizer.eos_token_id, model.generation_config.eos_token_id)
    with torch.inference_mode():
        for _ in range(count):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token in ends:
                break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_generation_is_greedy_and_does_not_depend_on_the_batch(speaker, batch_size):
    model, tokenizer = speaker
    expected = [said_by_argmax(model, tokenizer, prompt, 7) for prompt in PROMPTS]
    assert len(set(expected)) > 2
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=batch_size) == expected


def test_a_models_own_habits_of_sampling_are_not_followed(speaker):
    model, tokenizer = speaker
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    own = model.generation_config
    before = (own.do_sample, own.temperature, own.repetition_penalty)
    own.do_sample, own.temperature, own.repetition_penalty = True, 5.0, 9.0
    try:
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=5) == expected
    finally:
        own.do_sample, own.temperature, own.repetition_penalty = before


# Trained models -----------------------------------------------------------------------------------------------------

SUMS = [("what is two and two", "say it #### 4"), ("the cat sat on the mat", "a dog #### 1234")]


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    """A model whose tokenizer knows the answers' tokens, and streams of two questions."""
    root = tmp_path_factory.mktemp("sums")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "SENTENCES", [*jobs.SENTENCES, *(response for _, response in SUMS)])
        torch.manual_seed(5)
        jobs.write_model(root / "model")
    rows = [{"prompt": prompt, "response": response} for prompt, response in SUMS]
    jobs.write_rows(root / "train", rows * 16)
    jobs.write_rows(root / "held_out", rows * 3)
    return root


def run_of(sums: Path, folder: Path, **changes) -> RunConfig:
    settings = {
        "save_folder": str(folder),
        "max_duration": "40ba",
        "model": {"name": str(sums / "model")},
        "data": {"streams": [{"local": str(sums / "train")}], "batch_size": 4},
        "eval": {"local": str(sums / "held_out")},
        "selection": {"method": "random", "keep": 2, "projection_dims": [8, 4]},
        "optimizer": {"lr": 1e-2},
        "max_seq_len": 32,
        "progress_bar": False,
        "device": "cpu",
    }
    return parse_run_config(settings | changes, where="test")


@pytest.mark.parametrize("lora", [None, {"r": 8, "alpha": 64}], ids=["full training", "LoRA"])
def test_a_model_that_learned_the_answers_is_right(sums, tmp_path, lora):
    learned = run_of(sums, tmp_path / "a", model={"name": str(sums / "model"), "lora": lora}, max_duration="80ba")
    pipeline.train(learned)
    settings = AnswersConfig(kind="gsm8k", samples=5, max_new_tokens=12, batch_size=2)
    assert not answers_are_there(tmp_path / "a", settings)
    assert answer_run(learned, settings) == 1.0
    value = json.loads((tmp_path / "a" / "answers.json").read_text())
    assert (value["accuracy"], value["correct"], value["without_answer"]) == (1.0, 5, 0)
    assert [answer["expected"] for answer in value["answers"]] == ["4", "1234", "4", "1234", "4"]
    assert [answer["sample_id"] for answer in value["answers"]] == [0, 1, 2, 3, 4]
    assert answers_are_there(tmp_path / "a", settings)
    assert answers_are_there(tmp_path / "a", settings.model_copy(update={"batch_size": 8}))
    assert not answers_are_there(tmp_path / "a", settings.model_copy(update={"samples": 6}))
    assert "cat" not in (tmp_path / "a" / "answers.json").read_text()  # ids and numbers, never text


def test_a_model_that_did_not_learn_them_is_not(sums, tmp_path):
    config = run_of(sums, tmp_path / "a", max_duration="1ba", optimizer={"lr": 1e-6})
    pipeline.train(config)
    assert answer_run(config, AnswersConfig(kind="gsm8k", samples=100, max_new_tokens=4)) == 0.0
    value = json.loads((tmp_path / "a" / "answers.json").read_text())
    assert len(value["answers"]) == 6  # all that there are
    assert value["without_answer"] == 6


def test_without_a_checkpoint_of_the_end_it_says_so(sums, tmp_path):
    config = run_of(sums, tmp_path / "a", max_duration="1ba")
    pipeline.train(config)
    (tmp_path / "a" / "checkpoints" / "ep0-ba1-rank0.pt").unlink()
    with pytest.raises(ResumeError, match=r"has no checkpoint of step 1, its end"):
        answer_run(config, AnswersConfig(kind="gsm8k"))


def test_weights_of_another_model_are_refused(sums, tmp_path):
    config = run_of(sums, tmp_path / "a", max_duration="1ba")
    pipeline.train(config)
    other = run_of(sums, tmp_path / "a", model={"name": str(sums / "model"), "lora": {"r": 4}})
    with pytest.raises(ResumeError, match=r"is of another model than .*config\.yaml: it lacks the weight .*lora"):
        answer_run(other, AnswersConfig(kind="gsm8k"))


def test_held_out_data_without_answers_is_refused(sums, tmp_path):
    jobs.write_rows(tmp_path / "words", [{"prompt": "say the word", "response": "the word"}])
    config = run_of(sums, tmp_path / "a", max_duration="1ba", eval={"local": str(tmp_path / "words")})
    pipeline.train(config)
    with pytest.raises(DataError, match=r"held-out sample 0 has no number after '####' in its response"):
        answer_run(config, AnswersConfig(kind="gsm8k"))
