"""transformers' model on our operators: the same logits, gradients and texts as on its own, and back again."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import (
    MIXED,
    check_gradients,
    ends,
    make_model,
    make_oracle,
    random_config,
    random_ids,
    relative,
)
from torch import Tensor, nn
from transformers import DynamicCache, NemotronHForCausalLM

from hebatron import ModelConfig, accelerate
from hebatron.acceleration.layers import OURS

# the cache's name in a forward and its output: another one up to transformers 5.23
CACHE = (
    "cache" if "cache" in inspect.signature(NemotronHForCausalLM.forward).parameters else "past_key_values"
)
CLOSE = 1e-5  # of the largest logit
ALL_KINDS = MIXED.replace(
    layers_block_type=("mamba", "moe", "attention", "mlp", "mamba", "moe"),
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    chunk_size=8,
)


def make_pair(config: ModelConfig = ALL_KINDS, seed: int = 0, train: bool = False) -> tuple[Any, Any]:
    """transformers' model with the right limit of the step, and an accelerated copy."""
    theirs = make_oracle(make_model(config, seed)).train(train)
    return theirs, accelerate(copy.deepcopy(theirs))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def padded_rows(config: ModelConfig, side: str) -> tuple[Tensor, Tensor]:
    """Rows of 11, 5 and 17 tokens and their mask."""
    ids = random_ids(config, 3, 17, 3)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((11, 5, 17)):
        mask[row, slice(17 - length, None) if side == "left" else slice(length)] = 1
    return ids, mask


@pytest.mark.parametrize("seed", range(24))
def test_logits_loss_and_gradients_match(seed: int) -> None:
    config = random_config(seed)
    theirs, ours = make_pair(config, seed, train=True)
    ids = random_ids(config, 2, 2 * config.chunk_size + seed % 3, seed)
    wanted = theirs(ids, labels=ids, use_cache=False)
    got = ours(ids, labels=ids, use_cache=False)
    assert relative(got.logits, wanted.logits) <= CLOSE
    assert abs(got.loss - wanted.loss) <= CLOSE * wanted.loss
    wanted.loss.backward()
    got.loss.backward()
    check_gradients(dict(ours.named_parameters()), gradients(theirs))


def test_every_kind_of_layer_becomes_ours() -> None:
    theirs, ours = make_pair()
    kinds = Counter(type(m) for m in theirs.modules() if type(m) in OURS)
    assert kinds.keys() == OURS.keys()
    assert Counter(type(m) for m in ours.modules() if type(m) in OURS.values()) == {
        OURS[kind]: n for kind, n in kinds.items()
    }
    assert not any(type(m) in OURS for m in ours.modules())


def test_steps_are_limited_by_the_configs_limit() -> None:
    """A model fresh from transformers clamps at time_step_min: 0.001 unless an export set it to 0."""
    right, _ = make_pair()
    ids = random_ids(ALL_KINDS, 1, 20)
    wanted = right(ids).logits
    fresh = copy.deepcopy(right)
    for module in fresh.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.001, math.inf)
    assert relative(fresh(ids).logits, wanted) > 1e-3
    assert relative(accelerate(fresh)(ids).logits, wanted) <= CLOSE
    fresh.config.time_step_limit = [0.001, math.inf]
    limited = fresh(ids).logits
    assert (
        relative(limited, wanted) > 1e-3
        and relative(limited, accelerate(fresh, undo=True)(ids).logits) <= CLOSE
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_matches_and_hides_what_stands_there(side: str, implementation: str) -> None:
    theirs, ours = make_pair(train=True)
    theirs.set_attn_implementation(implementation)
    ours.set_attn_implementation(implementation)
    ids, mask = padded_rows(ALL_KINDS, side)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # the padding foretells nothing
    wanted = theirs(ids, attention_mask=mask, labels=labels, use_cache=False)
    got = ours(ids, attention_mask=mask, labels=labels, use_cache=False)
    here = mask.bool()
    assert relative(got.logits[here], wanted.logits[here]) <= CLOSE and torch.isfinite(got.logits).all()
    other = torch.where(here, ids, (ids + 7) % ALL_KINDS.vocab_size)
    assert torch.equal(
        ours(other, attention_mask=mask).logits[here], ours(ids, attention_mask=mask).logits[here]
    )
    wanted.loss.backward()
    got.loss.backward()
    check_gradients(dict(ours.named_parameters()), gradients(theirs))


def test_rows_without_a_token_are_harmless() -> None:
    _, ours = make_pair()
    ids, mask = padded_rows(ALL_KINDS, "left")
    mask[1] = 0
    got = ours(ids, attention_mask=mask).logits
    alone = ours(ids[2:], attention_mask=mask[2:]).logits
    assert torch.isfinite(got).all() and relative(got[2:], alone) <= CLOSE


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_matches(beams: int) -> None:
    theirs, ours = make_pair()
    ids, mask = padded_rows(ALL_KINDS, "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0, "num_beams": beams}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize("grad", [False, True])
def test_cached_pieces_are_the_whole(grad: bool) -> None:
    """Prefill, a piece, single tokens: each step's logits are those of the whole text."""
    _, ours = make_pair()
    ids = random_ids(ALL_KINDS, 2, 24)
    with torch.set_grad_enabled(grad):
        wanted = ours(ids, use_cache=False).logits
        cache = DynamicCache(config=ours.config)
        pieces = [
            ours(part, **{CACHE: cache}, use_cache=True).logits for part in ids.split([9, 11, 1, 1, 1, 1], 1)
        ]
        assert relative(torch.cat(pieces, 1), wanted) <= CLOSE
        if grad:
            torch.cat(pieces, 1).sum().backward()


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_padding_is_each_row_alone(side: str) -> None:
    """On the right too, where transformers' states run on through the padding."""
    _, ours = make_pair()
    ids, mask = padded_rows(ALL_KINDS, side)
    more = random_ids(ALL_KINDS, 3, 6, 8)
    with torch.no_grad():
        cache = ours(ids, attention_mask=mask, use_cache=True)[CACHE]
        got = []
        for part in more.split([3, 1, 1, 1], 1):
            mask = torch.cat([mask, torch.ones_like(part)], 1)
            got.append(ours(part, attention_mask=mask, **{CACHE: cache}).logits)
        for row in range(3):
            whole = torch.cat([ids[row][mask[row, :17] == 1], more[row]])[None]
            assert relative(torch.cat(got, 1)[row], ours(whole).logits[0, -6:]) <= CLOSE


@pytest.mark.parametrize("way", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_documents_are_each_alone(way: str) -> None:
    _, ours = make_pair(train=True)
    lengths = [13, 1, 8, 7]
    ids = random_ids(ALL_KINDS, 1, sum(lengths), 4)
    packed: dict[str, Any] = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if way == "cu_seq_lens_q":
        packed |= {"cu_seq_lens_q": ends(0, 13, 14, 22, 29), "cu_seq_lens_k": ends(0, 13, 14, 22, 29)}
    elif way == "seq_idx":
        packed = {"seq_idx": torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]}
    alone = [ours(part).logits for part in ids.split(lengths, 1)]
    together = ours(ids, **packed)
    assert getattr(together, CACHE) is None
    assert relative(together.logits, torch.cat(alone, 1)) <= CLOSE
    torch.cat(alone, 1).square().mean().backward()
    wanted = {n: None if g is None else g.clone() for n, g in gradients(ours).items()}
    ours.zero_grad()
    together.logits.square().mean().backward()
    check_gradients(dict(ours.named_parameters()), wanted)


def test_documents_in_several_rows_are_each_alone() -> None:
    _, ours = make_pair()
    ids = random_ids(ALL_KINDS, 2, 12)
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    got = ours(ids, position_ids=positions).logits
    assert relative(got[0, 5:], ours(ids[:1, 5:]).logits[0]) <= CLOSE
    assert relative(got[1], ours(ids[1:]).logits[0]) <= CLOSE


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    _, ours = make_pair(train=True)
    ids, mask = padded_rows(ALL_KINDS, "right")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
            ours.enable_input_require_grads()
        ours.zero_grad()
        ours(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        found.append({n: p.grad.clone() for n, p in ours.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_recorded_outputs_match() -> None:
    theirs, ours = make_pair()
    ids = random_ids(ALL_KINDS, 2, 11)
    options = {"output_router_logits": True, "output_hidden_states": True}
    wanted, got = theirs(ids, **options), ours(ids, **options)
    assert len(got.router_logits) == 2 and len(got.hidden_states) == len(ALL_KINDS.layers_block_type) + 1
    for a, b in zip((*got.router_logits, *got.hidden_states), (*wanted.router_logits, *wanted.hidden_states)):
        assert relative(a, b) <= CLOSE


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_is_as_close_as_transformers(way: str) -> None:
    """Our distance to the fp32 logits is at most 1.5 times transformers', and so are the gradients'. Every token goes
    to every expert: one choice that falls otherwise would outweigh all rounding."""
    every = ALL_KINDS.replace(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)
    theirs, ours = make_pair(every, train=True)
    ids = random_ids(ALL_KINDS, 4, 40)
    exact = theirs(ids, labels=ids, use_cache=False)
    exact.loss.backward()
    wanted = {n: g.clone() for n, g in gradients(theirs).items() if g is not None}
    distance: list[tuple[float, float]] = []
    for model in (theirs, ours):
        model.zero_grad()
        if way == "weights":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        logits = (out.logits - exact.logits).square().mean().sqrt().item()
        found = {n: g.float() for n, g in gradients(model).items() if n in wanted and g is not None}
        assert found.keys() == wanted.keys()
        grads = sum(((found[n] - g).norm() / g.norm()).item() for n, g in wanted.items()) / len(wanted)
        distance.append((logits, grads))
    assert distance[1][0] <= 1.5 * distance[0][0] and distance[1][1] <= 1.5 * distance[0][1], distance


def test_bfloat16_generation_runs_on_the_cache() -> None:
    _, ours = make_pair()
    ours.to(torch.bfloat16)
    ids, mask = padded_rows(ALL_KINDS, "left")
    with torch.no_grad():
        text = ours.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
        whole = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], 1)
        logits = ours(text, attention_mask=whole).logits[:, 16:-1]
        chosen = logits.gather(2, text[:, 17:, None])[..., 0]
    assert (chosen >= logits.amax(-1) - 0.03 * logits.abs().max()).all()  # greedy up to bf16's rounding


# ---- in place and back


def test_undo_restores_everything() -> None:
    model = make_oracle(make_model(ALL_KINDS))
    ids = random_ids(ALL_KINDS, 2, 20)
    before = (
        [(name, type(m), m.forward.__func__, set(vars(m))) for name, m in model.named_modules()],
        [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()],
        model(ids).logits,
    )
    assert accelerate(model) is model
    assert [(n, id(t)) for n, t in model.state_dict(keep_vars=True).items()] == before[1]
    assert not torch.equal(model(ids).logits, before[2])  # other sums, other rounding
    assert accelerate(model, undo=True) is model
    assert [(n, type(m), m.forward.__func__, set(vars(m))) for n, m in model.named_modules()] == before[0]
    assert torch.equal(model(ids).logits, before[2])
    assert not model.model._forward_pre_hooks and not model.model._forward_pre_hooks_with_kwargs
    accelerate(model, undo=True)


def test_twice_is_once() -> None:
    _, ours = make_pair()
    classes = [type(m) for m in ours.modules()]
    accelerate(ours)
    assert [type(m) for m in ours.modules()] == classes and len(ours.model._forward_pre_hooks) == 1
    accelerate(ours, undo=True)
    assert not ours.model._forward_pre_hooks


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_accelerated_and_their_own(way: str) -> None:
    _, ours = make_pair()
    ids = random_ids(ALL_KINDS, 2, 9)
    wanted = ours(ids).logits
    twin = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert torch.equal(twin(ids).logits, wanted) and twin.model._forward_pre_hooks
    accelerate(twin, undo=True)
    assert not any(type(m) in OURS.values() for m in twin.modules())
    assert any(type(m) in OURS.values() for m in ours.modules())


def test_saved_folder_is_transformers_own(tmp_path: Path) -> None:
    theirs, ours = make_pair()
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").read_text().count("hebatron")
    again = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert type(again) is NemotronHForCausalLM and again.state_dict().keys() == theirs.state_dict().keys()
    ids = random_ids(ALL_KINDS, 1, 9)
    assert torch.equal(accelerate(again.eval())(ids).logits, ours(ids).logits)
