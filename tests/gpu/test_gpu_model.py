"""The whole model on a GPU: parity with the CPU, and decoding replayed from one graph a bucket."""

import pytest
import torch
from gpu_cases import check_never_waits
from model_cases import make_model, random_ids, relative

import hebatron_kernels as hk
from hebatron import presets
from hebatron.cache import bucket_of
from hebatron.decoder import Decoder

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
CONFIG = presets.tiny().replace(layers_block_type=("mamba", "moe", "attention") * 2)
BUCKETS = (1, 2, 3, 8)  # 3: with a row of padding


def models(device):
    """In bf16 on the CPU and where the kernels are, and in fp64."""
    found = [make_model(CONFIG, 2) for _ in range(3)]  # at this seed rounding sends no token to other experts
    for model in found[:2]:
        model.compute_dtype = BF16
    return found[0], found[1].to(device), found[2].double()


CUTS = {"smallest": [], "pieces": [7, 9, 18], "tokens": [16, 17, 18, 19]}


@pytest.mark.parametrize("name", CUTS)
def test_model_decodes_what_the_cpu_does(place, name):
    cpu, card, exact = models(place.device)
    ids = random_ids(CONFIG, 2, 20, 1)

    def error(model, backend):
        cache = model.new_cache(2)
        pieces = ids.to(model.device).tensor_split(CUTS[name], 1)
        with torch.no_grad(), hk.use_backend(backend):
            got = torch.cat([model(piece, cache=cache).logits for piece in pieces], 1).double().cpu()
        return relative(got, want)

    with torch.no_grad(), hk.use_backend("torch"):
        want = exact(ids).logits
    others = [error(cpu, "native"), error(cpu, "torch")]
    found = error(card, place.backend)
    assert found <= 2 * max(others) + 2**-9, f"{found:.2e}, on the CPU {others}"


def decoder(device, rows, capacity=64):
    """Of a model in bf16, weights and all, behind a ragged prefill."""
    card = make_model(CONFIG, 2).bfloat16().to(device)
    decode = Decoder(card, card.new_cache(rows, capacity))
    ids, mask = random_ids(CONFIG, rows, 9, 1), torch.ones(rows, 9)
    for row in range(rows):
        mask[row, 9 - row % 4 :] = 0
    with hk.use_backend("native"):
        card(ids.to(device), mask.to(device), cache=decode.cache, logits_to_keep=1)
    return card, decode


def launches(device):
    """In place of graphs: every token launch by launch, in the same bucket."""
    return lambda run: run


@pytest.mark.parametrize("rows", BUCKETS)
def test_model_decodes_from_one_graph_a_bucket(gpu, rows):
    """The bits of the same launches, and of the model's own forward where no row is padding."""
    card, decode = decoder("cuda", rows)
    plain, cache = decode.cache.snapshot(), decode.cache.snapshot()
    launched = Decoder(card, cache, launches)
    ids_B = torch.full((rows,), 3, device="cuda")
    with hk.use_backend("native"):
        for _ in range(20):
            got, want = decode(ids_B), launched(ids_B)
            assert torch.equal(got, want)
            if rows == bucket_of(rows):
                assert torch.equal(got, card(ids_B[:, None], cache=plain, logits_to_keep=1).logits[:, 0])
            ids_B = want.argmax(1)
    assert decode.cache.lengths == cache.lengths and decode.uncaptured == []
    assert [bucket.replay is not None for bucket in decode._buckets.values()] == [True]


def test_model_decodes_on_after_growing_and_losing_rows(gpu):
    card, decode = decoder("cuda", 4, 16)
    plain = decode.cache.snapshot()
    with hk.use_backend("native"):
        for staying in ([0, 1, 2, 3], [3, 1], [1]):  # 60 tokens cross the first block
            for cache in (decode.cache, plain):
                cache.reorder(staying)
            for seed in range(30):
                ids_B = random_ids(CONFIG, len(staying), 1, seed)[:, 0].cuda()
                want = card(ids_B[:, None], cache=plain, logits_to_keep=1).logits[:, 0]
                assert torch.equal(decode(ids_B), want)
    assert decode.cache.moves >= 1


def test_model_decoding_never_waits_for_the_gpu(gpu):
    """Replayed and launch by launch."""
    _, decode = decoder("cuda", 3)
    ids_B = torch.tensor([1, 2, 3], device="cuda")
    with hk.use_backend("native"):
        decode(ids_B), decode(ids_B)  # the second is captured
        check_never_waits(lambda: decode(ids_B))
        (bucket,) = decode._buckets.values()
        check_never_waits(bucket.launch)


def test_model_generates_the_same_from_graphs(gpu):
    """The product: `generate` on the GPU against its forwards without a decoder."""
    _, card, _ = models("cuda")  # fp32 masters: rounded inside the graph
    ids = random_ids(CONFIG, 4, 9, 1).cuda()
    with hk.use_backend("native"), torch.no_grad():
        got = card.generate(ids, max_new_tokens=30, eos_token_id=())
        cache, want = card.new_cache(4), [ids]
        for _ in range(30):
            want.append(card(want[-1], cache=cache, logits_to_keep=1).logits[:, 0].argmax(1)[:, None])
    assert torch.equal(got, torch.cat(want, 1))
