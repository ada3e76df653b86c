"""On the native CPU path a token's log-probabilities are the same to the bit in the training forward and in frozen
inference, alone and in any batch, in one go and in pieces of whole chunks of the scan."""

import copy

import pytest
import torch
from model_cases import make_model, random_ids

from hebatron import presets

DTYPES = [torch.float32, torch.bfloat16]
CONFIG = presets.tiny().replace(
    layers_block_type=("mamba", "moe", "attention", "mlp", "mamba", "moe"),
    intermediate_size=48,
    chunk_size=16,
)
CONFIGS = {
    "hybrid": CONFIG,
    "latent": CONFIG.replace(
        moe_latent_size=24, n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=3
    ),
}


def models(config, dtype):
    """The same weights, to be trained and frozen."""
    trained = make_model(config, seed=3)
    trained.compute_dtype = dtype
    return trained, copy.deepcopy(trained).freeze_for_inference()


def log_probabilities(model, ids, cu_seqlens=None):
    """Of each token behind the ones before it, as the loss has them, and of every entry."""
    labelled = model(ids, labels=ids, loss_reduction="none", cu_seqlens=cu_seqlens).loss.detach()
    return labelled, model(ids, cu_seqlens=cu_seqlens).logits.detach().float().log_softmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_of_training_and_frozen_inference_are_the_same_bits(name, dtype):
    trained, frozen = models(CONFIGS[name], dtype)
    ids = random_ids(trained.config, 3, 53, seed=1)
    out = trained(ids, labels=ids, loss_reduction="none")
    assert out.loss.requires_grad
    want = log_probabilities(trained, ids)
    assert torch.equal(out.loss.detach(), want[0]) and want[0].count_nonzero() > 100
    for got, wanted in zip(log_probabilities(frozen, ids), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_rows_documents_have_the_bits_of_frozen_inference_alone(name, dtype):
    trained, frozen = models(CONFIGS[name], dtype)
    lengths = [37, 1, 16, 0, 50, 5]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = random_ids(trained.config, 1, int(ends[-1]), seed=2)
    packed = trained(ids, cu_seqlens=ends).logits.detach()[0]
    with torch.no_grad():
        for begin, end in zip(ends.tolist(), ends.tolist()[1:]):
            if end > begin:
                assert torch.equal(frozen(ids[:, begin:end]).logits[0], packed[begin:end]), (begin, end)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_frozen_logits_do_not_depend_on_the_batch_to_the_bit(batch, name, dtype):
    _, frozen = models(CONFIGS[name], dtype)
    ids = random_ids(frozen.config, 64, 19, seed=4)
    with torch.no_grad():
        whole = frozen(ids).logits
        parts = [frozen(part).logits for part in ids.split(batch)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("piece", [16, 32, 48])
def test_frozen_prefill_in_pieces_of_whole_chunks_has_the_bits_of_one(piece, name, dtype):
    _, frozen = models(CONFIGS[name], dtype)
    ids = random_ids(frozen.config, 2, 100, seed=5)
    with torch.no_grad():
        whole = frozen(ids).logits
        cache = frozen.new_cache(2)
        parts = [frozen(part, cache=cache).logits for part in ids.split(piece, 1)]
    assert torch.equal(torch.cat(parts, 1), whole)
