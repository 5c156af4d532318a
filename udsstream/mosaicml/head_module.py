"""The head's module in a model: finding it, and reading what it does as a weight with updates, whatever peft has wrapped around it.

    V vocabulary, D hidden width

What is not here: whether this weight explains the model's logits (`trunk.py` checks), and what scoring does with it (`scoring/lm_head.py`).
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

from udsstream.errors import ModelError
from udsstream.mosaicml.sharding import in_rows, own_rows, version_parts, whole
from udsstream.scoring.lm_head import LMHead, LowRankUpdate

__all__ = ["find_head", "head_version", "named_module", "read_head", "vocab_size_of"]


def find_head(model: nn.Module) -> nn.Module:
    """The first `get_output_embeddings()` among the model's modules (Hugging Face); ModelError names what else it could be."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            head = getter()
            if isinstance(head, nn.Module):
                return head
    wide = sorted(
        ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)),
        key=lambda item: -item[1].out_features,
    )
    hints = ", ".join(f"{name} ({m.in_features} → {m.out_features})" for name, m in wide[:3]) or "none"
    raise ModelError(
        f"no language-model head was found in {type(model).__name__}: none of its modules has a get_output_embeddings() that returns a "
        f"module. Name the head's module with head=; the widest nn.Linear modules are: {hints}"
    )


def named_module(model: nn.Module, name: str, role: str) -> nn.Module:
    """The module with this dotted name; ModelError says what the model has instead."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children()) or "nothing"
        raise ModelError(
            f"{role}={name!r} names no module of {type(model).__name__}; at its top level it has {children}"
        ) from None


def vocab_size_of(module: nn.Module) -> int:
    """V: rows of the head's weight."""
    weight = getattr(_base_layer(module), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(
            f"the head is a {type(module).__name__} without a weight matrix (V, D), so its vocabulary size is unknown; "
            "name the module that holds it with head="
        )
    return weight.shape[0]


def head_version(module: nn.Module) -> Hashable:
    """Changes whenever the head's weight does; None when it trains, since not every optimizer announces its writes."""
    parameters = [*module.parameters(), *module.buffers()]
    if any(parameter.requires_grad for parameter in parameters):
        return None
    weights = tuple(version_parts(parameter) for parameter in parameters)
    # peft merges and switches adapters without a write that the version counters see.
    switches = ("merged_adapters", "disable_adapters", "active_adapters", "scaling")
    return weights, repr([getattr(module, switch, None) for switch in switches])


def read_head(module: nn.Module, *, scale: float = 1.0, softcap: float | None = None) -> LMHead:
    """The head as it is now, LoRA adapters included; of sharded parameters this rank's rows.

    ModelError: its weight is no matrix, or cut otherwise. With adapters on a sharded head a collective.
    """
    module = _trained_copy(module)
    base = _base_layer(module)
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if (
        not isinstance(weight, Tensor)
        or weight.ndim != 2
        or not weight.is_floating_point()
        or not (type(base) is nn.Linear or isinstance(base, nn.Embedding))
    ):
        found = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        if type(base).__module__.startswith("bitsandbytes"):
            raise ModelError(
                f"the head is quantised ({type(base).__module__}.{type(base).__name__}, {found}): its weight cannot be read as a matrix. "
                "Leave the head out of the quantisation, as transformers does unless told otherwise: "
                'BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"]).'
            )
        raise ModelError(
            f"the head is a {type(base).__module__}.{type(base).__name__} ({found}), but only an nn.Linear or nn.Embedding with a "
            "floating-point weight (V, D) can be scored in hidden space."
        )
    updates: list[LowRankUpdate] = []
    if base is not module:
        if not hasattr(module, "get_delta_weight"):
            raise ModelError(
                f"the head is adapted by a {type(module).__name__}, whose effective weight cannot be read."
            )
        for adapter in _active_adapters(module):
            if not _adds_to_the_weight(module, adapter):
                raise ModelError(
                    f"the head is adapted by {adapter!r}, a {type(module).__name__} ({type(module).__module__}) that does more than add a "
                    "low-rank product to its weight, as DoRA, LoHa, OFT and others do."
                )
            update = _low_rank_update(module, adapter, weight)
            if update is not None:
                updates.append(update)
            else:
                delta: Tensor = module.get_delta_weight(adapter)  # pyright: ignore[reportCallIssue]
                weight = weight + in_rows(delta.to(weight.dtype), weight)
    rows, shard = own_rows(weight)
    return LMHead(
        weight=rows,
        bias=None if bias is None else own_rows(bias)[0],
        scale=scale,
        softcap=softcap,
        shard=shard,
        updates=tuple(updates),
    )


def _adds_to_the_weight(module: nn.Module, adapter: str) -> bool:
    """Whether it is LoRA or AdaLoRA and nothing else. A new adapter of any kind changes nothing yet, so that the logits do not tell."""
    lora_a, lora_b = (getattr(module, name, {}) for name in ("lora_A", "lora_B"))
    if adapter not in lora_a or getattr(module, "use_dora", {}).get(adapter):
        return False
    up = lora_b[adapter]
    return isinstance(up, Tensor) or (type(up) is nn.Linear and up.bias is None)


def _low_rank_update(module: nn.Module, adapter: str, weight: Tensor) -> LowRankUpdate | None:
    """What an adapter adds to the weight, by its factors; None where these are no plain linear maps (AdaLoRA, transposed weights).

    peft's own `get_delta_weight` builds V×D, and of half precision on a CPU it writes the factors anew.
    """
    lora_a, lora_b = (getattr(module, name, {}) for name in ("lora_A", "lora_B"))
    if type(lora_a[adapter]) is not nn.Linear or type(lora_b[adapter]) is not nn.Linear:
        return None
    if getattr(module, "fan_in_fan_out", False):
        return None
    up = own_rows(in_rows(lora_b[adapter].weight, weight))[0]
    return LowRankUpdate(up=up, down=whole(lora_a[adapter].weight), scale=float(module.scaling[adapter]))  # pyright: ignore


def _base_layer(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def _trained_copy(module: nn.Module) -> nn.Module:
    """The copy of the head that is in use when peft's `modules_to_save` wraps it; else the module itself."""
    copies, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
    if not isinstance(copies, nn.ModuleDict) or not isinstance(original, nn.Module):
        return module
    active = [] if getattr(module, "disable_adapters", False) else getattr(module, "active_adapters", [])
    return copies[active[0]] if active else original


def _active_adapters(module: nn.Module) -> list[str]:
    """peft's adapters that this layer adds to its base layer's output now: none while they are merged into it or switched off."""
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return []
    kinds = [getattr(module, name, {}) for name in getattr(module, "adapter_layer_names", ("lora_A",))]
    return [adapter for adapter in getattr(module, "active_adapters", []) if any(adapter in kind for kind in kinds)]
