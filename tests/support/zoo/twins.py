"""The true attentions of a model: those that a copy of it, told to keep its weights, computes in plain matrix products.

Two models that are built from one config object share their choice of backend, hence configs are copied.
"""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def eager_twin(model: Any) -> Any:
    """The same weights on Hugging Face's eager attention."""
    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).dtype)


def eager_outputs(model: Any, inputs: dict[str, Any]) -> Any:
    """The eager twin's output with its attentions."""
    with torch.no_grad():
        return eager_twin(model)(**inputs, output_attentions=True)


def eager_modules(*names: str) -> Callable[[Any, dict[str, Any]], dict[str, list[Tensor]]]:
    """For models that do not hand out all attentions: what the eager twin's attention modules return beside z.

    Args:
        names: beginnings of module names; each is a field of the result.
    """

    def truth(model: Any, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
        twin, found = eager_twin(model), {name: list[Tensor]() for name in names}

        def hook(field: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                found[field].append(output[1])

            return keep

        for name, module in twin.named_modules():
            if name.rpartition(".")[2] in ("self_attn", "attn", "attention") and not list(_attention_inside(module)):
                for field in names:
                    if name.startswith(field):
                        module.register_forward_hook(hook(field))
        with torch.no_grad():
            twin(**inputs)
        return found

    return truth


def _attention_inside(module: nn.Module) -> Any:
    return (child for name, child in module.named_modules() if name.endswith(("self_attn", "attn", "attention")))


def torch_modules(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """What the `nn.MultiheadAttention` modules of a copy return as weights, by "self" and "cross"."""
    twin = copy.deepcopy(model)
    found: dict[str, list[Tensor]] = {}
    for name, module in twin.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            field = f"{name.partition('.')[0]} {'cross' if name.endswith('multihead_attn') else 'self'}"
            found.setdefault(field, [])
            module.forward = _with_weights(module.forward, found[field])  # type: ignore[method-assign]
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            twin(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    return found


def _with_weights(forward: Callable[..., Any], found: list[Tensor]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        output, weights = forward(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        found.append(weights)
        return output, weights

    return run


def unfused(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """timm: what passes through the dropout on the weights of a copy that writes its attention out."""
    twin, found = copy.deepcopy(model), list[Tensor]()
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        twin(**inputs)
    return {"attentions": found}


def sdpa_calls(model: Any, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """For models whose eager path computes something else: the weights of each call of SDPA, in float64."""
    found: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        assert not is_causal, "a mask was expected"
        scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
        found.append((scores + attn_mask).softmax(-1))
        return (found[-1] @ v.double()).to(q.dtype)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend), torch.no_grad():
        model(**inputs)
    return {"attentions": found}


def bridge_patterns(model: Any, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """TransformerLens: what its own hooks on the patterns see."""
    with torch.no_grad():
        _, cache = model.run_with_cache(**inputs)
    return {"attentions": [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(model.cfg.n_layers)]}


def eager_attentions(model: Any, site_names: list[str], inputs: dict[str, Any]) -> Any:
    """The eager twin's output with attentions, where each attention module sees what it sees in `model`.

    Without that, what is compared in the last layers of a trained model is how far two models have drifted apart in
    float32, not whether a pattern is right.
    """
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[name] = hidden, kwargs.get("key_value_states")

        return hook

    def replay(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, keys = seen[name]
            if keys is not None:
                kwargs = {**kwargs, "key_value_states": keys}
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(record(n), with_kwargs=True) for n in site_names]
    model(**inputs)
    for handle in handles:
        handle.remove()
    twin = eager_twin(model)
    for name in site_names:
        twin.get_submodule(name).register_forward_pre_hook(replay(name), with_kwargs=True)
    return twin(**inputs, output_attentions=True)
