"""A model that will only be run: its weights once in the dtype it computes in, the experts' in the kernels' own order.

E experts, F expert width, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hebatron_kernels import moe_mlp_packed, moe_pack, moe_unpack

from .model import Experts, Hebatron, Linear


class FrozenExperts(Experts):
    """Experts packed for the CPU kernels: no parameters; a state dict gets them unpacked, in the dtype they are in."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.sizes = tuple(experts.up_proj.shape)  # E, F, D
        self.packed_up: Tensor
        self.packed_down: Tensor
        self.register_buffer("packed_up", moe_pack(experts.up_proj.detach(), dtype), persistent=False)
        self.register_buffer("packed_down", moe_pack(experts.down_proj.detach(), dtype), persistent=False)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        E, F, _ = self.sizes
        return moe_mlp_packed(x_TD, ids_TK, weights_TK.detach(), self.packed_up, self.packed_down, E, F)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        E, F, D = self.sizes
        destination[f"{prefix}up_proj"] = moe_unpack(self.packed_up, E, F, D)
        destination[f"{prefix}down_proj"] = moe_unpack(self.packed_down, E, D, F)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        raise ValueError(f"load_state_dict: {prefix[:-1]} must not be frozen: load first, then freeze")


@torch.no_grad()
def freeze_for_inference(model: Hebatron) -> Hebatron:
    """Prepare a model on the CPU to be run and no longer trained, in place.

    The matrices are rounded to the compute dtype once instead of at every use, and the routed experts are packed for
    the kernels (`hebatron_kernels.moe_pack`), layer by layer, so that only one layer is held twice. No result changes
    by a bit. Parameters need no gradient afterwards; `train()`, `load_state_dict` and optimizers refuse the model, and
    a state dict or an export holds the rounded weights in the usual layout.

    Args:
        model: computes in float32 or bfloat16. A frozen one is left as it is.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the model is not on the CPU, or computes in another dtype.
    """
    if model.frozen:
        return model
    dtype = model.compute_dtype
    if model.device.type != "cpu":
        raise ValueError(f"freeze_for_inference: model must be on the CPU, got {model.device}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"freeze_for_inference: model must compute in float32 or bfloat16, got {dtype}")
    model.compute_dtype = dtype  # no longer that of the embeddings
    model.eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, (Linear, nn.Embedding)):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
        for name, child in module.named_children():
            if isinstance(child, Experts):
                module.register_module(name, FrozenExperts(child, dtype).eval())
    model.tie()
    model.frozen = True
    return model
