"""Hidden states, forms, and neutrality with tiny random models of several architectures inside Composer models.

B rows, N columns, D hidden width, V vocabulary
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import re

import numpy as np
import oracles
import pytest
import torch
from composer.models import ComposerModel, HuggingFaceModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trunk_scores import LONGEST, V, logits_alone, make_batch, rows_of, score

from udsstream.errors import ModelError
from udsstream.mosaicml.trunk import ModelParts, ScoringForm, choose_form, neutral
from udsstream.scoring.projection import BilinearProjection

D = 32
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attention_dropout": 0.3,
    "attn_implementation": "eager",
}


def _llama(**more):
    return LlamaForCausalLM(LlamaConfig(**COMMON, **more))


def _gemma2():
    model = Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=4.0))
    model.lm_head.weight.data *= 40  # logits far beyond the cap (tied: the embeddings too)
    return model


def _lora(*targets: str, trainable: bool = True, **more):
    model = get_peft_model(_llama(), LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.3, **more))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)  # zero at first: then the adapter would make no difference
        if not trainable:
            parameter.requires_grad_(False)
    return model


def _save_head():
    return get_peft_model(_llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


class Plain(ComposerModel):
    """A user's own model: GRU trunk, biased head with a name that nobody guesses, logits as a bare tensor."""

    def __init__(self, returns: str = "logits") -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.recur = nn.GRU(D, D, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.readout = nn.Linear(D, V)
        self.returns = returns

    def forward(self, batch):
        hidden = self.drop(self.recur(self.embed(batch["input_ids"]))[0])
        logits = self.readout(hidden)
        if self.returns == "functional":
            return nn.functional.linear(hidden, self.readout.weight, self.readout.bias)
        if self.returns == "loss":
            return logits.mean()
        if self.returns == "one of two predictions":
            return self.readout(torch.stack([hidden, hidden.flip(-1)], 1))[:, 0]
        if self.returns == "tuple":
            return torch.zeros(()), logits
        return logits**2 if self.returns == "squared" else logits

    def loss(self, outputs, batch):
        return outputs.mean()


BUILD = {
    "llama": _llama,
    "llama tied": lambda: _llama(tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=64)),
    "gemma2": _gemma2,
    "cohere": lambda: CohereForCausalLM(CohereConfig(**COMMON, logit_scale=0.0625)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**COMMON, logits_scaling=8.0)),
    "lora": lambda: _lora("q_proj", "v_proj"),
    "lora on the head": lambda: _lora("q_proj", "lm_head"),
    "lora on the frozen head": lambda: _lora("q_proj", "lm_head", trainable=False),
    "head trained beside lora": _save_head,
    "plain": Plain,
}
EXPECTED_FORM = {
    "gemma2": ("vocabulary_slices", 1.0, 4.0),
    "cohere": ("hidden_space", 0.0625, None),
    "granite": ("hidden_space", 1 / 8, None),
}


def build(name: str) -> tuple[ComposerModel, ModelParts]:
    """A Composer model in training mode and its parts."""
    torch.manual_seed(1)
    inner = BUILD[name]()
    model = inner if isinstance(inner, ComposerModel) else HuggingFaceModel(inner, use_logits=True)
    for parameter in model.parameters():
        parameter.data = parameter.data * (3 if parameter.ndim > 1 and name != "gemma2" else 1)  # lively logits
    model.train()
    return model, ModelParts(model, head="readout" if isinstance(inner, Plain) else None)


@pytest.fixture(scope="module", params=list(BUILD))
def case(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param, *build(request.param)
    torch.set_num_threads(threads)


def head_calls(module: nn.Module):
    """Counts finished calls of a module."""
    calls = []
    return calls, module.register_forward_hook(lambda *_: calls.append(1))


# Hidden states and forms ---------------------------------------------------------------------------------------------------


def test_hidden_states_are_what_the_head_makes_logits_of(case):
    name, model, parts = case
    batch = make_batch([7, 12, 3])
    with neutral(model):
        hidden = parts.hidden_states(batch)
        hidden_too, logits = parts.hidden_states_and_logits(batch)
        remade = parts.head_module(hidden)
    assert hidden.shape == (3, 12, D)
    assert not hidden.requires_grad
    assert torch.equal(hidden, hidden_too)
    _, scale, cap = EXPECTED_FORM.get(name, (None, 1.0, None))
    remade = remade * scale
    torch.testing.assert_close(remade if cap is None else cap * torch.tanh(remade / cap), logits)


@pytest.mark.parametrize("name", [name for name in BUILD if name != "plain"])
def test_the_hidden_states_of_hugging_face_models_are_their_last(name):
    model, parts = build(name)
    batch = make_batch([7, 12, 3], labels=False)
    with neutral(model):
        expected = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[-1]
        torch.testing.assert_close(parts.hidden_states(batch), expected)


def test_the_head_is_not_run_for_hidden_states(case):
    _, model, parts = case
    calls, handle = head_calls(parts.head_module)
    with handle, neutral(model):
        parts.hidden_states(make_batch([5, 6]))
        assert calls == []
        parts.hidden_states_and_logits(make_batch([5, 6]))
        assert calls == [1]


def test_the_form_is_found_and_named(case, caplog):
    name, model, parts = case
    with caplog.at_level(logging.WARNING), neutral(model):
        form = choose_form(parts, make_batch([30, 12]))
    kind, scale, cap = EXPECTED_FORM.get(name, ("hidden_space", 1.0, None))
    assert (form.form, form.softcap) == (kind, cap)
    assert form.scale == pytest.approx(scale)
    assert form.relative_error is not None
    assert form.relative_error < 1e-5
    assert re.match(rf"{kind} \(.*differs from the model's logits by \d\.\de[-+]\d+ relative\)", str(form))
    assert ("soft cap 4" in str(form)) == (cap is not None)
    assert ("logit scale" in str(form)) == (scale != 1)
    assert not [record for record in caplog.records if record.name.startswith("udsstream")]


def test_the_soft_cap_matters_in_these_tests():
    model, parts = build("gemma2")
    with neutral(model):
        hidden, logits = parts.hidden_states_and_logits(make_batch([30]))
        raw = parts.head_module(hidden)
    assert (raw.abs() > 8).float().mean() > 0.2
    assert logits.abs().max() <= 4


def test_scores_are_those_of_the_models_own_logits(case):
    _, model, parts = case
    batch = make_batch([7, 33, 1, 12], side="left", spare=3)
    intra, embeddings = score(model, parts, batch)
    projection = BilinearProjection.draw(vocab_size=V, max_seq_len=LONGEST, dims=(8, 4), scale="isometric", seed=1)
    gamma1, gamma2 = oracles.gamma(projection.vocabulary), oracles.gamma(projection.tokens)
    for row in range(4):
        matrix = logits_alone(model, batch, row)
        assert oracles.relative_error(intra[row], oracles.nuclear_norm(matrix)) < 1e-5
        assert oracles.relative_error(embeddings[row], oracles.embedding(matrix, gamma1, gamma2)) < 1e-5


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    spare=st.integers(0, 9),
    max_tokens=st.sampled_from([1, 50, 10_000]),
    data=st.data(),
)
def test_a_score_does_not_depend_on_padding_or_on_the_batch(case, lengths, side, spare, max_tokens, data):
    name, model, parts = case
    order = data.draw(st.permutations(range(len(lengths))))
    form = _form(name, model, parts)
    alone = [score(model, parts, rows_of(make_batch(lengths), [row]), form=form) for row in range(len(lengths))]
    batch = rows_of(make_batch(lengths, side=side, spare=spare), list(order))
    intra, embeddings = score(model, parts, batch, max_tokens=max_tokens, form=form)
    for place, row in enumerate(order):
        assert oracles.relative_error(intra[place], alone[row][0][0]) <= 1e-5
        assert oracles.relative_error(embeddings[place], alone[row][1][0]) <= 1e-5


_FORMS: dict[str, ScoringForm] = {}


def _form(name, model, parts) -> ScoringForm:
    if name not in _FORMS:
        with neutral(model):
            _FORMS[name] = choose_form(parts, make_batch([30]))
    return _FORMS[name]


# Heads that change, or that no formula fits ---------------------------------------------------------------------------------


def test_the_version_of_a_frozen_head_changes_with_its_weight_in_place():
    _, parts = build("lora on the frozen head")
    version = parts.head_version()
    assert version is not None
    assert parts.head_version() == version
    adapter = parts.head_module.lora_B["default"].weight
    with torch.no_grad():
        adapter.add_(1)
    assert parts.head_version() != version
    version = parts.head_version()
    with torch.no_grad():
        parts.head_module.base_layer.weight.mul_(2)
    assert parts.head_version() != version


@pytest.mark.parametrize("name", ["llama", "llama tied", "plain", "lora on the head"])
def test_a_head_that_trains_has_no_version_so_it_is_read_anew(name):
    _, parts = build(name)
    assert parts.head_version() is None


def test_scores_follow_an_optimizer_step():
    model, parts = build("plain")
    batch = make_batch([7, 12])
    before, _ = score(model, parts, batch)
    model(batch).square().mean().backward()
    torch.optim.SGD(parts.head_module.parameters(), lr=1.0).step()
    after, _ = score(model, parts, batch)
    assert oracles.relative_error(after, before) > 1e-3
    for row in range(2):
        assert oracles.relative_error(after[row], oracles.nuclear_norm(logits_alone(model, batch, row))) < 1e-5


def test_the_adapter_of_the_head_is_part_of_its_weight():
    _, parts = build("lora on the head")
    bare = parts.head_module.base_layer.weight
    weight = parts.head(ScoringForm(form="hidden_space")).weight_rows(slice(None))
    assert oracles.relative_error(weight, bare) > 0.01
    a, b = (getattr(parts.head_module, side)["default"].weight for side in ("lora_A", "lora_B"))
    torch.testing.assert_close(weight, bare + parts.head_module.scaling["default"] * b @ a)


ON_THE_HEAD = {
    "LoRA": (LoraConfig(r=4), "hidden_space"),
    "AdaLoRA": (AdaLoraConfig(init_r=4, total_step=10), "hidden_space"),
    "DoRA": (LoraConfig(r=4, use_dora=True), "logits"),
    "LoRA with a bias": (LoraConfig(r=4, lora_bias=True), "logits"),
    "LoHa": (LoHaConfig(r=4), "logits"),
    "LoKr": (LoKrConfig(r=4), "logits"),
    "OFT": (OFTConfig(r=0, oft_block_size=8), "logits"),
    "HRA": (HRAConfig(r=4), "logits"),
    "VeRA": (VeraConfig(r=4), "logits"),
    "IA3": (IA3Config(feedforward_modules=[]), "logits"),
}


@pytest.mark.parametrize("kind", ON_THE_HEAD)
def test_adapters_of_any_kind_count_once_they_have_been_trained(kind):
    """A new one changes nothing, and the form is chosen then."""
    config, form_expected = ON_THE_HEAD[kind]
    config = copy.deepcopy(config)
    config.target_modules = {"lm_head"}
    torch.manual_seed(1)
    model = HuggingFaceModel(get_peft_model(_llama(), config), use_logits=True)
    parts, batch = ModelParts(model), make_batch([7, 12])
    with neutral(model):
        form = choose_form(parts, make_batch([30]))
    assert form.form == form_expected
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    intra, _ = score(model, parts, batch, form=form)
    for row in range(2):
        assert oracles.relative_error(intra[row], oracles.nuclear_norm(logits_alone(model, batch, row))) < 1e-5


def test_virtual_tokens_are_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = HuggingFaceModel(get_peft_model(_llama(), config), use_logits=True)
    with neutral(model), pytest.raises(ModelError, match=r"makes 35 logits of 30 tokens.*virtual tokens"):
        choose_form(ModelParts(model), make_batch([30], labels=False))


def test_an_encoder_with_a_decoder_is_refused():
    config = T5Config(vocab_size=V, d_model=D, num_layers=1, num_heads=2, d_kv=8, d_ff=32, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="T5Config is of an encoder-decoder model"):
        ModelParts(T5ForConditionalGeneration(config))


def test_merged_and_disabled_adapters_of_the_head_are_not_added():
    model, parts = build("lora on the head")
    layer, form = parts.head_module, ScoringForm(form="hidden_space")
    effective = parts.head(form).weight_rows(slice(None)).detach().clone()
    layer.merge()
    torch.testing.assert_close(parts.head(form).weight_rows(slice(None)), effective)
    layer.unmerge()
    with model.model.disable_adapter():
        torch.testing.assert_close(parts.head(form).weight_rows(slice(None)), layer.base_layer.weight)
    torch.testing.assert_close(parts.head(form).weight_rows(slice(None)), effective)


def test_a_head_trained_beside_lora():
    """peft's `modules_to_save` wraps the head: its copy is the one that counts, unless adapters are switched off."""
    model, parts = build("head trained beside lora")
    with torch.no_grad():
        parts.head_module.modules_to_save["default"].weight.mul_(2)
    form, batch = ScoringForm(form="hidden_space"), make_batch([7, 12])
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            intra, _ = score(model, parts, batch, form=form)
            for row in range(2):
                assert oracles.relative_error(intra[row], oracles.nuclear_norm(logits_alone(model, batch, row))) < 1e-5
            stack.enter_context(model.model.disable_adapter())
    assert "lm_head" in next(name for name, module in model.named_modules() if module is parts.head_module)


def test_switching_an_adapter_changes_the_version():
    _, parts = build("lora on the frozen head")
    layer, seen = parts.head_module, []
    seen.append(parts.head_version())
    layer.set_scale("default", 0.5)
    seen.append(parts.head_version())
    layer.set_scale("default", 1.0)
    assert parts.head_version() == seen[0]
    layer._disable_adapters = True
    seen.append(parts.head_version())
    layer._disable_adapters = False
    layer.merge()
    seen.append(parts.head_version())
    assert len(set(seen)) == 4


@pytest.mark.parametrize("returns", ["squared", "one of two predictions"])
def test_logits_that_no_formula_explains_are_scored_themselves(caplog, returns):
    model = Plain(returns)
    parts = ModelParts(model, head="readout")
    with caplog.at_level(logging.WARNING), neutral(model):
        form = choose_form(parts, make_batch([30]))
    assert form.form == "logits"
    assert "the closest formula differs by" in caplog.text
    assert "name it with head=" in caplog.text
    batch = make_batch([7, 12])
    intra, _ = score(model, parts, batch, form=form)
    for row in range(2):
        assert oracles.relative_error(intra[row], oracles.nuclear_norm(logits_alone(model, batch, row))) < 1e-5


def test_a_model_that_shows_no_logits_is_taken_at_its_word(caplog):
    model = Plain("loss")
    with caplog.at_level(logging.WARNING), neutral(model):
        form = choose_form(ModelParts(model, head="readout"), make_batch([30]))
    assert (form.form, form.relative_error) == ("hidden_space", None)
    assert "not compared with the model's logits" in str(form)
    assert "returns no logits" in caplog.text


def test_logits_in_a_tuple_are_found():
    model = Plain("tuple")
    with neutral(model):
        form = choose_form(ModelParts(model, head="readout"), make_batch([30]))
    assert form.form == "hidden_space"
    assert form.relative_error < 1e-5


def test_trunk_names_a_module_whose_output_is_taken():
    model = Plain("functional")
    reference = ModelParts(Plain(), head="readout")
    reference.model.load_state_dict(model.state_dict())
    parts = ModelParts(model, head="readout", trunk="recur")
    batch = make_batch([7, 12])
    with neutral(model), neutral(reference.model):
        torch.testing.assert_close(parts.hidden_states(batch), reference.hidden_states(batch))
        form = choose_form(parts, make_batch([30]))
    assert (form.form, form.relative_error < 1e-5) == ("hidden_space", True)
    llama, _ = build("llama")
    named = ModelParts(llama, trunk="model.model")  # its output is a Hugging Face mapping
    with neutral(llama):
        torch.testing.assert_close(named.hidden_states(batch), ModelParts(llama).hidden_states(batch))


# Errors -----------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_head_says_what_was_looked_for():
    with pytest.raises(
        ModelError,
        match=r"no language-model head was found in Plain: none of its modules has a get_output_embeddings\(\).*"
        r"head=; the widest nn.Linear modules are: readout \(32 → 97\)",
    ):
        ModelParts(Plain())
    with pytest.raises(ModelError, match=r"are: none"):
        ModelParts(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("role", ["head", "trunk"])
def test_a_wrong_name_says_what_there_is(role):
    with pytest.raises(
        ModelError,
        match=rf"{role}='nowhere' names no module of Plain; at its top level it has embed, recur, drop, readout",
    ):
        ModelParts(Plain(), **{"head": "readout"} | {role: "nowhere"})


def test_a_head_that_is_never_called_is_an_error():
    parts = ModelParts(Plain("functional"), head="drop", trunk="readout")
    del parts.model.returns
    parts.model.forward = lambda batch: batch["input_ids"].float()
    with pytest.raises(ModelError, match=r"without calling its trunk \(Linear\) as a module.*trunk="):
        parts.hidden_states(make_batch([3]))


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (
            nn.Sequential(nn.Linear(D, V)),
            r"is a torch.nn.modules.container.Sequential \(no weight\), but only an nn.Linear",
        ),
        (nn.Conv1d(D, V, 1), r"Conv1d \(torch.float32 \(97, 32, 1\)\)"),
    ],
)
def test_a_head_of_another_kind_is_refused_or_scored_from_logits(head, text):
    model = Plain("loss")
    model.readout = head
    parts = ModelParts(model, head="readout")
    with pytest.raises(ModelError, match=text):
        parts.head(ScoringForm(form="hidden_space"))
    with pytest.raises(ModelError, match=r"without a weight matrix \(V, D\), so its vocabulary size is unknown"):
        _ = parts.vocab_size


def test_an_unreadable_head_of_a_model_that_shows_logits_is_scored_from_them(caplog):
    model = Plain()
    model.readout = nn.Sequential(nn.Linear(D, V), nn.Identity())
    with caplog.at_level(logging.WARNING), neutral(model):
        form = choose_form(ModelParts(model, head="readout"), make_batch([30]))
    assert form.form == "logits"
    assert "Candidates are scored from the model's own logits" in caplog.text


def test_an_unreadable_head_of_a_model_that_shows_no_logits_is_an_error():
    model = Plain("loss")
    model.readout = nn.Sequential(nn.Linear(D, V))
    with pytest.raises(ModelError, match=r"Sequential"), neutral(model):
        choose_form(ModelParts(model, head="readout"), make_batch([30]))


# A head that is the input embedding too (llm-foundry's MPT) ---------------------------------------------------------------


class SharedEmbedding(nn.Embedding):
    """Embeds tokens, and makes logits of hidden states when told to."""

    def forward(self, input, unembed=False):
        return nn.functional.linear(input, self.weight) if unembed else super().forward(input)


class SharedHead(ComposerModel):
    """One module at both ends, a scale that the configuration gives by name and the model as a number, a soft cap."""

    class Config:
        logit_scale = "inv_sqrt_d_model"
        final_logit_softcapping = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Config()
        self.logit_scale = D**-0.5
        self.wte = SharedEmbedding(V, D)
        self.recur = nn.GRU(D, D, batch_first=True)
        self.drop = nn.Dropout(0.3)

    def get_output_embeddings(self):
        return self.wte

    def forward(self, batch):
        hidden = self.drop(self.recur(self.wte(batch["input_ids"]))[0])
        return 5.0 * torch.tanh(self.wte(hidden, True) * self.logit_scale / 5.0)

    def loss(self, outputs, batch):
        return outputs.mean()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_head_that_embeds_the_tokens_too(side):
    torch.manual_seed(1)
    model = SharedHead()
    model.wte.weight.data *= 6
    model.train()
    parts = ModelParts(model)
    batch = make_batch([7, 33, 1, 12], side=side, spare=3)
    with neutral(model):
        form = choose_form(parts, make_batch([30, 12]))
        hidden = parts.hidden_states(batch)
    assert hidden.shape == (4, 36, D)
    assert (form.form, form.softcap) == ("vocabulary_slices", 5.0)
    assert form.scale == pytest.approx(D**-0.5)
    assert form.relative_error is not None
    assert form.relative_error < 1e-5
    intra, _ = score(model, parts, batch)
    for row in range(4):
        assert oracles.relative_error(intra[row], oracles.nuclear_norm(logits_alone(model, batch, row))) < 1e-5


def test_the_vocabulary_size(case):
    assert case[2].vocab_size == V


# Neutrality -------------------------------------------------------------------------------------------------------------


def generators():
    return (
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        torch.random.get_rng_state().tolist(),
    )


def hooks(model) -> int:
    return sum(
        len(getattr(module, table))
        for module in model.modules()
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    )


def everything(model, batch):
    """A deep copy of all that scoring must leave alone."""
    return copy.deepcopy(
        {
            "modes": {name: module.training for name, module in model.named_modules()},
            "parameters": {name: parameter.detach() for name, parameter in model.named_parameters()},
            "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "batch": batch,
            "generators": generators(),
            "hooks": hooks(model),
            "grad mode": torch.is_grad_enabled(),
        }
    )


def same(found, expected, path="") -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def loss_of(model, batch):
    output = model(batch)
    return output.square().mean() if isinstance(output, torch.Tensor) else output["loss"]


def test_scoring_leaves_everything_as_it_was(case):
    _, model, parts = case
    batch = make_batch([7, 12, 3], side="left")
    model.train()
    quiet = next(module for module in model.modules() if isinstance(module, (nn.Embedding, nn.Dropout)))
    quiet.eval()  # a user's frozen part stays in eval mode
    if any(parameter.requires_grad for parameter in model.parameters()):
        loss_of(model, batch).backward()
    before = everything(model, batch)
    score(model, parts, batch)
    same(everything(model, batch), before)
    assert not quiet.training
    model.zero_grad()
    model.train()


def test_dropout_is_off_while_scoring_and_on_afterwards(case):
    name, model, parts = case
    batch = make_batch([12, 12])
    first, second = score(model, parts, batch)[0], score(model, parts, batch)[0]
    assert torch.equal(first, second)
    with torch.no_grad():
        assert float(loss_of(model, batch)) != float(loss_of(model, batch)), name


@pytest.mark.parametrize("name", [name for name in BUILD if name != "lora on the frozen head"])
def test_training_after_scoring_is_bit_for_bit_training_without(name):
    def train(*, scored: bool):
        model, parts = build(name)
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            batch = make_batch([7, 12], seed=step)
            if scored:
                score(model, parts, batch)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    same(train(scored=True), train(scored=False))


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_a_forward_that_raises_leaves_no_hook_and_no_mode_behind(name):
    model, parts = build(name)
    batch = make_batch([5, 6])
    before = everything(model, batch)
    victim = model.recur if name == "plain" else model.model.model.layers[1]

    def raise_broken(*_):
        random.random()
        np.random.rand()
        torch.rand(1)
        raise Broken

    for call in (parts.hidden_states, parts.hidden_states_and_logits):
        with contextlib.ExitStack() as stack:
            stack.enter_context(victim.register_forward_pre_hook(raise_broken))
            stack.enter_context(pytest.raises(Broken))
            stack.enter_context(neutral(model))
            call(batch)
        same(everything(model, batch), before)


def test_the_neutrality_checks_can_fail():
    model, _ = build("plain")
    batch = make_batch([5, 6])
    for disturb in (
        lambda: model.drop.eval(),
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: torch.rand(1),
        lambda: batch["input_ids"].add_(1),
        lambda: model.readout.register_forward_hook(print),
        lambda: loss_of(model, batch).backward(),
    ):
        before = everything(model, batch)
        disturb()
        with pytest.raises(AssertionError):
            same(everything(model, batch), before)


def test_no_cache_is_filled():
    model, parts = build("llama")
    caches = []
    with (
        model.model.model.register_forward_hook(lambda _module, _args, output: caches.append(output.past_key_values)),
        neutral(model),
    ):
        parts.hidden_states(make_batch([5, 6]))
    assert caches == [None]
