"""Train, adapt and run Hebatron-class models: Mamba-2, attention and mixture-of-experts hybrids."""

from .config import ModelConfig

__all__ = ["ModelConfig"]
