"""Operators on tensors: checks, dispatch, autograd and references. The names exported here are the API."""

from ._check import BackendError
from ._dispatch import OPERATORS, explain, host_reads, named_backend, use_backend
from ._native import build_info
from ._packing import linear_pack, linear_unpack, moe_pack, moe_unpack
from .attention import attention_decode, attention_prefill
from .conv import causal_conv1d, causal_conv1d_update
from .decode_step import DecodeStep
from .linear import linear, linear_packed
from .loss import linear_cross_entropy
from .moe import (
    grouped_gemm,
    moe_combine,
    moe_combine_norm,
    moe_mlp,
    moe_mlp_packed,
    moe_permute,
    moe_route,
)
from .norm import rms_norm
from .ssd import ssd_scan, ssd_update
from .step import AttentionStep, MambaStep, MoeStep, step_available

__all__ = [
    "OPERATORS",
    "AttentionStep",
    "BackendError",
    "DecodeStep",
    "MambaStep",
    "MoeStep",
    "attention_decode",
    "attention_prefill",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_update",
    "explain",
    "grouped_gemm",
    "host_reads",
    "linear",
    "linear_cross_entropy",
    "linear_pack",
    "linear_packed",
    "linear_unpack",
    "moe_combine",
    "moe_combine_norm",
    "moe_mlp",
    "moe_mlp_packed",
    "moe_pack",
    "moe_permute",
    "moe_route",
    "moe_unpack",
    "named_backend",
    "rms_norm",
    "ssd_scan",
    "ssd_update",
    "step_available",
    "use_backend",
]
