"""Operators on tensors: checks, dispatch, autograd and references. The names exported here are the API."""

from ._check import BackendError
from ._dispatch import OPERATORS, explain, use_backend
from ._native import build_info
from .attention import attention_decode, attention_prefill
from .conv import causal_conv1d, causal_conv1d_update
from .loss import linear_cross_entropy
from .moe import (
    grouped_gemm,
    moe_combine,
    moe_mlp,
    moe_mlp_packed,
    moe_pack,
    moe_permute,
    moe_route,
    moe_unpack,
)
from .norm import rms_norm
from .ssd import ssd_scan, ssd_update

__all__ = [
    "OPERATORS",
    "BackendError",
    "attention_decode",
    "attention_prefill",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_update",
    "explain",
    "grouped_gemm",
    "linear_cross_entropy",
    "moe_combine",
    "moe_mlp",
    "moe_mlp_packed",
    "moe_pack",
    "moe_permute",
    "moe_route",
    "moe_unpack",
    "rms_norm",
    "ssd_scan",
    "ssd_update",
    "use_backend",
]
