"""Calls that every operator must refuse: of each, one right call and a table of what is wrong with it.

What holds for any tensor (type, rank, sizes, dtype, device) test_bad_calls.py derives from the right call. The tables
have the rest: an argument's value or several, and what the message says behind the operator's name.
"""

import math

import torch

import hebatron_kernels as hk
from hebatron_kernels import testing

INF, NAN = math.inf, math.nan
ONES = torch.ones
FP16 = torch.float16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def blocks(*values):
    return ints(*values, 4, 5, 6, 7).view(4, 2)


def scan(rows):
    """The arguments of a scan of 4 tokens or sequences, 4 heads of 2, 2 groups of 3."""
    x = {f"x_{rows}HP": ONES(4, 4, 2), f"dt_{rows}H": ONES(4, 4), "A_H": -ONES(4)}
    return {
        **x,
        f"B_{rows}GS": ONES(4, 2, 3),
        f"C_{rows}GS": ONES(4, 2, 3),
        "D_H": ONES(4),
        "dt_bias_H": ONES(4),
    }


def heads(rows, keys):
    return {f"q_{rows}HP": ONES(4, 4, 8), f"k_{keys}": ONES(4, 2, 8), f"v_{keys}": ONES(4, 2, 8)}


def packed():
    up, down = ONES(5, 6, 4), ONES(5, 4, 6)
    return {"up": hk.moe_pack(up), "down": hk.moe_pack(down), "num_experts": 5, "expert_width": 6}


def chosen():
    return {"ids_TK": torch.zeros(3, 2, dtype=torch.int64), "weights_TK": ONES(3, 2)}


RIGHT = {
    "rms_norm": lambda: dict(
        x_TD=ONES(3, 4), weight_D=ONES(4), eps=1e-5, residual_TD=ONES(3, 4), gate_TD=ONES(3, 4), group_size=2
    ),
    "causal_conv1d": lambda: dict(
        x_TC=ONES(4, 2), weight_CW=ONES(2, 4), bias_C=ONES(2), activation="silu", cu_seqlens=ints(0, 1, 4),
        initial_state=ONES(2, 2, 3),
    ),
    "causal_conv1d_update": lambda: dict(
        x_QC=ONES(4, 2), conv_state_QCK=ONES(4, 2, 3), weight_CW=ONES(2, 4), bias_C=ONES(2), activation=None
    ),
    "ssd_scan": lambda: {
        **scan("T"), "dt_limit": (0.0, INF), "cu_seqlens": ints(0, 1, 4),
        "initial_state": ONES(2, 4, 2, 3), "chunk_size": 2,
    },
    "ssd_update": lambda: {"state_QHPS": ONES(4, 4, 2, 3), **scan("Q"), "dt_limit": (0.0, INF)},
    "moe_route": lambda: dict(
        logits_TE=ONES(3, 8), bias_E=ONES(8), top_k=2, n_group=2, topk_group=1, normalize=True, scale=2.5
    ),
    "moe_permute": lambda: dict(x_TD=ONES(3, 4), ids_TK=chosen()["ids_TK"], num_experts=5),
    "moe_combine": lambda: dict(rows_ND=ONES(6, 4), order_N=torch.arange(6), weights_TK=ONES(3, 2), num_tokens=3),
    "moe_combine_norm": lambda: dict(
        rows_ND=ONES(6, 4), order_N=torch.arange(6), weights_TK=ONES(3, 2), norm_D=ONES(4), eps=1e-5,
        shared_TD=ONES(3, 4), residual_TD=ONES(3, 4),
    ),
    "grouped_gemm": lambda: dict(
        a_ND=ONES(6, 4), b_EKN=ONES(2, 4, 3), offsets_E=ints(2, 6), rows_N=ints(*range(6)), scale_N=ONES(6),
        activation=None,
    ),
    "moe_mlp": lambda: dict(x_TD=ONES(3, 4), **chosen(), up_EFD=ONES(5, 6, 4), down_EDF=ONES(5, 4, 6)),
    "moe_pack": lambda: dict(weight_EMK=ONES(2, 3, 4), dtype=torch.bfloat16),
    "moe_unpack": lambda: dict(packed=hk.moe_pack(ONES(2, 3, 4)), experts=2, outputs=3, inner=4),
    "moe_mlp_packed": lambda: dict(x_TD=ONES(3, 4), **chosen(), **packed()),
    "linear": lambda: dict(x_TD=ONES(3, 4), weight_MD=ONES(5, 4)),
    "linear_packed": lambda: dict(x_TD=ONES(3, 4), packed=hk.linear_pack(ONES(5, 4)), outputs=5),
    "attention_prefill": lambda: dict(
        **heads("T", "SHkP"), cu_seqlens_q=ints(0, 1, 4), cu_seqlens_k=ints(0, 2, 4), causal=True, scale=0.5, window=3
    ),
    "attention_decode": lambda: dict(
        **heads("Q", "new_QHkP"), cache=torch.zeros(2, 9, 3, 2, 8), block_table=blocks(0, 1, 2, 3),
        lengths=ints(5, 2, 0, 3), scale=0.5, window=3,
    ),
    "linear_cross_entropy": lambda: dict(
        x_TD=ONES(3, 4), weight_VD=ONES(5, 4), targets_T=torch.tensor([1, -100, 4]), ignore_index=-100, reduction="sum"
    ),
}  # fmt: skip

# dimensions that may have any size, as far as the other arguments go
FREE = {
    ("causal_conv1d", "cu_seqlens", 0),
    ("moe_route", "logits_TE", 0),
    ("grouped_gemm", "a_ND", 0),
    ("grouped_gemm", "b_EKN", 2),
    ("moe_combine", "rows_ND", 1),
    ("moe_permute", "x_TD", 1),
    ("moe_permute", "ids_TK", 1),
    ("linear", "x_TD", 0),
    ("linear", "weight_MD", 0),
    ("linear_packed", "x_TD", 0),
    ("moe_pack", "weight_EMK", 0),
    ("moe_pack", "weight_EMK", 1),
    ("moe_pack", "weight_EMK", 2),
    ("attention_decode", "cache", 1),
    ("attention_decode", "cache", 2),
    ("attention_decode", "block_table", 1),
    ("linear_cross_entropy", "weight_VD", 0),
}


def number(arg, *values, what="> 0", odd=()):
    """A number out of its range, and what is no number."""
    table = [({arg: v}, f"{arg} must be {what}, got {v}") for v in values]
    table += [({arg: v}, f"{arg} must be finite, got {v}") for v in odd]
    return table + [({arg: v}, rf"{arg} must be a number, got {v!r}") for v in ("1", None, True)]


def integer(arg, *values, none=False):
    """Not a positive integer."""
    table = [({arg: v}, f"{arg} must be > 0, got {v}") for v in values]
    table += [({arg: v}, f"{arg} must be an integer, got {v!r}") for v in (2.0, 2.5)]
    return table + [
        ({arg: v}, f"{arg} must be (a number|an integer), got {v!r}")
        for v in ("2", True, *([] if none else [None]))
    ]


def ends(arg, tokens=4, **others):
    """cu_seqlens of these tokens that are none."""
    rise = rf"{arg} must rise from 0 to {tokens} \(the number of tokens\), got "
    wrong = [(0, 3), (1, 2, 4), (0, 3, 2, 4), (0, -1, 4), (0, 1, 5), (0,), (0, 9, 4)]
    table = [
        ({arg: ints(*w), **others}, rise + str([*w]).replace("[", r"\[").replace("]", r"\]")) for w in wrong
    ]
    return [*table, ({arg: ints(), **others}, rf"{arg} must have at least one entry, got int32\[0\] on cpu")]


BACKEND = [
    ({"backend": "magic"}, "backend must be one of native, triton, torch, reference, emulator, got 'magic'"),
    ({"backend": ""}, "backend must be one of native, triton, torch, reference, emulator, got ''"),
    ({"backend": 3}, "backend must be one of native, triton, torch, reference, emulator, got 3"),
]
ACTIVATION = [
    ({"activation": v}, f'activation must be "silu" or None, got {v!r}'.replace("[", r"\["))
    for v in ("relu", "SiLU", "", 1, True, ["silu"])
]
LIMITS = [
    (
        {"dt_limit": v},
        r"dt_limit must be \(smallest, largest\) with 0 <= smallest <= largest, smallest finite, got ",
    )
    for v in (
        (0.5, 0.1),
        (-1.0, 0.1),
        (NAN, 1.0),
        (0.1, NAN),
        (INF, INF),
        (0.1,),
        (0, 1, 2),
        0.1,
        None,
        ("0", "1"),
        "01",
    )
]
SCAN = [
    *LIMITS,
    (
        dict(B=ONES(4, 3, 3), C=ONES(4, 3, 3)),
        "B_.GS must have a number of groups that divides the 4 heads, got 3",
    ),
    (
        dict(B=ONES(4, 0, 3), C=ONES(4, 0, 3)),
        r"x_.HP must have heads, head dim, groups and state > 0, got \(4, 4, 2\)",
    ),
    (dict(B=ONES(4, 2, 0), C=ONES(4, 2, 0)), "x_.HP must have heads, head dim, groups and state > 0"),
]


def scan_table(rows):
    names = {"B": f"B_{rows}GS", "C": f"C_{rows}GS"}
    return [({names.get(arg, arg): v for arg, v in wrong.items()}, message) for wrong, message in SCAN]


DIVIDES = "k_SHkP must have a number of heads that divides the 4 of q, got "
WHOLE = "must be True or False, got"
RULES = {
    "rms_norm": [
        *number("eps", 0.0, -1.0, NAN, odd=[INF]),
        (dict(x_TD=ONES(3, 0), weight_D=ONES(0), residual_TD=None, gate_TD=None), "x_TD must have a width > 0, got"),
        *((dict(group_size=v), f"group_size must divide the width 4, got {v}") for v in (3, 0, -2, 8)),
        *((dict(group_size=v), f"group_size must be an integer, got {v!r}") for v in (2.0, "2", True)),
        (dict(gate_TD=ONES(3, 4).bfloat16()), r"gate_TD must have dtype float32, got bfloat16"),
    ],
    "causal_conv1d": [
        *ACTIVATION,
        *ends("cu_seqlens", initial_state=None),
        (dict(weight_CW=ONES(2, 0)), r"weight_CW must have at least one tap, got float32\[2, 0\] on cpu"),
        (dict(initial_state=ONES(2, 2, 3).half()), "initial_state must have dtype float32, got float16"),
        (dict(cu_seqlens=None), r"initial_state must have shape \(1, 2, 3\), got float32\[2, 2, 3\]"),
    ],
    "causal_conv1d_update": [
        *ACTIVATION,
        (dict(weight_CW=ONES(2, 0)), r"weight_CW must have at least one tap, got float32\[2, 0\] on cpu"),
        (dict(conv_state_QCK=ONES(4, 2, 3).half()), "conv_state_QCK must have dtype float32, got float16"),
        (dict(conv_state_QCK=ONES(4, 3, 2).mT), r"conv_state_QCK must be contiguous, got strides \(6, 1, 2\)"),
        (dict(conv_state_QCK=testing.strided(ONES(4, 2, 3))), "conv_state_QCK must be contiguous, got strides"),
        (dict(conv_state_QCK=ONES(1, 2, 3).expand(4, 2, 3)), "conv_state_QCK must be contiguous, got strides"),
        (dict(x_QC=ONES(4, 2, requires_grad=True)), "arguments must not require a gradient"),
    ],
    "ssd_scan": [
        *scan_table("T"),
        *ends("cu_seqlens", initial_state=None),
        *integer("chunk_size", 0, -1),
        (dict(B_TGS=ONES(4, 2, 3).half()), "B_TGS must have dtype float32, got float16"),
        (dict(x_THP=ONES(4, 0, 2), dt_TH=ONES(4, 0), A_H=ONES(0), D_H=None, dt_bias_H=None), "x_THP must have heads"),
    ],
    "ssd_update": [
        *scan_table("Q"),
        (dict(state_QHPS=ONES(4, 4, 2, 3).half()), "state_QHPS must have dtype float32, got float16"),
        (dict(state_QHPS=ONES(4, 4, 3, 2).mT), "state_QHPS must be contiguous, got strides"),
        (dict(A_H=-ONES(4, requires_grad=True)), "arguments must not require a gradient"),
    ],
    "moe_route": [
        *((dict(top_k=v), f"top_k must be between 1 and the 4 experts of the groups kept, got {v}")
          for v in (0, 5, -1)),
        *((dict(n_group=v), f"n_group must divide 8 experts into groups of at least 2, got {v}")
          for v in (3, 8, 0, -2)),
        *((dict(topk_group=v), f"topk_group must be between 1 and n_group = 2, got {v}") for v in (0, 3, -1)),
        *((dict([(a, v)]), f"{a} must be an integer, got {v!r}")
          for a in ("top_k", "n_group") for v in (2.0, "2", None, True)),
        *((dict(topk_group=v), f"topk_group must be an integer, got {v!r}") for v in (1.0, "1", None, True)),
        *((dict(normalize=v), f"normalize {WHOLE} {v!r}") for v in ("yes", 1, None)),
        *number("scale", 0.0, -1.0, NAN, odd=[INF]),
    ],
    "moe_permute": [
        *((dict(ids_TK=torch.full((3, 2), v)), f"ids_TK must be between 0 and 4, got {v}") for v in (5, -1, 2**40)),
        (dict(ids_TK=torch.zeros(3, 0).long()), "ids_TK must name at least one expert per token, got int64"),
        *integer("num_experts", 0, -5),
        (dict(num_experts=INF), "num_experts must be finite, got inf"),
        (dict(x_TD=ONES(4, 4)), r"ids_TK must have shape \(4, \*\), got int64\[3, 2\]"),
    ],
    "moe_combine": [
        (dict(weights_TK=ONES(3, 0)), r"weights_TK must have at least one expert per token, got float32\[3, 0\]"),
        *((dict(num_tokens=v), rf"weights_TK must have shape \({v}, \*\), got float32\[3, 2\]") for v in (4, 0)),
        *((dict(num_tokens=v), f"num_tokens must be an integer, got {v!r}") for v in (3.0, "3", None, True)),
        (dict(num_tokens=-1), "num_tokens must be >= 0, got -1"),
        *((dict(order_N=torch.tensor(v)), r"order_N must be a permutation of the 6 slots, got \[")
          for v in ([0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5, 6], [-1, 0, 1, 2, 3, 4])),
    ],
    "moe_combine_norm": [
        (dict(weights_TK=ONES(3, 0)), r"weights_TK must have at least one expert per token, got float32\[3, 0\]"),
        (dict(order_N=torch.tensor([0, 1, 2, 3, 4, 4])), r"order_N must be a permutation of the 6 slots, got \["),
        *number("eps", 0.0, -1.0, NAN, odd=[INF]),
    ],
    "grouped_gemm": [
        (dict(b_EKN=ONES(2, 4, 0)), r"b_EKN must have widths > 0, got float32\[2, 4, 0\] on cpu"),
        (dict(b_EKN=ONES(0, 4, 3), offsets_E=ints()), "b_EKN must have at least one expert, got"),
        *((dict(offsets_E=ints(*v)), rf"offsets_E must rise from 0 to at most 6 .*, got \[{v[0]}, {v[1]}\]")
          for v in ((4, 2), (4, 7), (-1, 6))),
        *((dict(rows_N=torch.full((6,), v).int()), f"rows_N must be between 0 and 5, got {v}") for v in (6, -1)),
        *((dict(activation=v), f"activation must be None or 'relu2', got {v!r}") for v in ("relu", "", 1)),
        *((dict(implementation=v), f"implementation must be one of sm80, sm90a, cutlass, .*, got {v!r}")
          for v in ("", "sm100", "sm90a:", "sm90a:128", "sm90a:128x", "sm90a:0x128", "sm90a:128x208x1", 90)),
    ],
    "moe_mlp": [
        (dict(x_TD=ONES(3, 4).half()), r"x_TD must have dtype float64 or float32 or bfloat16, got float16"),
        (dict(up_EFD=ONES(5, 0, 4), down_EDF=ONES(5, 4, 0)), "up_EFD must have widths > 0, got"),
        (dict(up_EFD=ONES(0, 6, 4), down_EDF=ONES(0, 4, 6)), "up_EFD must have at least one expert, got"),
        (dict(up_EFD=ONES(5, 6, 4).double()), "up_EFD must have dtype float32, got float64"),
        (dict(down_EDF=ONES(5, 4, 6).bfloat16()), "down_EDF must have dtype float32, got bfloat16"),
        (dict(ids_TK=torch.zeros(3, 0).long()), "ids_TK must name at least one expert per token, got int64"),
        *((dict(ids_TK=torch.full((3, 2), v)), f"ids_TK must be between 0 and 4, got {v}") for v in (5, -1, 2**40)),
    ],
    "moe_pack": [
        *((dict(weight_EMK=ONES(*s)), "weight_EMK must have no empty dimension, got")
          for s in ((0, 3, 4), (2, 0, 4), (2, 3, 0))),
        *((dict(weight_EMK=ONES(2, 3, 4).to(d)), "weight_EMK must have dtype bfloat16 or float32, got")
          for d in (torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64)),
        *((dict(dtype=v), f"dtype must be bfloat16, or float32 for float32 weights, got {v}")
          for v in (torch.float16, torch.float64, torch.int8, "bfloat16", 2)),
        (dict(weight_EMK=ONES(2, 3, 4).bfloat16(), dtype=torch.float32), "dtype must be bfloat16, or float32 for"),
        *((dict(weight_EMK=ONES(*s)), r"weight_EMK must have shape \(\*, \*, \*\), got")
          for s in ((4,), (3, 4), (1, 2, 3, 4), (1,))),
        *((dict(weight_EMK=v), "weight_EMK must be a tensor, got") for v in (None, 3.0, "w", ((1.0,),))),
    ],
    "moe_unpack": [
        *integer("experts", 0, -2), *integer("outputs", 0, -3), *integer("inner", 0, -4),
        *((dict([(a, 9)]), r"packed must be the packed form of \(.*\) weights, \d+ elements, got float32")
          for a in ("experts", "inner")),
        (dict(outputs=17), r"packed must be the packed form of \(2, 17, 4\) weights, \d+ elements, got float32"),
    ],
    "moe_mlp_packed": [
        *integer("num_experts", 0, -5), *integer("expert_width", 0, -6),
        (dict(x_TD=ONES(3, 4).double()), "x_TD must have dtype (bfloat16|float32) or .*, got float64"),
        (dict(x_TD=ONES(3, 0)), "x_TD must have widths > 0, got"),
        (dict(x_TD=ONES(3, 4).bfloat16()), "up must have dtype bfloat16, got float32"),
        (dict(num_experts=6), r"up must be the packed form of \(6, 6, 4\) weights, \d+ elements, got float32"),
        (dict(ids_TK=torch.zeros(3, 0).long()), "ids_TK must name at least one expert per token, got int64"),
        (dict(weights_TK=ONES(3, 2, requires_grad=True)), "arguments must not require a gradient"),
    ],
    "linear": [
        *((dict(weight_MD=ONES(*s), x_TD=ONES(3, s[1])), "weight_MD must have no empty dimension, got")
          for s in ((0, 4), (5, 0))),
        *((dict([(a, ONES(3, 4).to(d))]), f"{a} must have dtype .*, got")
          for a in ("x_TD", "weight_MD") for d in (torch.int8, torch.bool, torch.complex64)),
        *((dict([(a, v)]), f"{a} must be a tensor, got") for a in ("x_TD", "weight_MD") for v in (None, 1.0)),
    ],
    "linear_packed": [
        *integer("outputs", 0, -5),
        *((dict(outputs=v), r"packed must be the packed form of \(1, .*\) weights, \d+ elements, got")
          for v in (17, 2**20)),
        *((dict(x_TD=ONES(3, 4).to(d)), "x_TD must have dtype float32 or bfloat16, got")
          for d in (FP16, torch.float64)),
        (dict(x_TD=ONES(3, 4).bfloat16()), "packed must have dtype bfloat16, got float32"),
        (dict(x_TD=ONES(3, 0)), "inner must be > 0, got 0"),
        (dict(x_TD=ONES(3, 4, requires_grad=True)), "arguments must not require a gradient"),
    ],
    "attention_prefill": [
        *ends("cu_seqlens_q"), *ends("cu_seqlens_k"),
        (dict(q_THP=ONES(4, 0, 8)), r"q must have heads and a head dim > 0, got \(0, 8\)"),
        (dict(k_SHkP=ONES(4, 3, 8), v_SHkP=ONES(4, 3, 8)), DIVIDES + "3"),
        (dict(k_SHkP=ONES(4, 0, 8), v_SHkP=ONES(4, 0, 8)), DIVIDES + "0"),
        (dict(k_SHkP=ONES(4, 2, 8).half()), "k_SHkP must have dtype float32, got float16"),
        (dict(cu_seqlens_q=None), "cu_seqlens_k must be None when cu_seqlens_q is None, got int32"),
        (dict(cu_seqlens_k=None, k_SHkP=ONES(6, 2, 8), v_SHkP=ONES(6, 2, 8)),
         "cu_seqlens_k must be given when 4 queries meet 6 keys, got None"),
        (dict(cu_seqlens_k=ints(0, 4)), r"cu_seqlens_k must name 2 sequences like cu_seqlens_q, got int32\[2\]"),
        *number("scale", 0.0, -1.0, NAN, odd=[INF])[:-2], (dict(scale=True), "scale must be a number, got True"),
        *integer("window", 0, -1, none=True),
        (dict(causal=False), "window must be None when causal is False, got 3"),
        *((dict(causal=v), f"causal {WHOLE} {v!r}") for v in ("yes", 1, None)),
    ],
    "attention_decode": [
        (dict(q_QHP=ONES(4, 3, 8)), "k_new_QHkP must have a number of heads that divides the 3 of q, got 2"),
        (dict(q_QHP=ONES(4, 4, 8, requires_grad=True)), "arguments must not require a gradient"),
        (dict(v_new_QHkP=ONES(4, 2, 8).half()), "v_new_QHkP must have dtype float32, got float16"),
        (dict(cache=ONES(2, 1, 3, 2, 8).expand(2, 9, 3, 2, 8)), "cache must not be expanded .*, got strides"),
        (dict(cache=ONES(2, 9, 0, 2, 8)), r"lengths\[0\] must be in \[0, 0\), 2 blocks a row, got 5"),
        (dict(block_table=blocks(0, 1, -1, 3)), r"block_table\[1\] must name blocks in \[0, 9\) .*, got \[-1\]"),
        (dict(block_table=blocks(0, 9, 2, 3)), r"block_table\[0\] must name blocks in \[0, 9\) .*, got \[0, 9\]"),
        (dict(block_table=blocks(0, 2, 2, 3)), "block_table must give each sequence a row of its own to write"),
        *((dict(lengths=ints(5, v, 0, 3)), rf"lengths\[1\] must be in \[0, 6\), 2 blocks a row, got {v}")
          for v in (-1, 6, 2**31 - 1)),
        *number("scale", 0.0, -1.0, NAN, odd=[INF])[:-2],
        *integer("window", 0, -1, none=True),
    ],
    "linear_cross_entropy": [
        *((dict(targets_T=torch.tensor([1, v, 2])), rf"targets_T\[1\] must be in \[0, 5\) or .* -100, got {v}")
          for v in (5, -1, 2**40)),
        (dict(ignore_index=1), r"targets_T\[1\] must be in \[0, 5\) or ignore_index 1, got -100"),
        (dict(targets_T=torch.full((3,), -100), reduction="mean"), "targets_T must have a token that .*, got 3"),
        (dict(x_TD=ONES(0, 4), targets_T=torch.ones(0).long(), reduction="mean"), "targets_T must have .*, got 0"),
        (dict(weight_VD=ONES(0, 4)), "weight_VD must have entries and a width > 0, got"),
        (dict(x_TD=ONES(3, 0), weight_VD=ONES(5, 0)), "weight_VD must have entries and a width > 0, got"),
        (dict(weight_VD=ONES(5, 4).bfloat16()), "weight_VD must have dtype float32, got bfloat16"),
        *((dict(ignore_index=v), f"ignore_index must be an integer, got {v!r}") for v in (1.0, "1", None, True)),
        *((dict(reduction=v), f"reduction must be one of mean, sum, none, got {v!r}") for v in ("avg", "", None, 1)),
    ],
}  # fmt: skip
# no automatic choice, and packed weights that are read on the CPU alone
NO_BACKEND = ("moe_pack", "moe_unpack")
