"""Put our operators under a loaded model of transformers, and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

OLDEST = (5, 23)  # of transformers: from there on a cache is asked for a layer's states by name


def accelerate(model: Model, *, undo: bool = False, strict: bool = True) -> Model:
    """Let a NemotronH model of transformers compute with our operators, in place: Mamba-2 mixers (convolution, scan),
    attention, routers, routed experts and norms, forward and backward.

    Parameters, their names and everything around them stay: optimizers, peft's adapters (put in before or after),
    `generate` and its caches, `save_pretrained`, TRL's trainers and gradient checkpointing work as before. Projections,
    the plain MLP, the head and the loss are transformers' own. Calling it twice is harmless; a deep copy or a pickle
    of an accelerated model is accelerated.

    What comes out is what transformers computes, but for three things in which it is not this model:
    - the step of a Mamba layer is limited by the config's `time_step_limit`, (0, inf) for the published models;
      transformers clamps it at `time_step_min`.
    - documents packed in a row (`position_ids` that begin anew, `cu_seq_lens_q` or `seq_idx`, as TRL's packing and
      padding-free collators give them) do not see one another; in transformers' Mamba layers they do.
    - what `attention_mask` hides is as if it were not there, for the states of a cache too.

    Args:
        model: holds a `NemotronHModel` of transformers >= 5.23: NemotronHForCausalLM, or a wrapper such as peft's.
        undo: give every layer its own class back instead; the model is then exactly as it was.
        strict: False accelerates what can be and warns of the rest by name; True changes nothing if there is any.

    Returns:
        The model.

    Raises:
        ValueError: transformers is missing or too old, the model is another, or layers cannot be served (named, with
            the reason: another class or activation, attention dropout, weights that are quantised, sharded or fp16,
            a forward replaced on the instance as offloading does). A forward of an accelerated model raises one for
            ready-made masks, a static cache, a cache that records its past, and output_attentions.
    """
    _check_transformers()
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHModel

    from .layers import OURS

    if not isinstance(model, nn.Module):
        raise ValueError(f"accelerate: model must be a module, got {type(model).__name__}")
    backbones = [module for module in model.modules() if isinstance(module, NemotronHModel)]
    if not backbones:
        raise ValueError(
            "accelerate: model must hold a NemotronHModel of transformers (NemotronHForCausalLM), got "
            f"{type(model).__module__}.{type(model).__name__}"
        )
    if undo:
        _undo(model, backbones)
        return model
    unserved = dict(_unserved(model))
    if unserved:
        shown = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(unserved.items())[:10])
        more = f"; and {len(unserved) - 10} more" if len(unserved) > 10 else ""
        if strict:
            raise ValueError(
                f"accelerate: model must have only layers that can be served (or strict=False), got {shown}{more}"
            )
        warnings.warn(f"accelerate: left as transformers computes them: {shown}{more}", stacklevel=2)
    for name, module in model.named_modules():
        if type(module) in OURS and name not in unserved:
            module.__class__ = OURS[type(module)]
    for backbone in backbones:
        _give_layout(backbone)
    return model


def _check_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "accelerate: transformers must be installed, got none; pip install 'hebatron[hf]'"
        ) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ValueError(
            f"accelerate: transformers must be {oldest} or newer, got {transformers.__version__}"
        )


def _unserved(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of the layers that should be ours and cannot be, with the reason."""
    from transformers.models.nemotron_h import modeling_nemotron_h as theirs

    from .layers import OURS

    ours, originals = tuple(OURS.values()), tuple(OURS)
    mixers = (
        theirs.NemotronHMamba2Mixer,
        theirs.NemotronHAttention,
        theirs.NemotronHMoE,
        theirs.NemotronHMLP,
    )
    # what must stand where; a wrapper (peft's) may stand around it
    places: list[tuple[type[nn.Module], str, tuple[type[nn.Module], ...]]] = [
        (theirs.NemotronHModel, "norm_f", (theirs.NemotronHRMSNorm,)),
        (theirs.NemotronHBlock, "norm", (theirs.NemotronHRMSNorm,)),
        (theirs.NemotronHBlock, "mixer", mixers),
        (theirs.NemotronHMamba2Mixer, "norm", (theirs.NemotronHRMSNormGated,)),
        (theirs.NemotronHMoE, "gate", (theirs.NemotronHTopkRouter,)),
        (theirs.NemotronHMoE, "experts", (theirs.NemotronHExperts,)),
    ]
    for name, module in model.named_modules():
        if isinstance(module, originals) and not isinstance(module, ours):
            reason = _refusal(module, OURS.get(type(module)))
            if reason is not None:
                yield name, reason
        for owner, leaf, wanted in places:
            child = getattr(module, leaf) if isinstance(module, owner) else None
            if child is not None and not any(isinstance(inner, wanted) for inner in child.modules()):
                yield f"{name}.{leaf}".lstrip("."), f"{type(child).__name__} is not transformers' class"


def _refusal(module: Any, ours: Any) -> str | None:
    if ours is None:
        return f"{type(module).__name__} is not transformers' class but one made of it"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as hooks for offloading do"
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor) or not tensor.is_floating_point():
            return f"{name} must be a plain floating tensor, got {type(tensor).__name__} of {tensor.dtype}"
    check = getattr(ours, "refusal", None)
    return None if check is None else check(module)


def _give_layout(backbone: nn.Module) -> None:
    from .layers import give_layout

    if give_layout not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(give_layout, with_kwargs=True)


def _undo(model: nn.Module, backbones: Sequence[nn.Module]) -> None:
    from .layers import OURS, give_layout

    originals = {ours: original for original, ours in OURS.items()}
    wrapped = [
        name
        for name, module in model.named_modules()
        if isinstance(module, tuple(originals)) and type(module) not in originals
    ]
    if wrapped:
        raise ValueError(
            "accelerate: layers must have the class they were given to be undone, got another made of it at "
            + ", ".join(wrapped[:10])
        )
    for module in model.modules():
        if type(module) in originals:
            module.__class__ = originals[type(module)]
    for backbone in backbones:
        for key, hook in list(backbone._forward_pre_hooks.items()):
            if hook is give_layout:
                del backbone._forward_pre_hooks[key], backbone._forward_pre_hooks_with_kwargs[key]
