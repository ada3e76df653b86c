"""The whole model on the CUDA kernels, run by the emulator: two layers of each kind, loss and gradients, prefill in one
piece and in chunks, decoding with a cache.

Everything is held against the same model in fp64, and may err from it by twice what the model on the CPU's kernels
or in torch's form does (a gradient of four elements may be near by chance), in training also what one does whose scan
rounds otherwise, plus a rounding step of bf16. All must choose the same experts: another expert is another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from model_cases import make_model, random_ids, relative
from torch import Tensor

import hebatron.mixers
import hebatron_kernels as hk
from hebatron import Hebatron, presets

CONFIG = presets.tiny().replace(layers_block_type=("mamba", "moe", "attention") * 2)
STEP = 2**-9  # half a rounding step of bf16, of the largest value
BACKENDS = ("emulator", "native", "torch")
TOKENS = 20  # a chunk of the scan and a part of one
SEED = 2  # one at which rounding sends no token to other experts


pytestmark = pytest.mark.usefixtures("emulator")


class Widened(torch.autograd.Function):
    """bf16 in fp32; the gradient is moved by up to half a step of bf16 and rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return moved(grad)


class Narrowed(torch.autograd.Function):
    """fp32 in bf16, moved by up to half a step of it and rounded."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return moved(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.float()


def moved(x: Tensor) -> Tensor:
    return (x * (1 + (torch.rand(x.shape) - 0.5) * 2**-8)).bfloat16()


def rounded_otherwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """The scan in fp32, with another of the roundings to bf16 that are as good as the nearest."""
    x, B, C = (Widened.apply(v) for v in (x, B, C))
    y, last = hk.ssd_scan(x, dt.float(), A, B, C, *others, backend="torch")
    return Narrowed.apply(y), last


class Recorded:
    """The scan, and what it was given on the way there and back."""

    def __init__(self) -> None:
        self.args: list[tuple[Any, ...]] = []
        self.upstream: dict[int, Tensor] = {}

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        call = len(self.args)
        self.args.append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        y, last = hk.ssd_scan(*args)
        y.register_hook(lambda grad: self.upstream.update({call: grad.detach()}))
        return y, last


def on(backend: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with hk.use_backend(backend):
        return run(*args, **kwargs)


def pair(seed: int) -> tuple[Hebatron, Hebatron]:
    """The model in bf16 on fp32 masters, and the same in fp64."""
    model = make_model(CONFIG, seed)
    model.compute_dtype = torch.bfloat16
    return model, make_model(CONFIG, seed).double()


def check(what: str, emulated: Tensor, *others: Tensor) -> None:
    """others: on the CPU's kernels, in torch's form, what else says how large an error may be; at the end the exact."""
    *cpu, exact = others
    error, *allowed = (relative(got.double(), exact) for got in (emulated, *cpu))
    assert error <= 2 * max(allowed) + STEP, f"{what}: {error:.2e}, on the CPU {allowed}"


def trained(model: Hebatron, ids: Tensor, labels: Tensor) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(ids, labels=labels, logits_to_keep=TOKENS)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_experts(*runs: tuple[Any, dict[str, Tensor]]) -> bool:
    first, second = ([stats.ids_TK.sort(1).values for stats in out.aux] for out, _ in runs)
    return all(map(torch.equal, first, second))


def test_training_on_emulated_kernels_is_that_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With six models and more whose scan rounds otherwise: in the first layer the terms of one gradient of A_log are
    27 times their sum, and from one such rounding to another its error goes from 0.04 to 0.39."""
    model, oracle = pair(SEED)
    ids, labels = (random_ids(CONFIG, 2, TOKENS, seed) for seed in (1, 2))
    labels[0, :5] = -100
    runs = [on(backend, trained, model, ids, labels) for backend in BACKENDS]
    exact = on("torch", trained, oracle, ids, labels)
    monkeypatch.setattr(hebatron.mixers, "ssd_scan", rounded_otherwise)
    torch.manual_seed(0)
    others = [on("native", trained, model, ids, labels) for _ in range(8)]
    assert all(same_experts(exact, run) for run in runs), "another seed is needed"
    runs += [run for run in others if same_experts(exact, run)]
    assert len(runs) >= len(BACKENDS) + 6
    check("logits", *(out.logits for out, _ in [*runs, exact]))
    check("loss", *(out.loss.detach() for out, _ in [*runs, exact]))
    assert runs[0][1].keys() == exact[1].keys()
    for name, want in exact[1].items():
        if want.any():
            check(name, *(grads[name] for _, grads in runs), want)


def test_scans_of_an_emulated_training_step_have_the_gradients_of_their_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the layers around a scan do to its gradients is left out: all forms are given what the emulated one was."""
    model, _ = pair(SEED)
    scan = Recorded()
    monkeypatch.setattr(hebatron.mixers, "ssd_scan", scan)
    on("emulator", trained, model, *(random_ids(CONFIG, 2, TOKENS, seed) for seed in (1, 2)))
    assert len(scan.args) == len(scan.upstream) == 2

    def gradients(args: Sequence[Any], upstream: Tensor, backend: str) -> list[Tensor]:
        leaves = [
            a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in args
        ]
        y, _ = hk.ssd_scan(*leaves, backend=backend)
        wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        return list(torch.autograd.grad(y, wanted, upstream.to(y)))

    for call, args in enumerate(scan.args):
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        forms = [gradients(args, scan.upstream[call], backend) for backend in BACKENDS]
        forms.append(gradients(wide, scan.upstream[call], "reference"))
        for name, *found in zip(("x", "dt", "A", "B", "C", "D", "dt_bias"), *forms, strict=True):
            check(f"gradient of {name} in scan {call}", *found)


def decoded(model: Hebatron, ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits of every token, from pieces that end at `cuts`."""
    cache = model.new_cache(len(ids))
    return torch.cat([model(piece, cache=cache).logits for piece in ids.tensor_split(cuts, 1)], 1)


# one piece; pieces that end inside a chunk of the scan and inside the convolution's past; token by token at the end
@pytest.mark.parametrize("cuts", [[], [7, 9, 18], [16, *range(17, TOKENS)]])
def test_prefill_chunks_and_tokens_on_emulated_kernels_are_those_on_the_cpu(cuts: list[int]) -> None:
    model, oracle = pair(SEED)
    ids = random_ids(CONFIG, 2, TOKENS, 1)
    with torch.no_grad():
        found = [on(backend, decoded, model, ids, cuts) for backend in BACKENDS]
        check("logits", *found, on("torch", decoded, oracle, ids, []))
