"""The whole model on a GPU: parity with the CPU, and decoding replayed from one graph a batch."""

import pytest
import torch
from gpu_cases import check_never_waits
from model_cases import make_model, random_ids, relative

import hebatron_kernels as hk
from hebatron import presets
from hebatron.cache import NOTHING, CacheStep
from hebatron.model import Context

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
CONFIG = presets.tiny().replace(layers_block_type=("mamba", "moe", "attention") * 2)
BUCKETS = (1, 2, 8)


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


class Decoder:
    """A model's next token as fixed launches: what changes from token to token lives on the device, in tensors that
    stay where they are. `lengths` and the states move on at every call."""

    def __init__(self, model, rows, capacity):
        self.model, self.cache = model, model.new_cache(rows, capacity)
        self.ids = torch.zeros(rows, dtype=torch.int64, device="cuda")
        self.lengths = torch.zeros(rows, dtype=torch.int32, device="cuda")
        table = self.cache.block_table
        step = CacheStep(self.cache, [1] * rows, True, self.lengths, table, *[NOTHING] * 4)
        self.context = Context(None, step, router_stats=False)

    def __call__(self):
        with torch.no_grad(), hk.use_backend("native"):
            logits = self.model._logits(self.model.hidden_states(self.ids, self.context)[0])
            self.lengths.add_(1)
            self.ids.copy_(logits.argmax(1))
        return logits

    def reset(self):
        for state in self.cache.mamba.values():
            state.conv.zero_(), state.ssm.zero_()
        self.lengths.zero_(), self.ids.fill_(3)


@pytest.mark.parametrize("rows", BUCKETS)
def test_model_decodes_from_one_graph(gpu, rows):
    _, card, _ = models("cuda")
    decode = Decoder(card, rows, 64)
    decode.reset()
    want = [decode() for _ in range(20)]
    decode.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode()
    decode.reset()
    for logits in want:
        graph.replay()
        assert torch.equal(captured, logits)


def test_model_decoding_never_waits_for_the_gpu(gpu):
    _, card, _ = models("cuda")
    decode = Decoder(card, 2, 64)
    decode.reset()
    check_never_waits(decode)
