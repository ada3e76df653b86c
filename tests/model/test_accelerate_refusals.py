"""What `accelerate` and an accelerated forward do not serve, each by its name."""

from __future__ import annotations

import ast
import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import make_model, make_oracle, random_ids, relative
from test_accelerate import ALL_KINDS, CACHE, CLOSE, make_pair
from torch import nn
from transformers import BertConfig, BertModel, StaticCache
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

import hebatron
from hebatron import accelerate
from hebatron.acceleration.layers import OURS, Attention


class OtherExperts(nn.Module):
    """As a quantised checkpoint's would be: another class in the place."""


class OtherNorm(theirs.NemotronHRMSNorm):
    pass


def make_theirs() -> Any:
    return make_oracle(make_model(ALL_KINDS)).eval()


def rename(field: str, value: Any) -> Any:
    def change(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, field):
                setattr(module, field, value)

    return change


def spoil_config(field: str, value: Any) -> Any:
    return lambda model: setattr(model.config, field, value)


def spoil_experts(model: Any) -> None:
    model.model.layers[1].mixer.experts = OtherExperts()


def spoil_forward(model: Any) -> None:
    norm = model.model.norm_f
    norm.forward = types.MethodType(theirs.NemotronHRMSNorm.forward, norm)


def subclass_norm(model: Any) -> None:
    model.model.layers[2].norm.__class__ = OtherNorm


def quantise(model: Any) -> None:
    model.model.norm_f.weight = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)


def wrap_conv(model: Any) -> None:
    model.model.layers[0].mixer.conv1d = nn.Sequential(model.model.layers[0].mixer.conv1d)


UNSERVED = [
    (spoil_experts, r"model\.layers\.1\.mixer\.experts: OtherExperts is not transformers' class$"),
    (lambda m: m.model.layers[3].__setattr__("mixer", nn.Identity()), r"layers\.3\.mixer: Identity is not"),
    (spoil_forward, r"model\.norm_f: its forward was replaced on the instance"),
    (subclass_norm, r"layers\.2\.norm: OtherNorm is not transformers' class but one made of it"),
    (quantise, r"norm_f: weight must be a plain floating tensor, got Parameter of torch\.int8"),
    (wrap_conv, r"layers\.0\.mixer: conv1d must be a plain Conv1d .* got Sequential"),
    (rename("activation", "gelu"), r"layers\.0\.mixer: mamba_hidden_act must be 'silu', got 'gelu'"),
    (rename("attention_dropout", 0.1), r"layers\.2\.mixer: attention_dropout must be 0, got 0\.1"),
    (spoil_config("is_causal", False), r"layers\.2\.mixer: config\.is_causal must be True, got False"),
    (spoil_config("time_step_limit", [0.2, 0.1]), r"layers\.0\.mixer: time_step_limit must be \(low, high\)"),
    (spoil_config("mlp_hidden_act", "silu"), r"layers\.1\.mixer\.experts: mlp_hidden_act must be 'relu2'"),
    (rename("_is_expert_parallel", True), r"experts: experts must all be in this process"),
    (lambda m: m.half(), r"experts: weights must be float32, bfloat16 or float64, got torch\.float16"),
]


@pytest.mark.parametrize("spoil, message", UNSERVED)
def test_unserved_layers_are_named_and_nothing_is_changed(spoil: Any, message: str) -> None:
    model = make_theirs()
    spoil(model)
    with pytest.raises(ValueError, match=rf"accelerate: model must have only layers .*{message}"):
        accelerate(model)
    assert not any(type(m) in OURS.values() for m in model.modules())
    assert not model.model._forward_pre_hooks


def test_all_unserved_layers_are_counted() -> None:
    model = make_oracle(make_model(ALL_KINDS.replace(layers_block_type=("mamba", "attention") * 6)))
    rename("activation", "gelu")(model)
    rename("attention_dropout", 0.1)(model)
    with pytest.raises(ValueError, match=r"; and 2 more$"):
        accelerate(model)


@pytest.mark.parametrize("spoil", [rename("attention_dropout", 0.1), subclass_norm])
def test_the_rest_is_served_where_asked(spoil: Any) -> None:
    """Layers that stay transformers' get the masks they read, padding included."""
    model = make_theirs()
    spoil(model)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="left as transformers computes them: model.layers.2"):
        accelerate(model, strict=False)
    assert sum(type(m) in OURS.values() for m in model.modules()) == sum(
        type(m) in OURS for m in before.modules()
    ) - (type(model.model.layers[2].norm) is not OtherNorm)
    ids = random_ids(ALL_KINDS, 2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    got = model(ids, attention_mask=mask).logits[mask == 1]
    assert relative(got, before(ids, attention_mask=mask).logits[mask == 1]) <= CLOSE
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    options |= {"eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), before.generate(ids, **options))


@pytest.mark.parametrize(
    "model, message",
    [
        (None, "model must be a module, got NoneType"),
        (nn.Linear(2, 2), r"model must hold a NemotronHModel .* got torch\.nn\.modules\.linear\.Linear"),
        (make_model(ALL_KINDS), r"model must hold a NemotronHModel .* got hebatron\.model\.Hebatron"),
        (
            BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)),
            r"model must hold a NemotronHModel .* got transformers\.models\.bert\.modeling_bert\.BertModel",
        ),
    ],
)  # fmt: skip
def test_other_models_are_refused(model: Any, message: str) -> None:
    for undo in (False, True):
        with pytest.raises(ValueError, match=f"accelerate: {message}"):
            accelerate(model, undo=undo)


def test_undo_refuses_classes_made_of_ours() -> None:
    _, ours = make_pair()
    layer = ours.model.layers[2].mixer
    layer.__class__ = type("FSDPAttention", (Attention,), {})
    with pytest.raises(ValueError, match=r"got another made of it at model\.layers\.2\.mixer$"):
        accelerate(ours, undo=True)
    assert isinstance(ours.model.norm_f, tuple(OURS.values()))


IDS = random_ids(ALL_KINDS, 2, 6)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2]])
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask must be None or \(rows, tokens\).*shape \(2, 1"),
    ({"attention_mask": {"full_attention": None}}, "attention_mask must be None or .* got dict"),
    ({"attention_mask": torch.ones(2, 5)}, r"attention_mask must have shape \(2, 6\), .* got \(2, 5\)"),
    ({"output_attentions": True}, "output_attentions must be off"),
    ({"is_causal": False}, "is_causal must be True"),
    ({"position_ids": POSITIONS[:, :5]}, r"position_ids must have shape \(2, 6\), got \(1, 5\)"),
    ({"seq_idx": POSITIONS, "attention_mask": torch.ones(2, 6)}, "seq_idx must come without attention_mask"),
    ({"cu_seq_lens_q": torch.tensor([0, 6]), "use_cache": True}, "cu_seq_lens_q must come without"),
    ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q must come with one row, got 2 rows"),
    (
        {
            "input_ids": IDS[:1],
            "cu_seq_lens_q": torch.tensor([0, 2, 6]),
            "cu_seq_lens_k": torch.tensor([0, 3, 6]),
        },
        "cu_seq_lens_k must equal cu_seq_lens_q",
    ),
    ({CACHE: 3}, "cache must be a Cache of transformers .* got int"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", BAD_CALLS)
def test_forward_refuses(arguments: dict[str, Any], message: str) -> None:
    _, ours = make_pair()
    with pytest.raises(ValueError, match=f"accelerated forward: {message}"):
        ours(**({"input_ids": IDS} | arguments))


def test_forward_refuses_static_and_recording_caches() -> None:
    _, ours = make_pair()
    cache = ours(IDS, use_cache=True)[CACHE]
    cache.activate_past_recording()
    for wrong in (cache, StaticCache(config=ours.config, max_cache_len=16)):
        with pytest.raises(ValueError, match="cache must grow, and record no past"):
            ours(IDS, **{CACHE: wrong})


def test_a_layer_is_not_called_without_its_model() -> None:
    _, ours = make_pair()
    with pytest.raises(ValueError, match="layout must come from the model"):
        ours.model.layers[0].mixer(torch.zeros(1, 2, ALL_KINDS.hidden_size))


def test_the_model_says_itself_what_is_missing() -> None:
    _, ours = make_pair()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        ours()


def test_positional_arguments_and_embeddings_are_understood() -> None:
    _, ours = make_pair()
    wanted = ours.model(IDS).last_hidden_state
    assert torch.equal(
        ours.model(input_ids=None, inputs_embeds=ours.model.embeddings(IDS)).last_hidden_state, wanted
    )
    packed = ours.model(IDS, None, POSITIONS.expand(2, -1)).last_hidden_state
    assert relative(packed[:, :3], wanted[:, :3]) <= CLOSE and not torch.allclose(
        packed[:, 3:], wanted[:, 3:]
    )


def test_old_and_missing_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_theirs()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.17.0")
    with pytest.raises(ValueError, match=r"transformers must be 5\.23 or newer, got 5\.17\.0"):
        accelerate(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r"transformers must be installed, got none; pip install 'hebatron\[hf\]'"
    ):
        accelerate(model)


def test_transformers_is_imported_only_by_who_asks() -> None:
    """At the top of a file that nobody imports at the top of theirs: `import hebatron` goes without it."""
    package = Path(hebatron.__file__).parent
    for path in package.rglob("*.py"):
        imports = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        top = {module.partition(".")[0] for module in modules}
        assert "transformers" not in top or path.name == "layers.py", path
        assert "layers" not in top and "acceleration" not in top, path
