"""The configuration: hub files in and out, everything refused that would silently be another model, exact sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import NemotronHConfig

from hebatron import Hebatron, ModelConfig, presets
from hebatron.sizes import count_memory, count_parameters, describe

# The published Nano 30B-A3B file, as far as it matters here.
NANO: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": [2, 11],
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "initializer_range": 0.02,
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 64,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.4",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}


def test_published_config_is_the_preset_and_survives_a_round_trip() -> None:
    config = ModelConfig.from_hub(NANO)
    assert config == presets.nano_30b_a3b().replace(eos_token_id=(2, 11))
    written = config.to_hub()
    assert {name: written[name] for name in NANO} == NANO
    assert set(written) - set(NANO) == {"layers_block_type", "is_encoder_decoder"}
    assert ModelConfig.from_hub(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("name", presets.PRESETS)
def test_preset_survives_a_round_trip(name: str) -> None:
    config = presets.PRESETS[name]()
    assert ModelConfig.from_hub(json.loads(json.dumps(config.to_hub()))) == config


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    config = presets.tiny().replace(moe_latent_size=32, time_step_limit=(0.01, math.inf))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hub()))
    theirs = NemotronHConfig.from_pretrained(tmp_path)
    assert theirs.layers_block_type == ["linear_attention", "moe", "full_attention"]
    assert list(theirs.time_step_limit) == [0.01, math.inf]
    theirs.save_pretrained(tmp_path / "theirs")
    again = ModelConfig.load(tmp_path / "theirs")
    assert again == config.replace(intermediate_size=theirs.intermediate_size)


@pytest.mark.parametrize(
    "spelling",
    [
        {"hybrid_override_pattern": "M*E-"},
        {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
        {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]},
        {"layer_types": ["linear_attention", "full_attention", "moe", "mlp"], "num_hidden_layers": 4},
    ],
)
def test_every_spelling_of_the_layers_is_read(spelling: dict[str, Any]) -> None:
    hub = {n: v for n, v in NANO.items() if n not in ("hybrid_override_pattern", "num_hidden_layers")}
    assert ModelConfig.from_hub(hub | spelling).pattern == "M*E-"


def test_old_names_are_read() -> None:
    hub = {
        n: v
        for n, v in NANO.items()
        if n not in ("n_groups", "conv_kernel", "chunk_size", "layer_norm_epsilon")
    }
    old = {"mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_chunk_size": 64, "mamba_dt_limit": [0.0, math.inf]}
    config = ModelConfig.from_hub(hub | old | {"norm_eps": 1e-6})
    assert (config.n_groups, config.conv_kernel, config.chunk_size) == (4, 3, 64)
    assert (config.layer_norm_epsilon, config.time_step_limit) == (1e-6, (0.0, math.inf))


def test_remote_code_is_ignored_with_a_notice() -> None:
    with pytest.warns(UserWarning, match="auto_map is ignored"):
        config = ModelConfig.from_hub(NANO | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    assert "auto_map" not in config.to_hub()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hiden_size": 5}, "got 'hiden_size'; did you mean 'hidden_size'?"),
    ({"no_such_thing_at_all": 5}, "keys must be known, got 'no_such_thing_at_all'"),
    ({"model_type": "llama"}, "model_type must be 'nemotron_h', got 'llama'"),
    (
        {"num_hidden_layers": 53},
        r"num_hidden_layers must equal the layers of hybrid_override_pattern \(52\), got 53",
    ),
    ({"layers_block_type": ["moe"]}, "layers_block_type must agree with hybrid_override_pattern"),
    (
        {"hybrid_override_pattern": "MX"},
        "hybrid_override_pattern must be letters of M, E, \\* and -, got 'MX'",
    ),
    ({"layers_block_type": ["mamba", "rnn"]}, "layers_block_type must hold only .*, got 'rnn'"),
    ({"norm_eps": 1e-3}, "norm_eps must equal layer_norm_epsilon"),
    ({"mamba_num_heads": 7, "n_groups": 2}, r"mamba_num_heads must be a multiple of n_groups \(2\), got 7"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"num_key_value_heads must divide .*\(4\), got 3"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok must be >= 1, got 0"),
    (
        {"num_experts_per_tok": 129},
        "num_experts_per_tok must be <= the 128 experts a token can reach, got 129",
    ),
    (
        {"n_group": 64, "topk_group": 2},
        "num_experts_per_tok must be <= the 4 experts a token can reach, got 6",
    ),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ({"time_step_limit": [1.0, 0.0]}, r"time_step_limit must be \(low, high\) with 0 <= low < high"),
    ({"time_step_limit": "wide"}, "time_step_limit must be two numbers, got 'wide'"),
    ({"time_step_min": 0.2}, r"time_step_min must be in \[0, time_step_max \(0.1\)\], got 0.2"),
    ({"n_group": 3}, r"n_group must divide n_routed_experts \(128\), got 3"),
    ({"n_group": 128}, "n_group must leave at least 2 experts in each group"),
    ({"topk_group": 2}, r"topk_group must be <= n_group \(1\), got 2"),
    ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act must be 'relu2', got 'gelu'"),
    ({"mamba_hidden_act": "relu"}, "mamba_hidden_act must be 'silu', got 'relu'"),
    ({"sliding_window": 4096}, "sliding_window must be None"),
    ({"residual_in_fp32": True}, "residual_in_fp32 must be False"),
    ({"use_bias": True}, "use_bias must be False"),
    ({"block_configs": [{}]}, "block_configs must be absent"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be absent"),
    ({"hidden_size": "2688"}, "hidden_size must be int, got '2688'"),
    ({"hidden_size": True}, "hidden_size must be int, got True"),
    ({"hidden_size": 0}, "hidden_size must be >= 1, got 0"),
    ({"initializer_range": math.nan}, "initializer_range must be finite, got nan"),
    ({"pad_token_id": 131072}, r"pad_token_id must be in \[0, 131072\), got 131072"),
    ({"eos_token_id": [2, -1]}, r"eos_token_id must be in \[0, 131072\), got -1"),
    ({"eos_token_id": [True]}, r"eos_token_id must be in \[0, 131072\), got True"),
    ({"conv_kernel": 1}, "conv_kernel must be >= 2, got 1"),
    ({"head_dim": 0}, "head_dim must be >= 1, got 0"),
    ({"moe_latent_size": 0}, "moe_latent_size must be None or >= 1, got 0"),
    ({"n_shared_experts": 0}, "n_shared_experts must be >= 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[next(iter(change)) for change, _ in REFUSED])
def test_wrong_config_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hub(NANO | change)


@pytest.mark.parametrize(
    "missing", ["hidden_size", "vocab_size", "n_groups", "num_attention_heads", "n_routed_experts"]
)
def test_missing_size_is_refused_by_name(missing: str) -> None:
    with pytest.raises(ValueError, match=f"{missing} must be"):
        ModelConfig.from_hub({n: v for n, v in NANO.items() if n != missing})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a file"),
        ("{", "must be JSON"),
        ("[1]", "must hold a JSON object"),
        ("\x80", "must be JSON"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "config.json: must be JSON, got Exceeds the limit"),
    ],
)
def test_broken_config_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        ModelConfig.load(tmp_path)


# ---- sizes


def test_nano_counts_are_the_published_ones() -> None:
    counts = count_parameters(presets.nano_30b_a3b())
    assert counts.total == 31_577_937_344
    assert counts.active == 2_875_430_336
    assert counts.active_with_head == 3_227_751_872
    assert counts.active_with_embedding == 3_580_073_408
    assert counts.layers == {"mamba": 38_744_896, "attention": 23_399_040, "moe": 1_297_468_032}
    assert counts.active_layers["moe"] == 80_169_600
    assert (counts.embedding, counts.head, counts.final_norm) == (352_321_536, 352_321_536, 2_688)


def test_family_counts_are_the_published_ones() -> None:
    assert count_parameters(presets.nano_4b()).total == 3_973_556_832
    large = count_parameters(presets.super_120b_a12b())
    assert (large.total, large.active_with_head) == (120_668_687_360, 12_233_346_048)
    assert count_parameters(presets.scaled_570m()).total == 570_461_656
    assert count_parameters(presets.scaled_570m()).active_with_head == 54_463_960


def test_quickstart_models_are_of_equal_size() -> None:
    moe, dense = presets.quickstart(), presets.quickstart_dense()
    assert count_parameters(moe).total == count_parameters(dense).total == 6_191_670
    assert count_parameters(moe).active_with_head == 2_308_662
    assert moe.pattern == "MEM*EME" and dense.pattern == "M-M*-M-"


@pytest.mark.parametrize("name", ["nano_30b_a3b", "super_120b_a12b", "scaled_570m", "tiny"])
def test_dense_like_has_the_parameters_of_all_experts_or_of_the_active(name: str) -> None:
    moe = presets.PRESETS[name]()
    counts = count_parameters(moe)
    total, active = (count_parameters(presets.dense_like(moe, share)) for share in ("total", "active"))
    assert total.total == counts.total and active.active == counts.active
    assert active.total == active.active + counts.embedding + counts.head


@pytest.mark.parametrize(("name", "share"), [("tiny", "half"), ("nano_4b", "total")])
def test_dense_like_refuses_another_share_and_a_model_without_experts(name: str, share: str) -> None:
    with pytest.raises(ValueError, match=r"dense_like: share must be 'total' or 'active', of a model with"):
        presets.dense_like(presets.PRESETS[name](), share)


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_the_model_on_meta(name: str, tied: bool) -> None:
    config = presets.PRESETS[name]().replace(tie_word_embeddings=tied)
    model = Hebatron(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


def test_optional_parts_are_counted() -> None:
    config = presets.tiny().replace(use_conv_bias=False, moe_latent_size=24)
    model = Hebatron(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


def test_memory_of_a_context() -> None:
    memory = count_memory(presets.nano_30b_a3b(), 65536)
    assert memory.bytes_kv_per_token == 6144
    assert memory.bytes_kv == 402_653_184
    assert memory.bytes_scan_state == 48_234_496
    assert memory.bytes_weights == 2 * 31_577_937_344


def test_memory_of_a_cache_is_what_is_counted() -> None:
    config = presets.tiny()
    memory = count_memory(config, 128, bytes_per_value=4)
    cache = Hebatron(config).new_cache(1, capacity=128)
    assert cache.bytes_used == memory.bytes_kv + memory.bytes_scan_state + memory.bytes_conv_state


def test_card_names_the_figures() -> None:
    card = describe(presets.nano_30b_a3b())
    for figure in (
        "31,577,937,344",
        "2,875,430,336",
        "3,227,751,872",
        "3,580,073,408",
        "6,144 B a token",
        "48.23 MB",
    ):
        assert figure in card
    with pytest.raises(ValueError, match="context must be >= 0, got -1"):
        describe(presets.nano_30b_a3b(), -1)
