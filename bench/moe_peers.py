"""Other libraries' expert layers, as rivals of bench/bench_moe.py: ggml through bench/ggml_rival.cpp, and zentorch.

Both take the weights as the model stores them, bf16 and (E, N, K). What each is asked for:

`ggml` product: ggml_mul_mat_id, fp32 activations in and fp32 rows out, as it wants them; ours reads and writes bf16.
`ggml` layer: up, relu, square, down, the routing weights and the sum, the operations that llama.cpp builds.
`zentorch` product: zentorch_group_matmul of rows that are sorted by expert, bf16 in and out. It packs the weights at
the first call and keeps them so, as ours are in `moe_mlp packed` alone.
`zentorch` layer: two such products; it has no squared ReLU, so that and the rest are torch's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache

import torch
from common import ROOT
from torch import Tensor

GGML = ROOT / "third_party/peers/ggml_rival.so"
ZENTORCH = ROOT / "third_party/peers/zentorch"
NAMES = ("ggml", "zentorch")


def absent() -> dict[str, str]:
    """Those of NAMES that cannot run here, and why."""
    found = {}
    if not GGML.exists():
        found["ggml"] = f"no {GGML.relative_to(ROOT)}: bench/fetch_peers.sh llama.cpp builds it"
    wanted = torch.__version__.split("+")[0]
    built = [path.stem.removeprefix("zentorch-") for path in ZENTORCH.glob("zentorch-*.dist-info")]
    if not built:
        found["zentorch"] = f"no {ZENTORCH.relative_to(ROOT)}: bench/fetch_peers.sh zentorch brings it"
    elif not built[0].startswith(f"{wanted}."):
        found["zentorch"] = f"zentorch {built[0]} is not built for torch {wanted}"
    return found


@cache
def _ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(str(GGML))
    library.ggml_rival_open.restype = ctypes.c_void_p
    library.ggml_rival_open.argtypes = [*[ctypes.c_int64] * 5, ctypes.c_int, *[ctypes.c_void_p] * 6]
    library.ggml_rival_run.argtypes = library.ggml_rival_close.argtypes = [ctypes.c_void_p]
    return library


class Ggml:
    """out_TKF = x_TD @ up_EFD[ids_TK] or, with down_EDF and weights_TK, the layer's out_TD; each call computes it anew
    from the x it was made with."""

    def __init__(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor | None = None,
        weights_TK: Tensor | None = None,
    ) -> None:
        (T, K), (E, F, D) = ids_TK.shape, up_EFD.shape
        self.out = torch.empty(T, D) if down_EDF is not None else torch.empty(T, K, F)
        weights_TK = None if weights_TK is None else weights_TK.float().contiguous()
        # held: the library has their addresses alone
        self.held = [x_TD.float().contiguous(), ids_TK.int().contiguous(), weights_TK, up_EFD, down_EDF]
        for w in (up_EFD, down_EDF):
            if w is not None and not (w.dtype == torch.bfloat16 and w.is_contiguous()):
                raise ValueError(f"ggml: weights must be contiguous bfloat16, got {w.dtype} {w.stride()}")
        addresses = [None if t is None else t.data_ptr() for t in (*self.held, self.out)]
        self.rival = _ggml().ggml_rival_open(T, K, E, D, F, torch.get_num_threads(), *addresses)
        if not self.rival:
            raise MemoryError("ggml: no context")
        weakref.finalize(self, _ggml().ggml_rival_close, self.rival)

    def __call__(self) -> Tensor:
        status = _ggml().ggml_rival_run(self.rival)
        if status:
            raise RuntimeError(f"ggml: status must be 0, got {status}")
        return self.out


Products = Callable[[Tensor, list[int]], Tensor]


def zentorch_product(b_EFD: Tensor) -> Products:
    """(a_ND, counts) -> out_NF = a @ b[e] for the rows of each expert, which follow one another."""
    if importlib.util.find_spec("zentorch") is None:
        sys.path.append(str(ZENTORCH))
    importlib.import_module("zentorch")
    matrices = [w.clone() for w in b_EFD]  # it may pack them in place
    none: list[None] = [None] * len(matrices)
    product = torch.ops.zentorch.zentorch_group_matmul.out

    def call(a_ND: Tensor, counts: list[int]) -> Tensor:
        out = a_ND.new_empty(a_ND.shape[0], b_EFD.shape[1])
        outputs, inputs = list(out.split(counts)), list(a_ND.split(counts))
        product(outputs, inputs, matrices, [], None, None, None, "none", none, [], none, [], none)
        return out

    return call


def zentorch_layer(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up: Products, down: Products, experts: int
) -> Tensor:
    order_N = ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(ids_TK.flatten(), minlength=experts).tolist()
    tokens_N = order_N // ids_TK.shape[1]
    rows_ND = down(up(x_TD[tokens_N], counts).relu().square(), counts)
    rows_ND = rows_ND * weights_TK.flatten()[order_N, None].to(rows_ND.dtype)
    return torch.zeros_like(x_TD).index_add_(0, tokens_N, rows_ND)


def present(only: Sequence[str]) -> list[str]:
    missing = absent()
    return [name for name in only if name not in missing]


def products(
    a_ND: Tensor, ids_N1: Tensor, b_EFD: Tensor, only: Sequence[str] = NAMES
) -> dict[str, Callable[[], Tensor]]:
    """Calls of the peers that are here: a_ND @ b[ids], the rows of each expert one after another."""
    names, found = present(only), {}
    if "ggml" in names:
        found["ggml"] = Ggml(a_ND, ids_N1, b_EFD)
    if "zentorch" in names:
        product = zentorch_product(b_EFD)
        counts = torch.bincount(ids_N1.flatten(), minlength=len(b_EFD)).tolist()
        found["zentorch"] = lambda: product(a_ND, counts)
    return found


def layers(
    x_TD: Tensor,
    ids_TK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    weights_TK: Tensor,
    only: Sequence[str] = NAMES,
) -> dict[str, Callable[[], Tensor]]:
    """Calls of the peers that are here: moe_mlp of these arguments."""
    names, found = present(only), {}
    if "ggml" in names:
        found["ggml"] = Ggml(x_TD, ids_TK, up_EFD, down_EDF, weights_TK)
    if "zentorch" in names:
        up, down = zentorch_product(up_EFD), zentorch_product(down_EDF)
        found["zentorch"] = lambda: zentorch_layer(x_TD, ids_TK, weights_TK, up, down, len(up_EFD))
    return found


def check(only: Sequence[str] = NAMES) -> None:
    """The peers that are here, against the products in fp64; bf16 rounding alone is 2e-3."""
    for name, why in absent().items():
        print(f"{name}: absent, {why}")
    T, K, E, D, F = 23, 3, 8, 96, 72
    x, up = torch.randn(T, D).bfloat16(), (torch.randn(E, F, D) / D**0.5).bfloat16()
    down, weights = (torch.randn(E, D, F) / F**0.5).bfloat16(), torch.rand(T, K)
    ids = torch.rand(T, E).argsort(1)[:, :K]
    hidden = torch.einsum("td,tkfd->tkf", x.double(), up.double()[ids])
    layer = torch.einsum("tkf,tkdf,tk->td", hidden.relu() ** 2, down.double()[ids], weights.double())
    for name, call in layers(x, ids, up, down, weights, only).items():
        close(f"{name} layer", call(), layer)
    ids, order = ids.flatten().sort(stable=True)
    for name, call in products(x[order // K], ids[:, None], up, only).items():
        close(f"{name} product", call().view(T * K, F), hidden.flatten(0, 1)[order])


def close(name: str, got: Tensor, wanted: Tensor) -> None:
    """Refuses what is not the same but for rounding."""
    error = float((got.double() - wanted).norm() / wanted.norm())
    if not error < 0.01:
        raise ValueError(f"{name} must compute the same, got a relative error of {error:.3g}")
