import pytest
import torch
from model_cases import CONFIG, MIXED
from safetensors.torch import load_file, save_file

from hebatron import Hebatron
from hebatron.frozen import FrozenExperts
from hebatron.training.optim import build_optimizer
from hebatron.training.sections import OptimizerConfig

DTYPES = [torch.float32, torch.bfloat16]
CONFIGS = {"plain": CONFIG, "latent": MIXED, "tied": CONFIG.replace(tie_word_embeddings=True)}
IDS = torch.arange(40).view(2, 20) * 7 % 31


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_inference_equals_the_training_forward_to_the_bit(name, dtype):
    model = Hebatron(CONFIGS[name], dtype)
    trained = model(IDS).logits
    assert trained.requires_grad
    frozen = model.freeze_for_inference()
    assert frozen is model and model.freeze_for_inference() is model and not model.training
    got = model(IDS).logits
    assert torch.equal(got, trained) and not got.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_frozen_generates_as_before():
    model = Hebatron(CONFIG, torch.bfloat16).eval()
    want = model.generate(IDS[:, :5], max_new_tokens=12, eos_token_id=[])
    assert torch.equal(
        model.freeze_for_inference().generate(IDS[:, :5], max_new_tokens=12, eos_token_id=[]), want
    )


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_frozen_decoding_equals_that_of_the_operators_to_the_bit(name, dtype, batch):
    """A layer's token is one call there, elsewhere the operators are called one by one."""
    model = Hebatron(CONFIGS[name], dtype).freeze_for_inference()
    ids = torch.arange(batch * 9).view(batch, 9) * 5 % 31
    results = []
    for whole in (True, False):
        cache = model.new_cache(batch)
        model(ids[:, :4], cache=cache)
        with pytest.MonkeyPatch.context() as patch:
            if not whole:
                patch.setattr("hebatron.frozen.step_available", lambda: False)
            results.append([model(ids[:, t : t + 1], cache=cache).logits for t in range(4, 9)])
        results[-1] += [t for state in cache.mamba.values() for t in (state.conv, state.ssm)]
        results[-1] += list(cache.pages.values())
    for got, want in zip(*results):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_frozen_state_dict_and_export_hold_the_rounded_weights(name, tmp_path):
    model = Hebatron(CONFIGS[name], torch.bfloat16)
    want = {key: value.clone() for key, value in model.state_dict().items()}
    got = model.freeze_for_inference().state_dict()
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert torch.equal(value, want[key].to(value.dtype)), key
    assert all(got[key].dtype == torch.bfloat16 for key in got if "experts.up_proj" in key)
    model.save_pretrained(tmp_path)
    loaded = Hebatron.from_pretrained(tmp_path)
    loaded.compute_dtype = torch.bfloat16
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_frozen_export_keeps_the_dtypes_of_an_export_before(stored, dtype, tmp_path):
    Hebatron(CONFIG).save_pretrained(tmp_path / "fp32")
    weights = load_file(tmp_path / "fp32/model.safetensors")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_bytes((tmp_path / "fp32/config.json").read_bytes())
    save_file({name: w.to(stored) for name, w in weights.items()}, tmp_path / "hub/model.safetensors")
    written = []
    for freeze in (False, True):
        model = Hebatron.from_pretrained(tmp_path / "hub")
        model = model.freeze_for_inference() if freeze else model
        model.save_pretrained(tmp_path / str(freeze), dtype=dtype)
        written.append(load_file(tmp_path / str(freeze) / "model.safetensors"))
    assert {n: w.dtype for n, w in written[1].items()} == {n: w.dtype for n, w in written[0].items()}
    router = next(w for name, w in written[1].items() if name.endswith("gate.weight"))
    assert router.dtype == stored  # fp32 where it came so, whatever is asked


def test_frozen_holds_the_experts_once():
    model = Hebatron(CONFIG, torch.bfloat16)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    model.freeze_for_inference()
    packed = [b for m in model.modules() if isinstance(m, FrozenExperts) for b in m.buffers()]
    assert not any(".experts." in name for name, _ in model.named_parameters())
    assert all(b.dtype == torch.bfloat16 for b in packed)
    assert experts <= sum(b.numel() for b in packed) < 1.5 * experts


def test_frozen_refuses_training_optimizers_and_loading():
    model = Hebatron(CONFIG)
    weights = model.state_dict()
    model.freeze_for_inference()
    with pytest.raises(ValueError, match="train: model must not be frozen for inference, got a frozen one"):
        model.train()
    assert not any(module.training for module in model.modules())
    assert model.eval() is model
    with pytest.raises(ValueError, match="model must have a trainable parameter, got none"):
        build_optimizer(model, OptimizerConfig())
    with pytest.raises(ValueError, match=r"load_state_dict: .*in_proj must not be frozen: load first"):
        model.load_state_dict(weights)


def test_freezing_refuses_other_dtypes_and_devices():
    with pytest.raises(ValueError, match=r"must compute in float32 or bfloat16, got torch\.float64"):
        Hebatron(CONFIG, torch.float64).freeze_for_inference()
    with pytest.raises(ValueError, match="model must be on the CPU, got meta"):
        Hebatron(CONFIG, torch.bfloat16, device="meta").freeze_for_inference()
