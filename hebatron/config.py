"""The model's configuration: one frozen dataclass that reads and writes the hub's config.json.

Field names are the hub's. A config of the Nemotron-H family lists one mixer per layer: Mamba-2 (`M`), attention
(`*`), mixture of experts (`E`) or a dense MLP (`-`). Everything is checked at construction.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .spelling import did_you_mean

KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
LETTERS = {kind: letter for letter, kind in KINDS.items()}
KIND_ALIASES = {"linear_attention": "mamba", "full_attention": "attention"} | {kind: kind for kind in LETTERS}

# Other spellings of our fields, as found in published configs and in the family's older code.
ALIASES = {
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
    "num_local_experts": "n_routed_experts",
    "attention_head_dim": "head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
}

# Switches this model has no code for: any other value would silently be another model.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "is_encoder_decoder": False,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "residual_in_fp32": False,
    "sliding_window": None,
    "use_bias": False,
}

# Known and without effect on what is computed (attention has no positions, so rope_theta is one of them); written
# back as they came.
PRESERVED = {
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "expand", "mamba_expand"),
    *("use_mamba_kernels", "mamba_ssm_cache_dtype", "num_logits_to_keep", "use_cache", "torch_dtype"),
    *("dtype", "architectures", "transformers_version", "moe_shared_expert_overlap"),
    *("output_router_logits", "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_layer_types"),
    *("mtp_hybrid_override_pattern", "output_attentions", "output_hidden_states", "return_dict"),
    *("problem_type", "id2label", "label2id", "chunk_size_feed_forward", "_name_or_path"),
    *("router_aux_loss_coef", "sep_token_id", "torchscript", "use_mem_eff_path", "time_step_rank"),
    *("is_decoder", "tokenizer_class", "decoder_start_token_id"),
}

# Real features of the family that exist in published configs and are refused by name.
REFUSED = {
    "block_configs": "per-layer block_configs (pruned variants) are not supported",
    "quantization_config": "quantised checkpoints are not supported; load the bf16 one",
}


@dataclass(frozen=True)
class ModelConfig:
    """A model of the Nemotron-3 family. Sizes of mixers that do not occur in `layers_block_type` may stay 0."""

    vocab_size: int
    hidden_size: int
    layers_block_type: tuple[str, ...]
    # attention: no positional encoding, scale 1/sqrt(head_dim)
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    # Mamba-2
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 0
    conv_kernel: int = 4
    use_conv_bias: bool = True
    chunk_size: int = 128
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    mamba_hidden_act: str = "silu"
    # mixture of experts
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 1
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # dense MLP
    intermediate_size: int = 0
    mlp_hidden_act: str = "relu2"
    # the rest
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    # initialisation only
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # keys of a hub config that are known and unused; see PRESERVED
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers_block_type", tuple(self.layers_block_type))
        object.__setattr__(self, "time_step_limit", tuple(self.time_step_limit))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        object.__setattr__(self, "extra", dict(self.extra))
        _check_types(self)
        _check_extra(self.extra)
        _check_sizes(self)

    # ---- derived sizes

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers_block_type)

    @property
    def pattern(self) -> str:
        """The layers as letters, e.g. `MEM*EME`."""
        return "".join(LETTERS[kind] for kind in self.layers_block_type)

    @property
    def d_inner(self) -> int:
        """Width of a Mamba mixer: heads x head size (the hub's `expand` is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_dim(self) -> int:
        """Width the routed experts work at: the latent size where there is one."""
        return self.hidden_size if self.moe_latent_size is None else self.moe_latent_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    # ---- in and out

    @staticmethod
    def from_pattern(pattern: str, **values: Any) -> ModelConfig:
        """A config from letters: `ModelConfig.from_pattern("MEM*EME", hidden_size=192, ...)`."""
        return ModelConfig(layers_block_type=parse_pattern(pattern), **values)

    @staticmethod
    def from_hub(hub: Mapping[str, Any]) -> ModelConfig:
        """Read the dictionary of a hub config.json. Unknown keys, and keys that contradict each other, are refused."""
        values = dict(hub)
        model_type = values.pop("model_type", "nemotron_h")
        if model_type != "nemotron_h":
            raise ValueError(f"config: model_type must be 'nemotron_h', got {model_type!r}")
        if values.pop("auto_map", None) is not None:
            warnings.warn("config: auto_map is ignored; a checkpoint's code is never run", stacklevel=2)
        values["layers_block_type"] = _read_layers(values)
        for alias, name in ALIASES.items():
            if alias in values:
                value = values.pop(alias)
                if values.setdefault(name, value) != value:
                    raise ValueError(f"config: {alias} must equal {name} ({values[name]!r}), got {value!r}")
        if "time_step_limit" in values:
            values["time_step_limit"] = _read_limit(values["time_step_limit"])
        own = {f.name for f in fields(ModelConfig)} - {"extra"}
        for name in ("vocab_size", "hidden_size"):
            _must(name in values, name, "be given", None)
        extra = {name: value for name, value in values.items() if name not in own}
        return ModelConfig(**{name: values[name] for name in values if name in own}, extra=extra)

    def to_hub(self) -> dict[str, Any]:
        """The dictionary of a hub config.json: what `from_hub` reads back to an equal config."""
        hub: dict[str, Any] = {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]}
        hub |= FIXED | dict(self.extra)
        hub |= {"num_hidden_layers": self.num_hidden_layers, "hybrid_override_pattern": self.pattern}
        for f in fields(self):
            value = getattr(self, f.name)
            unused = f.type == "int" and value == f.default == 0  # a size of a mixer this model has not
            if f.name != "extra" and not unused:
                hub[f.name] = list(value) if isinstance(value, tuple) else value
        hub["norm_eps"] = self.layer_norm_epsilon  # published configs carry both names
        if self.time_step_limit == (0.0, math.inf):
            del hub["time_step_limit"]  # as published: absent, because JSON has no infinity
        else:
            hub["time_step_limit"] = [_tag(x) for x in self.time_step_limit]
        if self.moe_latent_size is None:
            del hub["moe_latent_size"]
        return hub

    @staticmethod
    def load(path: str | Path) -> ModelConfig:
        """Read a config.json, or the one in a folder; values our export had to change are taken from hebatron.json."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        hub = read_json(file)
        original = file.with_name("hebatron.json")
        if original.is_file():
            overrides = read_json(original).get("config", {})
            if not isinstance(overrides, dict) or overrides.keys() - {"time_step_min"}:
                got = sorted(overrides)[:5] if isinstance(overrides, dict) else type(overrides).__name__
                raise ValueError(f"{original}: config must be an object of time_step_min alone, got {got}")
            hub |= overrides
        return ModelConfig.from_hub(hub)

    def replace(self, **changes: Any) -> ModelConfig:
        return replace(self, **changes)


def parse_pattern(pattern: str) -> tuple[str, ...]:
    """`"ME*-"` to `("mamba", "moe", "attention", "mlp")`."""
    wrong = sorted(set(pattern) - set(KINDS))
    if wrong or not pattern:
        raise ValueError(f"config: hybrid_override_pattern must be letters of M, E, * and -, got {pattern!r}")
    return tuple(KINDS[letter] for letter in pattern)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ValueError that names the file."""
    if not file.is_file():
        raise ValueError(f"{file}: must be a file, found none")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of 5,000 digits
        raise ValueError(f"{file}: must be JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(value).__name__}")
    return value


def _read_layers(values: dict[str, Any]) -> tuple[str, ...]:
    """Take every spelling of the layer list out of `values`; they must agree."""
    found: dict[str, tuple[str, ...]] = {}
    pattern = values.pop("hybrid_override_pattern", None)
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ValueError(f"config: hybrid_override_pattern must be a string, got {pattern!r}")
        found["hybrid_override_pattern"] = parse_pattern(pattern)
    for name in ("layers_block_type", "layer_types"):
        kinds = values.pop(name, None)
        if kinds is None:
            continue
        if not isinstance(kinds, Sequence) or isinstance(kinds, str):
            raise ValueError(f"config: {name} must be a list of layer kinds, got {kinds!r}")
        wrong = [kind for kind in kinds if not isinstance(kind, str) or kind not in KIND_ALIASES]
        if wrong:
            raise ValueError(f"config: {name} must hold only {sorted(KIND_ALIASES)}, got {wrong[0]!r}")
        found[name] = tuple(KIND_ALIASES[kind] for kind in kinds)
    count = values.pop("num_hidden_layers", None)
    if not found:
        raise ValueError("config: hybrid_override_pattern or layers_block_type must be given, got neither")
    (first, layers), *others = found.items()
    for name, other in others:
        if other != layers:
            raise ValueError(f"config: {name} must agree with {first}, got {other} and {layers}")
    if count is not None and count != len(layers):
        rule = f"equal the layers of {first} ({len(layers)})"
        raise ValueError(f"config: num_hidden_layers must {rule}, got {count!r}")
    return layers


def _tag(value: float) -> Any:
    return {"__float__": "Infinity"} if value == math.inf else value


def _read_limit(value: Any) -> tuple[float, ...]:
    """Two numbers; an infinity, which JSON cannot hold, comes as the tag transformers writes."""
    if isinstance(value, (list, tuple)):
        limit = [math.inf if item == _tag(math.inf) else item for item in value]
        if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in limit):
            return tuple(limit)
    raise ValueError(f"config: time_step_limit must be two numbers, got {value!r}")


def _must(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"config: {name} must {rule}, got {value!r}")


def _check_extra(extra: Mapping[str, Any]) -> None:
    own = {f.name for f in fields(ModelConfig)} - {"extra"}
    known = own | set(ALIASES) | set(FIXED) | PRESERVED
    for name, value in extra.items():
        if name in REFUSED:
            raise ValueError(f"config: {name} must be absent ({REFUSED[name]}), got {type(value).__name__}")
        if name in FIXED:
            _must(value == FIXED[name], name, f"be {FIXED[name]!r}, this model has nothing else", value)
        elif name not in PRESERVED:
            raise ValueError(f"config: keys must be known, got {name!r}{did_you_mean(name, known)}")


def _check_types(config: ModelConfig) -> None:
    """The plain kinds of value by annotation, so that a JSON string in a number's place is named here."""
    for f in fields(config):
        value, annotation = getattr(config, f.name), str(f.type)
        if annotation.startswith("int"):
            allowed: tuple[type, ...] = (int,) if "tuple" not in annotation else (int, tuple)
        elif annotation in ("float", "bool", "str"):
            allowed = {"float": (int, float), "bool": (bool,), "str": (str,)}[annotation]
        else:
            continue
        if value is None and "None" in annotation:
            continue
        right = isinstance(value, allowed) and (annotation == "bool" or not isinstance(value, bool))
        _must(right, f.name, f"be {annotation}", value)
        if isinstance(value, float):
            _must(math.isfinite(value), f.name, "be finite", value)


def _check_sizes(c: ModelConfig) -> None:
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        _must(getattr(c, name) >= 1, name, "be >= 1", getattr(c, name))
    _must(len(c.layers_block_type) >= 1, "layers_block_type", "hold at least one layer", c.layers_block_type)
    wrong = [kind for kind in c.layers_block_type if kind not in LETTERS]
    _must(not wrong, "layers_block_type", f"hold only {sorted(LETTERS)}", wrong[:1])
    _must(c.layer_norm_epsilon > 0, "layer_norm_epsilon", "be > 0", c.layer_norm_epsilon)
    _must(c.initializer_range > 0, "initializer_range", "be > 0", c.initializer_range)
    _must(c.mlp_hidden_act == "relu2", "mlp_hidden_act", "be 'relu2'", c.mlp_hidden_act)
    _must(c.mamba_hidden_act == "silu", "mamba_hidden_act", "be 'silu'", c.mamba_hidden_act)
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(c, name)
        _must(value is None or 0 <= value < c.vocab_size, name, f"be in [0, {c.vocab_size})", value)
    for value in c.eos_token_ids:
        inside = type(value) is int and 0 <= value < c.vocab_size
        _must(inside, "eos_token_id", f"be in [0, {c.vocab_size})", value)
    for kind, check in (("attention", _check_attention), ("mamba", _check_mamba), ("moe", _check_moe)):
        if kind in c.layers_block_type:
            check(c)
    if "mlp" in c.layers_block_type:
        _must(c.intermediate_size >= 1, "intermediate_size", "be >= 1", c.intermediate_size)


def _check_attention(c: ModelConfig) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        _must(getattr(c, name) >= 1, name, "be >= 1", getattr(c, name))
    rule = f"divide num_attention_heads ({c.num_attention_heads})"
    heads = c.num_key_value_heads
    _must(c.num_attention_heads % heads == 0, "num_key_value_heads", rule, heads)


def _check_mamba(c: ModelConfig) -> None:
    for name in ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "chunk_size"):
        _must(getattr(c, name) >= 1, name, "be >= 1", getattr(c, name))
    _must(c.conv_kernel >= 2, "conv_kernel", "be >= 2", c.conv_kernel)
    rule = f"be a multiple of n_groups ({c.n_groups})"
    _must(c.mamba_num_heads % c.n_groups == 0, "mamba_num_heads", rule, c.mamba_num_heads)
    _must(len(c.time_step_limit) == 2, "time_step_limit", "be two numbers", c.time_step_limit)
    low, high = c.time_step_limit
    _must(0 <= low < high, "time_step_limit", "be (low, high) with 0 <= low < high", c.time_step_limit)
    for name in ("time_step_max", "time_step_floor"):
        _must(getattr(c, name) > 0, name, "be > 0", getattr(c, name))
    rule = f"be in [0, time_step_max ({c.time_step_max})]"  # 0.0 is what our export writes
    _must(0 <= c.time_step_min <= c.time_step_max, "time_step_min", rule, c.time_step_min)


def _check_moe(c: ModelConfig) -> None:
    names = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size")
    for name in (*names, "moe_shared_expert_intermediate_size", "n_group", "topk_group"):
        _must(getattr(c, name) >= 1, name, "be >= 1", getattr(c, name))
    latent = c.moe_latent_size
    _must(latent is None or latent >= 1, "moe_latent_size", "be None or >= 1", latent)
    rule = f"divide n_routed_experts ({c.n_routed_experts})"
    _must(c.n_routed_experts % c.n_group == 0, "n_group", rule, c.n_group)
    per_group = c.n_routed_experts // c.n_group
    rule = f"leave at least 2 experts in each group (n_routed_experts {c.n_routed_experts})"
    _must(c.n_group == 1 or per_group >= 2, "n_group", rule, c.n_group)
    _must(c.topk_group <= c.n_group, "topk_group", f"be <= n_group ({c.n_group})", c.topk_group)
    reach = per_group * c.topk_group
    rule = f"be <= the {reach} experts a token can reach"
    _must(c.num_experts_per_tok <= reach, "num_experts_per_tok", rule, c.num_experts_per_tok)
    _must(c.routed_scaling_factor > 0, "routed_scaling_factor", "be > 0", c.routed_scaling_factor)
