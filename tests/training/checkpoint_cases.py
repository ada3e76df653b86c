"""A small trained model to save and load, for the checkpoint tests."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hebatron.training import checkpoint
from hebatron.training.checkpoint import save_checkpoint
from hebatron.training.optim import build_optimizer
from hebatron.training.sections import OptimizerConfig


class Toy(nn.Module):
    """A tied weight, a persistent buffer and a non-persistent one: what a checkpoint must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.router_bias: Tensor
        self.register_buffer("router_bias", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.head(self.embed(ids_T))


def trained(steps: int = 3, seed: int = 0) -> tuple[Toy, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Toy()
    optimizer = build_optimizer(model, OptimizerConfig())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2])).square().sum().backward()
        optimizer.step()
        model.router_bias += 0.1
    return model, optimizer


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    tensors = checkpoint.model_tensors(model)
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def saved(root: Path, step: int = 3) -> Path:
    return save_checkpoint(root, step, *trained(), {"plan_hash": "p"})
