"""Train, adapt and run Hebatron-class models: Mamba-2, attention and mixture-of-experts hybrids."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration.accelerate import accelerate
    from .cache import Cache
    from .config import ModelConfig
    from .decoder import Decoder
    from .model import Hebatron, Output, RouterStats

__all__ = ["Cache", "Decoder", "Hebatron", "ModelConfig", "Output", "RouterStats", "accelerate"]

_HOMES = {
    "Cache": "cache",
    "Decoder": "decoder",
    "Hebatron": "model",
    "ModelConfig": "config",
    "Output": "model",
    "RouterStats": "model",
    "accelerate": "acceleration.accelerate",
}


def __getattr__(name: str) -> Any:
    """Names above are imported at first use: the command line's help need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hebatron' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
