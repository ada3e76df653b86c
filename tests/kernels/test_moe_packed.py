"""Weights packed ahead: the bits of moe_mlp, and refusals of what was packed for something else."""

import pytest
import torch
from moe_cases import mlp
from test_moe_native import DTYPES, MLPS

import hebatron_kernels as hk
from hebatron_kernels import testing


def packed(args):
    x, ids, weights, up, down = args
    return [x, ids, weights, hk.moe_pack(up, x.dtype), hk.moe_pack(down, x.dtype), up.shape[0], up.shape[1]]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width", "expert_width"), MLPS)
def test_moe_mlp_packed_equals_moe_mlp_to_the_bit(isa, dtype, tokens, experts, top_k, width, expert_width):
    x, ids, weights, up, down = mlp(tokens, experts, top_k, width, expert_width, torch.float32)
    args = [x.to(dtype), ids, weights, up, down]
    with testing.use_isa(isa):
        ahead = packed(args)
        assert torch.equal(hk.moe_unpack(ahead[3], experts, expert_width, width), up.to(dtype))
        assert torch.equal(hk.moe_unpack(ahead[4], experts, width, expert_width), down.to(dtype))
        want = hk.moe_mlp(*args, backend="native")
        assert torch.equal(hk.moe_mlp_packed(*ahead), want)
        for backend in ("torch", "reference"):
            other = hk.moe_mlp_packed(*ahead, backend=backend)
            torch.testing.assert_close(other, hk.moe_mlp(*args, backend=backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", testing.isas())
def test_moe_pack_takes_strided_weights(isa):
    weight = torch.randn(3, 33, 17)
    with testing.use_isa(isa):
        assert torch.equal(hk.moe_pack(testing.strided(weight)), hk.moe_pack(weight))


def test_moe_mlp_packed_refuses_the_panels_of_another_isa():
    if len(testing.isas()) < 3:
        pytest.skip("one width of vectors here")
    args = packed(mlp(3, 2, 1, 16, 16, torch.float32))
    with (
        testing.use_isa("portable"),
        pytest.raises(
            ValueError, match="moe_mlp: packed weights must be packed again for this ISA; their lanes, got 16"
        ),
    ):
        hk.moe_mlp_packed(*args)


def test_moe_mlp_packed_refuses_what_was_not_packed_for_it():
    x, ids, weights, up, down, experts, expert_width = packed(mlp(3, 2, 1, 16, 48, torch.float32))
    rest = [experts, expert_width]
    for wrong, message in [
        ([x, ids, weights, torch.zeros_like(up), down], "must come from moe_pack, mark, got 0"),
        ([x, ids, weights, down, up], "must have as long sums, theirs, got 48"),
        (
            [x, ids, weights, hk.moe_pack(torch.randn(2, 48, 15)), down],
            r"up must be the packed form of \(2, 48, 16\)",
        ),
        ([x.bfloat16(), ids, weights, up, down], "up must have dtype bfloat16, got float32"),
        ([x.clone().requires_grad_(), ids, weights, up, down], "arguments must not require a gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            hk.moe_mlp_packed(*wrong, *rest)
    with pytest.raises(ValueError, match="moe_pack: dtype must be bfloat16, or float32 for float32 weights"):
        hk.moe_pack(torch.randn(2, 4, 4).bfloat16(), torch.float32)
    with pytest.raises(ValueError, match="moe_pack: weight_EMK must have no empty dimension"):
        hk.moe_pack(torch.randn(2, 0, 4))
    with pytest.raises(hk.BackendError, match="moe_pack: needs a contiguous last dimension"):
        hk.moe_pack(torch.randn(2, 4, 5).transpose(1, 2))


def test_moe_mlp_packed_registration_and_fullgraph():
    args = packed(mlp(7, 4, 2, 16, 8, torch.float32))
    for backend in ("native", "torch", "reference"):
        testing.check_registration("moe_mlp_packed", *args, backend=backend)
    testing.check_fullgraph(hk.moe_mlp_packed, args, "native", grad=False)
