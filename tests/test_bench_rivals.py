"""The whole models that take turns in bench/bench_model.py: their lines, their processes, their files."""

import sys
from pathlib import Path

import pytest
import torch

from hebatron import Hebatron
from hebatron.presets import dense_like, tiny

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import bench_model
import moe_peers
import rivals
from rivals import Ours, Process, answer


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_rivals_answer_every_line(kind):
    model = Ours(kind, "tiny")
    assert len(answer(model, "logits", ["3", "5"])) == tiny().vocab_size
    assert answer(model, "prefill", ["20"])[0] > 0
    answer(model, "open", ["3", "20"])
    assert answer(model, "decode", ["2"])[0] > 0
    assert model.cache.lengths == [22, 22, 22]
    assert answer(model, "peak", [])[0] > answer(model, "resident", [])[0] / 2 > 0
    with pytest.raises(ValueError, match="a line must be one of this file's head, got 'sing'"):
        answer(model, "sing", ["1"])


def test_rivals_native_and_torch_compute_the_same_model():
    ids = [str(n) for n in range(1, 30)]
    one, other = (torch.tensor(answer(Ours(kind, "tiny"), "logits", ids)) for kind in ("native", "torch"))
    assert float((one - other).norm() / one.norm()) < 0.05


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rivals_train_changes_the_weights(backend):
    model = Ours("training", "tiny")
    before = [p.detach().clone() for p in model.model.parameters()]
    assert answer(model, "train", ["16", backend])[0] > 0
    changed = [not torch.equal(old, new) for old, new in zip(before, model.model.parameters())]
    assert all(changed)
    assert all(p.grad is None for p in model.model.parameters())


def test_model_config_names_a_preset_or_the_dense_model_of_its_size():
    assert rivals.model_config("tiny") == tiny()
    assert rivals.model_config("tiny:active") == dense_like(tiny(), "active")


SAYS = "import sys; print('ready', flush=True); [print(len(line), 2.5, flush=True) for line in sys.stdin]"


def test_process_answers_numbers_and_its_end_is_told():
    process = Process([sys.executable, "-c", SAYS]).wait()
    assert process.ask("prefill 8") == [10.0, 2.5] and process.seconds("x") == 2.0
    process.close()
    with pytest.raises(RuntimeError, match="ended with code 3"):
        Process([sys.executable, "-c", "raise SystemExit(3)"]).wait()
    with pytest.raises(ValueError, match="must say ready, got 'hello'"):
        Process([sys.executable, "-c", "print('hello')"]).wait()


class Stub:
    """In a rival's place: logits of one prompt as they are given."""

    def __init__(self, logits):
        self.logits = logits

    def ask(self, line):
        return self.logits.tolist()


@pytest.mark.parametrize(("error", "passes"), [(0.02, True), (0.04, False), (float("nan"), False)])
def test_check_refuses_a_rival_of_another_model(tmp_path, monkeypatch, error, passes):
    exact = torch.ones(bench_model.PROMPTS, 8)
    monkeypatch.setattr(bench_model, "LOGITS", tmp_path / "logits.pt")
    torch.save((torch.ones(bench_model.PROMPTS, 3, dtype=torch.int64), exact), bench_model.LOGITS)
    running = bench_model.Rivals()
    running.running[("native", str(bench_model.FOLDER))] = Stub(exact[0] * (1 + error))
    if passes:
        bench_model.check(["native"], running)
    else:
        with pytest.raises(ValueError, match="native must compute the same model"):
            bench_model.check(["native"], running)


def test_absent_names_only_the_peers_that_were_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_model, "LLAMA", bench_model.ROOT / "third_party" / "nowhere")
    assert list(bench_model.absent(["native", "llama-bf16"])) == ["llama-bf16"]
    assert "bench/fetch_peers.sh builds it" in bench_model.absent(["llama-q8_0"])["llama-q8_0"]


def test_gguf_holds_every_weight_of_the_model(tmp_path):
    from gguf_model import GGUF, write_gguf

    if not GGUF.is_dir():
        pytest.skip(f"no {GGUF}: bench/fetch_peers.sh brings it")
    model = Hebatron(tiny())
    write_gguf(model, tmp_path / "tiny.gguf", "bf16")
    import gguf

    tensors = gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    held = sum(int(tensor.n_elements) for tensor in tensors)
    wanted = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert held == wanted
    with pytest.raises(ValueError, match="must have full-width expert layers and no mlp, got M-"):
        write_gguf(Hebatron(dense_like(tiny(), "total")), tmp_path / "dense.gguf", "bf16")


def test_absent_names_the_peers_of_the_expert_layer_and_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(moe_peers, "ROOT", tmp_path)
    monkeypatch.setattr(moe_peers, "GGML", tmp_path / "ggml_rival.so")
    monkeypatch.setattr(moe_peers, "ZENTORCH", tmp_path / "zentorch")
    assert moe_peers.absent() == {
        "ggml": "no ggml_rival.so: bench/fetch_peers.sh llama.cpp builds it",
        "zentorch": "no zentorch: bench/fetch_peers.sh zentorch brings it",
    }
    x, ids, up = torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.randn(1, 4, 8)
    assert moe_peers.products(x, ids, up) == {}
    assert moe_peers.layers(x, ids, up, up.transpose(1, 2), torch.ones(2, 1)) == {}
    (tmp_path / "zentorch" / "zentorch-1.2.3.4.dist-info").mkdir(parents=True)
    wanted = torch.__version__.split("+")[0]
    assert moe_peers.absent()["zentorch"] == f"zentorch 1.2.3.4 is not built for torch {wanted}"


def test_close_refuses_a_peer_that_computes_something_else():
    right = torch.ones(4, dtype=torch.float64)
    moe_peers.close("ggml product", right.float() * 1.003, right)
    for wrong in (right * 1.02, right * float("nan")):
        with pytest.raises(ValueError, match="ggml product must compute the same"):
            moe_peers.close("ggml product", wrong, right)


def test_ggml_computes_the_expert_layer():
    if "ggml" in moe_peers.absent():
        pytest.skip(moe_peers.absent()["ggml"])
    moe_peers.check(only=("ggml",))
    with pytest.raises(ValueError, match="weights must be contiguous bfloat16, got"):
        moe_peers.Ggml(torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.randn(1, 4, 8))
