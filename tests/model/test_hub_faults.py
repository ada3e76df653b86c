"""Damaged and hostile checkpoints: every fault is refused, and named, before a weight is used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import MIXED, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from hebatron.hub import INDEX, SINGLE, from_pretrained, hub_tensors, save_pretrained


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    save_pretrained(make_model(MIXED), folder, shard_bytes=60_000)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    if old in tensors:
        tensors[new] = tensors.pop(old)


def replace(tensors: dict[str, Tensor], name: str, value: Callable[[Tensor], Tensor]) -> None:
    if name in tensors:
        tensors[name] = value(tensors[name]).contiguous()


Q = "backbone.layers.2.mixer.q_proj.weight"
K = "backbone.layers.2.mixer.k_proj.weight"
TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(Q, None), f"{Q} is missing"),
    "extra": (lambda t: Q in t and t.update(surprise=torch.ones(2)), "surprise is not in this model"),
    "renamed": (
        lambda t: rename(t, "backbone.embeddings.weight", "backbone.embedding.weight"),
        "got 2 that differ: backbone.embedding.weight is not in this model; backbone.embeddings.weight is missing",
    ),
    "shape": (
        lambda t: replace(t, K, lambda x: x[:8]),
        rf"{K} has shape \(8, 64\), the config says \(32, 64\)",
    ),
    "transposed": (lambda t: replace(t, K, lambda x: x.T), rf"{K} has shape \(64, 32\)"),
    "integer": (lambda t: replace(t, Q, lambda x: x.to(torch.int8)), f"{Q} has dtype I8"),
    "nan": (lambda t: replace(t, Q, lambda x: x * float("nan")), f"{Q} must be finite"),
    "infinite": (lambda t: replace(t, "lm_head.weight", lambda x: x / 0), "lm_head.weight must be finite"),
    "an expert": (
        lambda t: t.pop("backbone.layers.1.mixer.experts.2.up_proj.weight", None),
        "experts.2.up_proj.weight is missing",
    ),
    "the bias": (
        lambda t: t.pop("backbone.layers.1.mixer.gate.e_score_correction_bias", None),
        "e_score_correction_bias is missing",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors_are_refused_by_name(good: Path, fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    change_tensors(good, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(good)


def test_many_wrong_tensors_are_one_error_naming_ten(good: Path) -> None:
    config = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps(config | {"n_routed_experts": 20}))
    with pytest.raises(ValueError, match=r"got 34 that differ: .*; and 24 more$") as error:
        from_pretrained(good)
    assert str(error.value).count(";") == 10
    (good / "config.json").write_text(
        json.dumps(config | {"layers_block_type": None, "num_hidden_layers": 5})
    )
    with pytest.raises(ValueError, match="num_hidden_layers must equal"):
        from_pretrained(good)


def test_truncated_shard_is_refused_with_both_sizes(good: Path) -> None:
    file = sorted(good.glob("*.safetensors"))[1]
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for keep in [
        0,
        1,
        7,
        8,
        9,
        header // 2,
        header - 1,
        header,
        header + 1,
        len(content) // 2,
        len(content) - 1,
    ]:
        file.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=file.name) as error:
            from_pretrained(good)
        assert f"got {keep:,}" in str(error.value)
    file.write_bytes(content + b"x")
    with pytest.raises(
        ValueError, match=rf"must have {len(content):,} bytes by its header, got {len(content) + 1:,}"
    ):
        from_pretrained(good)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff\xff"])
def test_hostile_header_is_refused(good: Path, header: bytes) -> None:
    file = sorted(good.glob("*.safetensors"))[0]
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=file.name):
        from_pretrained(good)
    for length in (2**63, 100_000_001, 0):
        file.write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=file.name):
            from_pretrained(good)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "model.bin",
        "gone.safetensors",
        "",
        7,
        None,
        "\0.safetensors",
    ],
)
def test_index_may_name_only_plain_files_of_its_folder(good: Path, name: object) -> None:
    save_file({"x": torch.ones(1)}, good.parent / "x.safetensors")
    index = json.loads((good / INDEX).read_text())
    index["weight_map"][Q] = name
    (good / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map must name|must be a file"):
        from_pretrained(good)


def test_index_must_agree_with_the_shards(good: Path) -> None:
    index = json.loads((good / INDEX).read_text())
    places = index["weight_map"]
    elsewhere = next(file for file in places.values() if file != places[Q])
    changes = [
        (places | {Q: elsewhere}, f"{Q} is in {places[Q]}, the index says {elsewhere}"),
        ({n: f for n, f in places.items() if n != Q}, f"{Q} is in {places[Q]}, the index says None"),
        (places | {"surprise": elsewhere}, "got 1 that differ: surprise is missing"),
    ]
    for weight_map, message in changes:
        (good / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            from_pretrained(good)
    heads = places | {"mtp.layers.0.norm.weight": elsewhere}
    (good / INDEX).write_text(json.dumps(index | {"weight_map": heads}))
    from_pretrained(good)


def test_same_tensor_in_two_shards_is_refused(good: Path) -> None:
    first, second = sorted(good.glob("*.safetensors"))[:2]
    save_file(load_file(second) | {"backbone.embeddings.weight": torch.ones(64, 64)}, second)
    assert "backbone.embeddings.weight" in load_file(first)
    with pytest.raises(
        ValueError, match=f"embeddings.weight is in {second.name}, the index says {first.name}"
    ):
        from_pretrained(good)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "null", "{"])
def test_broken_index_is_refused(good: Path, content: str) -> None:
    (good / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        from_pretrained(good)


def test_links_must_stay_in_the_folder_or_the_hub_cache(tmp_path: Path) -> None:
    model = make_model(MIXED)
    cache = tmp_path / "models--someone--something"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    model.save_pretrained(tmp_path / "plain")
    for file in list((tmp_path / "plain").iterdir()):
        (cache / "blobs" / file.name).write_bytes(file.read_bytes())
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(hub_tensors(from_pretrained(cache / "snapshots" / "abc"))) == len(hub_tensors(model))

    (tmp_path / "plain" / SINGLE).unlink()
    (tmp_path / "plain" / SINGLE).symlink_to(cache / "blobs" / SINGLE)
    with pytest.raises(ValueError, match="must not lead out of"):
        from_pretrained(tmp_path / "plain")
    (cache / "snapshots" / "abc" / SINGLE).unlink()
    (tmp_path / "outside").write_bytes((cache / "blobs" / SINGLE).read_bytes())
    (cache / "snapshots" / "abc" / SINGLE).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="must not lead out of"):
        from_pretrained(cache / "snapshots" / "abc")


def test_kept_original_config_may_say_only_what_an_export_writes(good: Path, tmp_path: Path) -> None:
    original = good / "hebatron.json"
    original.write_text('{"config": {"time_step_min": 0.002}}')
    assert from_pretrained(good).config.time_step_min == 0.002
    for content in ('{"config": {"layer_norm_epsilon": 0.5}}', '{"config": [1]}', "[]"):
        original.write_text(content)
        with pytest.raises(ValueError, match=r"hebatron\.json"):
            from_pretrained(good)
    original.unlink()
    (tmp_path / "outside.json").write_text('{"config": {"time_step_min": 0.002}}')
    original.symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match=r"hebatron.json must not lead out of"):
        from_pretrained(good)
    original.unlink()
    original.symlink_to(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"hebatron.json must be a file, found none"):
        from_pretrained(good)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl"])
def test_pickles_are_never_opened(good: Path, name: str) -> None:
    for file in [*good.glob("*.safetensors"), good / INDEX]:
        file.unlink()
    (good / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ValueError, match=f"got only {name}; pickled weights are never opened"):
        from_pretrained(good)


def test_special_files_are_refused(good: Path) -> None:
    shard = sorted(good.glob("*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=f"{shard.name} must be a file, found something else"):
        from_pretrained(good)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ValueError, match="must be a file, found something else"):
        from_pretrained(good)
    with pytest.raises(ValueError, match="folder must be a folder"):
        from_pretrained(good / "config.json")
