"""Operators on tensors: checks, dispatch, autograd and references. The names exported here are the API."""

from ._check import BackendError
from ._dispatch import OPERATORS, explain, use_backend
from ._native import build_info
from .conv import causal_conv1d, causal_conv1d_update
from .moe import grouped_gemm, moe_combine, moe_mlp, moe_permute, moe_route
from .norm import rms_norm
from .ssd import ssd_scan, ssd_update

__all__ = [
    "OPERATORS",
    "BackendError",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_update",
    "explain",
    "grouped_gemm",
    "moe_combine",
    "moe_mlp",
    "moe_permute",
    "moe_route",
    "rms_norm",
    "ssd_scan",
    "ssd_update",
    "use_backend",
]
