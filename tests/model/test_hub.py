"""Checkpoints: the hub's names and bytes, faults refused, transformers opens our export unpatched."""

from __future__ import annotations

import json
import math
import os
import resource
import warnings
from pathlib import Path

import pytest
import torch
from model_cases import MIXED, make_model, random_ids, relative, shake, stored
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hebatron import Hebatron, ModelConfig
from hebatron.hub import INDEX, SINGLE, export_hf, from_pretrained, hub_tensors, save_pretrained

# The hub's names for one layer of each kind, written out: a renamed module must fail here.
NAMES = {
    "backbone.embeddings.weight": (64, 64),
    "backbone.norm_f.weight": (64,),
    "lm_head.weight": (64, 64),
    **{f"backbone.layers.{i}.norm.weight": (64,) for i in range(4)},
    "backbone.layers.0.mixer.in_proj.weight": (64 + 128 + 4, 64),
    "backbone.layers.0.mixer.conv1d.weight": (128, 1, 4),
    "backbone.layers.0.mixer.conv1d.bias": (128,),
    "backbone.layers.0.mixer.A_log": (4,),
    "backbone.layers.0.mixer.D": (4,),
    "backbone.layers.0.mixer.dt_bias": (4,),
    "backbone.layers.0.mixer.norm.weight": (64,),
    "backbone.layers.0.mixer.out_proj.weight": (64, 64),
    "backbone.layers.1.mixer.gate.weight": (4, 64),
    "backbone.layers.1.mixer.gate.e_score_correction_bias": (4,),
    "backbone.layers.1.mixer.fc1_latent_proj.weight": (24, 64),
    "backbone.layers.1.mixer.fc2_latent_proj.weight": (64, 24),
    "backbone.layers.1.mixer.shared_experts.up_proj.weight": (32, 64),
    "backbone.layers.1.mixer.shared_experts.down_proj.weight": (64, 32),
    **{f"backbone.layers.1.mixer.experts.{j}.up_proj.weight": (32, 24) for j in range(4)},
    **{f"backbone.layers.1.mixer.experts.{j}.down_proj.weight": (24, 32) for j in range(4)},
    "backbone.layers.2.mixer.q_proj.weight": (64, 64),
    "backbone.layers.2.mixer.k_proj.weight": (32, 64),
    "backbone.layers.2.mixer.v_proj.weight": (32, 64),
    "backbone.layers.2.mixer.o_proj.weight": (64, 64),
    "backbone.layers.3.mixer.up_proj.weight": (48, 64),
    "backbone.layers.3.mixer.down_proj.weight": (64, 48),
}


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_names_and_shapes_on_disk_are_the_hubs(tmp_path: Path) -> None:
    make_model(MIXED).save_pretrained(tmp_path / "m")
    assert {name: tuple(t.shape) for name, t in stored(tmp_path / "m").items()} == NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_round_trip_is_byte_equal(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    model = make_model(MIXED)
    save_pretrained(model, tmp_path / "a", dtype, shard_bytes)
    again = Hebatron.from_pretrained(tmp_path / "a")
    save_pretrained(again, tmp_path / "b", shard_bytes=shard_bytes)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (tmp_path / "a" / INDEX).exists() == (shard_bytes == 60_000)
    if shard_bytes == 60_000:
        shards = [f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors")]
        assert len(shards) >= 2 and max(shards) < 60_000 + 4_000  # tensors, and a header
    assert again.compute_dtype == dtype
    ids = random_ids(MIXED, 2, 9)
    with torch.no_grad():
        assert dtype != torch.float32 or torch.equal(again(ids).logits, model(ids).logits)


def test_sensitive_tensors_stay_fp32_in_memory_and_keep_their_dtype_on_disk(tmp_path: Path) -> None:
    model = make_model(MIXED)
    save_pretrained(model, tmp_path / "a", torch.bfloat16)
    assert stored(tmp_path / "a")["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    rounded = {name: t.to(torch.bfloat16) for name, t in stored(tmp_path / "a").items()}
    save_file(rounded, tmp_path / "a" / SINGLE)  # as a trainer that casts everything leaves it
    again = Hebatron.from_pretrained(tmp_path / "a")
    sensitive = ("A_log", ".D", "dt_bias", "gate.weight", "correction_bias")
    for name, t in again.state_dict().items():
        assert t.dtype == (torch.float32 if name.endswith(sensitive) else torch.bfloat16), name
    again.save_pretrained(tmp_path / "b")
    assert all(t.dtype == torch.bfloat16 for t in stored(tmp_path / "b").values())


def test_fp32_masters_from_a_bfloat16_checkpoint_are_saved_as_trained(tmp_path: Path) -> None:
    save_pretrained(make_model(MIXED), tmp_path / "a", torch.bfloat16)
    save_file({n: t.to(torch.bfloat16) for n, t in stored(tmp_path / "a").items()}, tmp_path / "a" / SINGLE)
    model = Hebatron.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters()) and model.compute_dtype == torch.float32
    shake(model, seed=5)  # training moves every tensor to values bf16 does not have
    save_pretrained(model, tmp_path / "b")
    export_hf(model, None, tmp_path / "c", torch.float32)
    for folder in ("b", "c"):
        tensors = stored(tmp_path / folder)
        for name, tensor in hub_tensors(model).items():
            assert tensors[name].dtype == torch.float32 and torch.equal(tensors[name], tensor), name
    export_hf(model, None, tmp_path / "d", torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in stored(tmp_path / "d").values())


def test_fp16_checkpoint_is_computed_in_fp32_or_bfloat16(tmp_path: Path) -> None:
    make_model(MIXED).save_pretrained(tmp_path / "a")
    halves = {name: t.half() for name, t in stored(tmp_path / "a").items()}
    save_file(halves, tmp_path / "a" / SINGLE)
    model = Hebatron.from_pretrained(tmp_path / "a")
    assert model.compute_dtype == torch.float32
    assert all(torch.equal(t, halves[name].float()) for name, t in hub_tensors(model).items())
    assert Hebatron.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).compute_dtype == torch.bfloat16
    for dtype in (torch.float16, torch.float8_e4m3fn, torch.int64):
        with pytest.raises(ValueError, match=f"dtype must be float32, bfloat16 or float64, got {dtype}"):
            Hebatron.from_pretrained(tmp_path / "a", dtype=dtype)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = make_model(MIXED)
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = 3e38  # finite here, infinite in half precision
    with pytest.raises(ValueError, match=r"backbone.norm_f.weight must be finite"):
        save_pretrained(model, tmp_path / "a", torch.float16)
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log[1] = float("nan")
    with pytest.raises(ValueError, match=r"backbone.layers.0.mixer.A_log must be finite"):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"backbone.layers.0.mixer.A_log must be finite"):
        export_hf(model, None, tmp_path / "a", torch.float32)
    assert not list(tmp_path.iterdir())


def test_tied_head_is_stored_for_others_and_optional_for_us(tmp_path: Path) -> None:
    model = make_model(MIXED.replace(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "a")
    tensors = stored(tmp_path / "a")
    assert torch.equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    again = from_pretrained(tmp_path / "a")
    assert again.lm_head.weight is again.backbone.embeddings.weight
    head = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "a" / SINGLE)
    assert torch.equal(from_pretrained(tmp_path / "a").lm_head.weight, head)
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "a" / SINGLE)
    with pytest.raises(ValueError, match=r"lm_head.weight must equal the embeddings"):
        from_pretrained(tmp_path / "a")


def test_prediction_heads_are_ignored_with_a_notice(tmp_path: Path) -> None:
    make_model(MIXED).save_pretrained(tmp_path / "a")
    extra = {"mtp.layers.0.norm.weight": torch.ones(3), "mtp.layers.0.eh_proj.weight": torch.ones(3, 3)}
    save_file(stored(tmp_path / "a") | extra, tmp_path / "a" / SINGLE)
    with pytest.warns(UserWarning, match=r"2 mtp\.\* tensors are ignored"):
        from_pretrained(tmp_path / "a")


# ---- transformers


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.01, math.inf)])
def test_unpatched_transformers_opens_the_export_and_agrees(
    tmp_path: Path, limit: tuple[float, float]
) -> None:
    config = MIXED.replace(n_routed_experts=8, n_group=2, time_step_limit=limit, eos_token_id=None)
    model = make_model(config, seed=3)
    export_hf(model, None, tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = random_ids(config, 2, 37)
    with torch.no_grad():
        assert relative(model(ids).logits, theirs(ids).logits) <= 1e-5
    if limit[0] == 0.0:  # its one-token path ignores any clamp
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=16), wanted)

    theirs.save_pretrained(tmp_path / "theirs")
    ours = stored(tmp_path / "hf")
    assert {n: t.shape for n, t in stored(tmp_path / "theirs").items()} == {
        n: t.shape for n, t in ours.items()
    }
    assert all(torch.equal(t, ours[n]) for n, t in stored(tmp_path / "theirs").items())
    again = Hebatron.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_export_keeps_the_original_config_and_copies_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (tmp_path / "tok" / name).write_text("{}")
    export_hf(make_model(MIXED), tmp_path / "tok", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["time_step_min"] == 0.0
    assert ModelConfig.load(tmp_path / "hf") == MIXED
    assert {f.name for f in (tmp_path / "hf").iterdir()} == {
        *(SINGLE, "config.json", "hebatron.json", "generation_config.json", "tokenizer.json"),
        "tokenizer_config.json",
    }
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2]}


def test_export_refuses_what_transformers_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="time_step_limit must have no upper limit"):
        export_hf(make_model(MIXED.replace(time_step_limit=(0.0, 0.5))), None, tmp_path / "hf")
    with pytest.raises(ValueError, match="tokenizer_folder must hold"):
        export_hf(make_model(MIXED), tmp_path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(MIXED)
    model.save_pretrained(tmp_path / "a")
    before = files(tmp_path / "a")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        model.save_pretrained(tmp_path / "a")
    assert files(tmp_path / "a") == before

    (tmp_path / f".b.{os.getpid()}.tmp").mkdir()  # left by a run that was killed
    calls = []

    def full_disk(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("hebatron.hub.save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(model, tmp_path / "b", shard_bytes=60_000)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (30_000, hard)
    )  # what a full disk is to the writer: a short write
    try:
        with pytest.raises(OSError, match=rf"{SINGLE}: must be written whole, got"):
            save_pretrained(model, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]
    (tmp_path / "b").mkdir()
    save_pretrained(model, tmp_path / "b")
    assert files(tmp_path / "b") == before
