"""Hugging Face's architectures, tiny and random: the hidden states explain the logits, and scores are those of the model's own logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import transformers
from composer.models import HuggingFaceModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from trunk_scores import V, logits_alone, make_batch, projection, rows_of, score

from udsstream.mosaicml.trunk import ModelParts, choose_form, neutral

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # by each of the names that configurations have for the same
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 32),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp", "shared_intermediate_size"], 48
    ),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    "word_embed_proj_dim": 32,
    # mixtures of experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_experts_per_tok", "interleave_moe_layer_step"], 2),
    # state spaces
    **dict.fromkeys(["state_size", "mamba_d_state"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "use_mamba_kernels": False,
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {
        "head_dim": None,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
    "mamba2": {"num_heads": 8, "head_dim": 8, "chunk_size": 8},
}
SLICED = {"gemma2", "gemma3n_text"}
"""Their logits are capped: no longer linear in the hidden states."""

TEXT = [
    *("arcee", "bamba", "bitnet", "bloom", "codegen", "cohere", "cohere2", "dbrx", "deepseek_v3", "diffllama"),
    *("falcon", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "helium"),
    *("jamba", "llama", "llama4_text", "mamba", "mamba2", "minimax", "mistral", "mixtral", "mpt", "nemotron", "olmo"),
    *("olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("rwkv", "smollm3", "stablelm", "starcoder2", "xglm"),
]


def from_text(name: str) -> PreTrainedModel:
    try:
        cls = type(AutoConfig.for_model(name))
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    known = inspect.signature(cls.__init__).parameters
    config = cls(**{key: value for key, value in (SIZES | OWN.get(name, {})).items() if key in known})
    return AutoModelForCausalLM.from_config(config)


def with_images(model: str, config: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    """A model that could look at images, and is trained on text."""
    if not hasattr(transformers, model):
        return lambda: pytest.skip(f"transformers {transformers.__version__} has no {model}")
    text = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "pad_token_id")}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

    def build() -> PreTrainedModel:
        towers: dict[str, Any] = {"text_config": text, "vision_config": vision | {"image_size": 28, "patch_size": 14}}
        if config == "LlavaConfig":
            towers["text_config"] = transformers.LlamaConfig(**text)
            towers["vision_config"] = transformers.CLIPVisionConfig(**towers["vision_config"])
        made: PretrainedConfig = getattr(transformers, config)(**towers, **settings)
        return getattr(transformers, model)(made)

    return build


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: lambda name=name: from_text(name) for name in TEXT},
    "gemma3 with its images' tower": with_images(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        mm_tokens_per_image=4,
        boi_token_index=94,
        eoi_token_index=95,
        image_token_index=96,
    ),
    "llava": with_images("LlavaForConditionalGeneration", "LlavaConfig", image_token_index=96),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_models_own_logits(name):
    """Whatever stands beside a candidate, on either side of its padding."""
    torch.manual_seed(1)
    model = HuggingFaceModel(MODELS[name](), use_logits=True)
    for parameter in model.parameters():
        parameter.data = parameter.data * (3 if parameter.ndim == 2 else 1)  # lively logits
    model.train()
    parts = ModelParts(model)
    with neutral(model):
        form = choose_form(parts, make_batch([30, 12]))
    assert form.form == ("vocabulary_slices" if name in SLICED else "hidden_space")
    gamma1, gamma2 = oracles.gamma(projection().vocabulary), oracles.gamma(projection().tokens)
    lengths = [7, 33, 3, 12]
    for side in ("right", "left"):
        batch = make_batch(lengths, side=side, spare=3)
        intra, embeddings = score(model, parts, batch, form=form)
        for row in range(len(lengths)):
            matrix = logits_alone(model, rows_of(batch, [row]), 0)
            assert oracles.relative_error(intra[row], oracles.nuclear_norm(matrix)) < 3e-5
            assert oracles.relative_error(embeddings[row], oracles.embedding(matrix, gamma1, gamma2)) < 3e-5
