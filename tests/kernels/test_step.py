"""A layer's token in one call: the bits of the layer's operators one after another."""

import copy
import pickle

import pytest
import torch

import hebatron_kernels as hk
from hebatron_kernels import testing

DTYPES = [torch.float32, torch.bfloat16]
INF = float("inf")


def draw(*shape, dtype=torch.float32):
    return (torch.randn(shape) / max(shape[-1], 1) ** 0.5).to(dtype)


def vector(n):
    return torch.rand(n) + 0.5


# sequences, width, heads, head dim, groups, state, taps
MAMBAS = [(1, 48, 4, 16, 2, 16, 4), (3, 70, 6, 8, 1, 20, 2), (5, 33, 2, 33, 2, 7, 3)]


def mamba(Q, D, H, P, G, S, W, dtype):
    C = H * P + 2 * G * S
    matrices = [draw(2 * H * P + 2 * G * S + H, D, dtype=dtype), draw(D, H * P, dtype=dtype)]
    conv = [draw(Q, C, W - 1, dtype=dtype), draw(C, W, dtype=dtype).float(), vector(C)]
    scan = [draw(Q, H, P, S), -vector(H), vector(H), vector(H)]
    return draw(Q, D, dtype=dtype), vector(D), vector(H * P), matrices, conv, scan


def mamba_by_operators(x, norm, gate_norm, matrices, conv, scan, G, limit):
    _, H, P, S = scan[0].shape
    z, xbc, dt = hk.linear(hk.rms_norm(x, norm, 1e-5), matrices[0]).split(
        [H * P, H * P + 2 * G * S, H], dim=-1
    )
    xbc = hk.causal_conv1d_update(xbc, *conv, "silu")
    xs, B, C = xbc.split([H * P, G * S, G * S], dim=-1)
    heads = (xs.unflatten(1, (H, P)), dt, scan[1], B.unflatten(1, (G, S)), C.unflatten(1, (G, S)))
    y = hk.ssd_update(scan[0], *heads, *scan[2:], limit)
    gated = hk.rms_norm(y.flatten(1), gate_norm, 1e-5, gate_TD=z, group_size=H * P // G)
    return x + hk.linear(gated, matrices[1])


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", MAMBAS)
@pytest.mark.parametrize("limit", [(0.0, INF), (0.4, 1.2)])
def test_mamba_step_is_its_operators_to_the_bit(isa, dtype, sizes, limit):
    G = sizes[4]
    with testing.use_isa(isa), torch.no_grad():
        x, norm, gate_norm, matrices, conv, scan = mamba(*sizes, dtype)
        packed = [hk.linear_pack(m) for m in matrices]
        sizes = (sizes[3], sizes[5], G, 1e-5, limit)
        step = hk.MambaStep(norm, packed[0], *conv[1:], *scan[1:], gate_norm, packed[1], *sizes)
        other_conv, other_scan = conv[0].clone(), scan[0].clone()
        for _ in range(3):
            want = mamba_by_operators(x, norm, gate_norm, matrices, conv, scan, G, limit)
            got = step(x, other_conv, other_scan)
            assert torch.equal(got, want)
            assert torch.equal(other_conv, conv[0]) and torch.equal(other_scan, scan[0])
            x = got


# tokens, width, experts, top_k, groups, kept groups, expert width, shared width
MOES = [(1, 48, 8, 2, 1, 1, 32, 40), (7, 65, 12, 3, 4, 2, 17, 33), (64, 16, 3, 3, 1, 1, 8, 1)]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", MOES)
@pytest.mark.parametrize("normalize", [True, False])
def test_moe_step_is_its_operators_to_the_bit(isa, dtype, sizes, normalize):
    T, D, E, K, groups, kept, F, F2 = sizes
    with testing.use_isa(isa), torch.no_grad():
        x, norm, router, bias = draw(T, D, dtype=dtype), vector(D), draw(E, D), draw(E)
        up, down, shared_up, shared_down = (
            draw(*s, dtype=dtype) for s in ((E, F, D), (E, D, F), (F2, D), (D, F2))
        )
        normed = hk.rms_norm(x, norm, 1e-5)
        weights, ids, _ = hk.moe_route(
            hk.linear(normed.float(), router), bias, K, groups, kept, normalize, 2.5
        )
        shared = hk.linear(torch.relu(hk.linear(normed, shared_up)).square(), shared_down)
        want = x + (hk.moe_mlp(normed, ids, weights, up, down) + shared)
        packed = [hk.moe_pack(up), hk.moe_pack(down), hk.linear_pack(shared_up), hk.linear_pack(shared_down)]
        choice = (K, groups, kept, normalize, 2.5, 1e-5)
        step = hk.MoeStep(norm, hk.linear_pack(router), bias, *packed, F, F2, *choice)
        assert torch.equal(step(x), want)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Q", "D", "H", "Hk", "P"), [(1, 48, 4, 2, 16), (5, 70, 6, 1, 24)])
def test_attention_step_is_its_operators_to_the_bit(isa, dtype, Q, D, H, Hk, P):
    with testing.use_isa(isa), torch.no_grad():
        x, norm = draw(Q, D, dtype=dtype), vector(D)
        q, k, v, o = (draw(*s, dtype=dtype) for s in ((H * P, D), (Hk * P, D), (Hk * P, D), (D, H * P)))
        cache = draw(2, 3 * Q, 4, Hk, P, dtype=dtype)
        table = torch.randperm(3 * Q).view(Q, 3).int()
        lengths = torch.tensor([0, 3, 4, 7, 11][:Q], dtype=torch.int32)
        other = cache.clone()
        normed = hk.rms_norm(x, norm, 1e-5)
        heads = [hk.linear(normed, w).unflatten(1, (n, P)) for w, n in ((q, H), (k, Hk), (v, Hk))]
        want = x + hk.linear(hk.attention_decode(*heads, cache, table, lengths).flatten(1), o)
        packed = [hk.linear_pack(w) for w in (q, k, v, o)]
        step = hk.AttentionStep(norm, *packed, H, Hk, P, 1e-5)
        assert torch.equal(step(x, other, table, lengths), want)
        assert torch.equal(other, cache)


class Model:
    """Three layers and a head, as steps and by operators; `states` are those of Q sequences."""

    def __init__(self, Q, dtype, D=40, V=37):
        torch.manual_seed(Q)
        H, P, G, S, W, E, F, F2, heads, kv, dim = 6, 8, 2, 12, 4, 9, 20, 24, 4, 2, 16
        self.Q, self.G = Q, G
        _, self.norm, self.gate_norm, self.matrices, conv, scan = mamba(Q, D, H, P, G, S, W, dtype)
        self.conv, self.scan = conv[1:], scan[1:]
        self.router, self.bias = draw(E, D), draw(E)
        shapes = [(E, F, D), (E, D, F), (F2, D), (D, F2)]
        self.experts = [draw(*s, dtype=dtype) for s in shapes]
        shapes = [(heads * dim, D), (kv * dim, D), (kv * dim, D), (D, heads * dim)]
        self.attention = [draw(*s, dtype=dtype) for s in shapes]
        self.table, self.head = draw(V, D, dtype=dtype), draw(V, D, dtype=dtype)
        self.block_table = torch.randperm(3 * Q).view(Q, 3).int()
        self.states = [conv[0], scan[0], draw(2, 3 * Q, 4, kv, dim, dtype=dtype)]
        pack = hk.linear_pack
        first = hk.MambaStep(
            *(
                self.norm,
                pack(self.matrices[0]),
                *self.conv,
                *self.scan,
                self.gate_norm,
                pack(self.matrices[1]),
            ),
            *(P, S, G, 1e-5, (0.0, INF)),
        )
        packed = [hk.moe_pack(w) for w in self.experts[:2]] + [pack(w) for w in self.experts[2:]]
        second = hk.MoeStep(self.norm, pack(self.router), self.bias, *packed, F, F2, 2, 3, 2, True, 2.5, 1e-5)
        third = hk.AttentionStep(self.norm, *map(pack, self.attention), heads, kv, dim, 1e-5)
        self.layers = [first, second, third]
        self.step = hk.DecodeStep(self.table, self.layers, self.norm, pack(self.head), 1e-5)

    def by_operators(self, ids, states, lengths):
        conv, scan, cache = states
        scan = [scan, *self.scan]
        x = mamba_by_operators(
            self.table[ids],
            self.norm,
            self.gate_norm,
            self.matrices,
            [conv, *self.conv],
            scan,
            self.G,
            (0.0, INF),
        )
        normed = hk.rms_norm(x, self.norm, 1e-5)
        chosen = hk.moe_route(hk.linear(normed.float(), self.router), self.bias, 2, 3, 2, True, 2.5)
        up, down, shared_up, shared_down = self.experts
        shared = hk.linear(torch.relu(hk.linear(normed, shared_up)).square(), shared_down)
        x = x + (hk.moe_mlp(normed, chosen[1], chosen[0], up, down) + shared)
        normed = hk.rms_norm(x, self.norm, 1e-5)
        q, k, v = (hk.linear(normed, w).unflatten(1, (-1, 16)) for w in self.attention[:3])
        seen = hk.attention_decode(q, k, v, cache, self.block_table, lengths)
        hidden = hk.rms_norm(x + hk.linear(seen.flatten(1), self.attention[3]), self.norm, 1e-5)
        return hidden, hk.linear(hidden, self.head).float()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Q", [0, 1, 3])
def test_decode_step_is_its_operators_to_the_bit(isa, dtype, Q):
    with testing.use_isa(isa), torch.no_grad():
        model = Model(Q, dtype)
        others = [state.clone() for state in model.states]
        for token in range(3):
            ids = torch.randint(37, (Q,))
            lengths = torch.tensor([3, 0, 7][:Q], dtype=torch.int32) + token
            want = model.by_operators(ids, others, lengths)
            got = model.step(ids, model.states, model.block_table, lengths)
            assert all(torch.equal(a, b) for a, b in zip(got, want))
            assert all(torch.equal(a, b) for a, b in zip(model.states, others))


@pytest.mark.parametrize(
    "threads", [1, 2, 3, 7]
)  # a thread without a panel of its own; more threads than cores
def test_decode_step_does_not_depend_on_the_threads(threads):
    lengths, before = torch.tensor([9], dtype=torch.int32), torch.get_num_threads()
    with torch.no_grad():
        first, second = Model(1, torch.bfloat16), Model(1, torch.bfloat16)
        want = first.step(torch.tensor([5]), first.states, first.block_table, lengths)
        torch.set_num_threads(threads)
        try:
            got = second.step(torch.tensor([5]), second.states, second.block_table, lengths)
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(second.states, first.states))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_decode_step_notices_other_states_and_copies(copier):
    ids, lengths = torch.tensor([5]), torch.tensor([2], dtype=torch.int32)
    with torch.no_grad():
        model = Model(1, torch.float32)
        kept = [state.clone() for state in model.states]
        want = model.step(ids, model.states, model.block_table, lengths)
        for _ in range(2):
            got = model.step(ids, [state.clone() for state in kept], model.block_table, lengths)
            assert all(torch.equal(a, b) for a, b in zip(got, want))
        for state, value in zip(model.states, kept):
            state.data = value.clone()  # the tensor is the same, its memory is not
        got = copier(model.step)(ids, [state.clone() for state in kept], model.block_table, lengths)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        got = model.step(ids, model.states, model.block_table, lengths)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([37])}, "decode_step: ids must be rows of the table, got 37"),
        ({"ids": torch.tensor([-1])}, "ids must be rows of the table"),
        ({"ids": torch.tensor([1], dtype=torch.int32)}, "ids_Q must have dtype int64"),
        ({"lengths": torch.tensor([12], dtype=torch.int32)}, "lengths must lie in the blocks, got 12"),
        ({"lengths": torch.tensor([-1], dtype=torch.int32)}, "lengths must lie in the blocks"),
        ({"lengths": None}, "lengths must be a tensor"),
        (
            {"table": torch.tensor([[3, 1, 0]], dtype=torch.int32)},
            "block_table must name blocks of the cache",
        ),
        ({"table": torch.zeros(2, 3, dtype=torch.int32)}, "block_table must have shape"),
        ({"states": 2}, "states must be 3 tensors, got 2"),
    ],
)
def test_decode_step_refuses(change, message):
    with torch.no_grad():
        model = Model(1, torch.float32)
        given = {
            "ids": torch.tensor([5]),
            "table": model.block_table,
            "lengths": torch.zeros(1, dtype=torch.int32),
        }
        given |= change
        states = model.states[: change.get("states", 3)]
        with pytest.raises(ValueError, match=message):
            model.step(given["ids"], states, given["table"], given["lengths"])


def test_decode_step_refuses_layers_of_another_width():
    model = Model(1, torch.float32)
    with pytest.raises(ValueError, match="decode_step: layers must have width 40"):
        hk.DecodeStep(
            draw(37, 40), [hk.MambaStep(*small()[0].values())], vector(40), model.step._given[3], 1e-5
        )


def test_step_is_available_where_native_would_be_chosen():
    with torch.no_grad():
        assert hk.step_available()
        with hk.use_backend("native"):
            assert hk.step_available()
        with hk.use_backend("torch"):
            assert not hk.step_available()
    assert not hk.step_available()


def small():
    x, norm, gate_norm, matrices, conv, scan = mamba(2, 8, 2, 4, 1, 4, 4, torch.float32)
    packed = [hk.linear_pack(m) for m in matrices]
    names = ["norm", "in_proj", "conv_weight", "conv_bias", "A", "D", "dt_bias", "gate_norm", "out_proj"]
    names += ["head_dim", "state_dim", "groups", "eps", "dt_limit"]
    given = [norm, packed[0], *conv[1:], *scan[1:], gate_norm, packed[1], 4, 4, 1, 1e-5, (0.0, INF)]
    return dict(zip(names, given)), [x, conv[0], scan[0]]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_step_copied_has_weights_of_its_own(copier):
    given, args = small()
    step = hk.MambaStep(*given.values())
    other = copier(step)
    with torch.no_grad():
        want = step(*[a.clone() for a in args])
        given["gate_norm"].zero_()
        assert not torch.equal(step(*[a.clone() for a in args]), want)
        assert torch.equal(other(*[a.clone() for a in args]), want)


BAD = [
    ({"norm": torch.zeros(8, 1)}, r"mamba_step: norm_D must have shape \(\*\)"),
    ({"norm": torch.zeros(8).bfloat16()}, "norm_D must have dtype float32"),
    ({"norm": torch.zeros(16)[::2]}, "norm_D must be contiguous on the CPU"),
    ({"conv_weight": torch.zeros(15, 4)}, "conv_weight_CW must have shape"),
    ({"conv_bias": torch.zeros(15)}, "conv_bias_C must have shape"),
    ({"groups": 3}, "groups must divide the 2 heads, got 3"),
    ({"groups": 0}, "groups must be > 0, got 0"),
    ({"D": torch.zeros(3)}, "D_H must have shape"),
    ({"gate_norm": torch.zeros(4)}, "gate_norm must have shape"),
    ({"in_proj": torch.zeros(2000).double()}, "the packed matrices must have dtype float32 or bfloat16"),
    ({"out_proj": torch.zeros(2000).bfloat16()}, "out_proj must have dtype float32"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_mamba_step_refuses_weights(wrong, message):
    with pytest.raises(ValueError, match=message):
        hk.MambaStep(*(small()[0] | wrong).values())


@pytest.mark.parametrize(
    ("which", "wrong", "message"),
    [
        (0, torch.zeros(8), "mamba_step: x_QD must have shape"),
        (0, torch.zeros(2, 7), "x_QD must have shape"),
        (0, torch.zeros(2, 8).bfloat16(), "x_QD must have dtype float32"),
        (0, torch.zeros(8, 2).T, "x_QD must be contiguous on the CPU"),
        (1, torch.zeros(2, 16, 2), "conv_state_QCK must have shape"),
        (2, torch.zeros(1, 2, 4, 4), "state_QHPS must have shape"),
        (2, torch.zeros(2, 2, 4, 8)[..., ::2], "state_QHPS must be contiguous"),
    ],
)
def test_mamba_step_refuses_states(which, wrong, message):
    given, args = small()
    args[which] = wrong
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        hk.MambaStep(*given.values())(*args)


def test_step_refuses_matrices_of_another_layer():
    given, args = small()
    given["in_proj"] = given["out_proj"]
    with torch.no_grad(), pytest.raises(ValueError, match="linear: packed weights must have as"):
        hk.MambaStep(*given.values())(*args)


def test_attention_step_refuses_lengths_and_blocks_outside_the_cache():
    step = hk.AttentionStep(torch.ones(8), *[hk.linear_pack(torch.zeros(8, 8))] * 4, 1, 1, 8, 1e-5)
    cache, table = torch.zeros(2, 2, 4, 1, 8), torch.tensor([[0, 1]], dtype=torch.int32)
    for other, length, message in [
        (table, 8, "lengths must leave room in 2 pages of 4 tokens"),
        (table, -1, "lengths must leave room"),
        (table + 1, 0, "block_table must name blocks from 0 to 1"),
    ]:
        lengths = torch.tensor([length], dtype=torch.int32)
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            step(torch.zeros(1, 8), cache, other, lengths)
