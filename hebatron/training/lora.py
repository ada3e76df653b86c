"""Low-rank adapters through peft: a frozen model, and in each of its matrices a small product that trains.

    add_adapters(model, LoraConfig(rank=16), seed=0)  # in place: only adapters require a gradient now
    ...                                               # train, save (checkpoints hold the adapters alone)
    files = adapter_files(model, "base/folder")       # peft's layout, in the names of transformers' model
    merge_adapters(model)                             # an ordinary Hebatron again, the products added to its weights

Projections are Linear modules and get peft's lora.Linear: base(x) + scale * B(A(dropout(x))), A and B in fp32. The
routed experts are two 3-D parameters that the fused product reads as tensors, so peft's `target_parameters` serves
them: W + scale * B_e A_e is formed for the forward, which costs that tensor's memory once more and no new kernel. It
knows no dropout: x does not meet A alone.

The base stays as it is to the bit, routers and their selection bias included: under [lora] the bias is not moved, for
the adapter could not carry it. What reads a weight past its module's forward (the head in the loss, the embeddings,
the router, the short convolution) gets no adapter and cannot be a target.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..model import Experts, Hebatron, Linear
from ..spelling import did_you_mean
from .sections import LoraConfig

ADAPTER = "adapter"  # in the exported model's folder
EXPERTS = ("experts.up_proj", "experts.down_proj")


def add_adapters(model: Hebatron, config: LoraConfig, seed: int) -> None:
    """Freeze `model` and put adapters into it, in place; it computes what it did, for every B begins at zero.

    Args:
        seed: of the fresh A's.
    Raises: ValueError where peft is not installed, a target is no projection, or dropout meets experts.
    """
    peft = _peft()
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear)}
    names.discard("lm_head")  # the loss reads its weight and never calls it
    for target in config.targets:
        if target not in names:
            known = ", ".join(sorted(names))
            raise ValueError(
                f"lora.targets must name projections of this model ({known}), got {target!r}"
                f"{did_you_mean(target, names)}"
            )
    experts = config.experts and any(isinstance(module, Experts) for module in model.modules())
    if experts and config.dropout:
        raise ValueError(f"lora.dropout must be 0 with lora.experts = true, got {config.dropout}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(config, sorted(config.targets or names), experts), model)
    model.draws_random_numbers = config.dropout > 0


def _peft() -> Any:
    try:
        import peft  # 9 s on an idle machine
    except ImportError as error:
        raise ValueError("lora: peft must be installed, got none; pip install 'hebatron[lora]'") from error
    return peft


def _peft_config(config: LoraConfig, targets: list[str], experts: bool) -> Any:
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=rf".*\.layers\..*\.({'|'.join(targets)})",
        target_parameters=list(EXPERTS) if experts else None,
    )


def coverage(model: Hebatron) -> list[str]:
    """What trains, and what of the model no adapter reaches, by kind; for the log."""
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    left = Counter[str]()
    for name, parameter in uncovered(model).items():
        left[re.sub(r"\.\d+\.", ".*.", name)] += parameter.numel()
    total, adapted = sum(p.numel() for p in frozen.values()), sum(p.numel() for p in trained.values())
    missed = sum(left.values())
    return [
        f"lora: {adapted:,} parameters train beside {total:,} frozen ones ({adapted / total:.2%}); "
        f"adapters reach {1 - missed / total:.1%} of those",
        "without an adapter: " + ", ".join(f"{name} {count:,}" for name, count in left.most_common()),
    ]


def uncovered(model: Hebatron) -> dict[str, nn.Parameter]:
    """Frozen parameters that no adapter adds to, under their names of before the adapters."""
    reached = {owner + "." + leaf for owner, leaf, _ in _adapters(model)}
    own = {_plain(name): p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: parameter for name, parameter in own.items() if name not in reached}


def merge_adapters(model: Hebatron) -> None:
    """Add every adapter's product to the weight it belongs to and take the adapters out, in place."""
    layers = [(owner, layer) for owner, _, layer in _adapters(model)]
    for _, layer in layers:
        layer.merge(safe_merge=True)  # refuses what is not finite
    for owner in dict(layers):
        parent, _, leaf = owner.rpartition(".")
        module: Any = getattr(model.get_submodule(parent), leaf)
        setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    model.requires_grad_(True)
    model.draws_random_numbers = False


def adapter_files(model: Any, base: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and configuration in peft's layout, to be written once the model is merged.

    Their names are those of the model in transformers, so `PeftModel.from_pretrained(model, folder)` loads them onto
    the exported base; not where the Mamba layers' out_proj is a target, which peft refuses there, for transformers'
    fused kernel reads its weight. Then the merged model is the way. `base`: its name, for adapter_config.json.
    """
    states = _peft().get_peft_model_state_dict(model, adapter_name="default")
    tensors = {
        "base_model.model." + name.replace("backbone.", "model.", 1): tensor.detach().cpu().contiguous()
        for name, tensor in states.items()
    }
    settings = model.peft_config["default"].to_dict()
    return tensors, settings | {"base_model_name_or_path": base, "inference_mode": True}


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """adapter_model.safetensors and adapter_config.json into a new folder."""
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _adapters(model: Hebatron) -> list[tuple[str, str, Any]]:
    """(name of the adapted module before adapters, parameter, peft's layer), outermost first."""
    from peft.tuners.lora import LoraLayer

    return [
        (_plain(name), getattr(module, "parameter_name", "weight"), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")
