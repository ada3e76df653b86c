"""The whole models on a GPU (bench/bench_model.py --device cuda): its code at toy sizes, its arithmetic at real ones.
Nothing is timed here."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import bench_model
import bench_model_cuda
import dense
import floors
import gpu_model
import gpu_model_cases as cases
from floors import GEMMA_27B, H100, MISTRAL_24B, Machine, Transformer
from gpu_device import Clocks, Device
from gpu_model_cases import FITS, REAL, TOY, Case
from gpu_model_kinds import build, make

from hebatron.presets import nano_30b_a3b
from hebatron.sizes import count_parameters
from hebatron_kernels import _native, testing

NANO = nano_30b_a3b()


@pytest.fixture(autouse=True)
def one_thread():
    """Toy products are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "model.json"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ["bench_model.py", "--device", "cuda", "--dry-run", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", words)
        bench_model.main()
    torch.set_num_threads(before)
    assert ended.value.code == 0
    return json.loads(out.read_text())


def test_dry_run_times_every_case_of_every_model_with_both_backends(record):
    timed = {(row["model"], row["backend"], row["case"]) for row in record["timings"] if "ms" in row}
    wanted = {(m, b, c.name) for m in TOY.shapes for b in ("native", "torch") for c in TOY.cases}
    assert timed == wanted
    assert record["skipped"] == []
    assert record["dry_run"] is True
    assert record["gpu"] == "none (dry run on the CPU)"


def test_dry_run_holds_prefill_and_decode_of_each_model_to_fp64(record):
    names = {check["name"] for check in record["checks"]}
    parts = ("prefill in chunks", "decode", "prefill")
    assert names == {f"{m} {b} {part}" for m in TOY.shapes for b in ("native", "torch") for part in parts}
    assert all(check["passed"] for check in record["checks"])


def test_dry_run_writes_both_floors_and_the_rates_beside_every_time(record):
    by_name = {case.name: case for case in TOY.cases}
    ceilings = {(c["model"], c["backend"]): c for c in record["ceilings"]}
    for row in record["timings"]:
        case = by_name[row["case"]]
        ops = floors.forward(TOY.shapes[row["model"]], case.work(row.get("batch", 1)))
        reached = ceilings[row["model"], row["backend"]]
        measured = Machine("measured", reached["flops_per_second"], reached["bytes_per_second"])
        for of, machine in (("", measured), ("_h100", H100)):
            least = 1e3 * floors.seconds(ops, machine)
            assert row[f"floor{of}_ms"] == pytest.approx(least, abs=6e-5)
            assert row[f"percent_of{of}_floor"] == pytest.approx(100 * least / row["ms"], abs=0.06)
        tokens = case.tokens if case.batch is None else row["batch"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"], rel=1e-2)
        in_generate = row["model"] == "30B-A3B" and case.batch not in (None, FITS)
        assert (row.get("generate_ms", 0) > 0) == in_generate
        assert ("experts_used" in row) == (row["model"] == "30B-A3B" and case.batch is not None)
        assert (
            case.batch != FITS or row["batch"] == 3
        )  # what the CPU says it has left is for three and a half


def test_dry_run_puts_the_ratio_of_floors_beside_every_measured_ratio(record):
    rows = {(row["case"], row["dense"], row["backend"]): row for row in record["ratios"]}
    backends = ("native", "torch", "fastest")
    models = [name for name in TOY.shapes if name != "30B-A3B"]
    assert set(rows) == {(c.name, m, b) for c in TOY.cases for m in models for b in backends}
    ms = {(row["model"], row["backend"], row["case"]): row["ms"] for row in record["timings"]}
    for (case, model, backend), row in rows.items():
        if backend != "fastest":
            both = [ms[name, backend, case] for name in (model, "30B-A3B")]
            assert row["measured"] == pytest.approx(both[0] / both[1], abs=6e-3)
        assert row["floors"] > 0
        assert row["floors_h100"] > 0


def test_ratio_of_floors_is_what_the_floors_page_has():
    rows = []
    for case in REAL.cases:
        for (name, shape), batch in zip(REAL.shapes.items(), (30, 3, 2)):
            ran = {"batch": batch if case.batch == FITS else case.batch} if case.batch is not None else {}
            row = {"model": name, "backend": "native", "case": case.name, "ms": 1.0} | ran
            rows.append(cases.with_floors(row, shape, case, H100))
    found = {(row["case"], row["dense"]): row["floors"] for row in cases.ratios(rows, REAL, H100)}
    assert found["decode batch 1, context 65,536", GEMMA_27B.name] == pytest.approx(8.6, abs=0.05)
    assert found["decode the batch that fits, context 65,536", GEMMA_27B.name] == pytest.approx(11.2, abs=0.1)
    assert found["decode the batch that fits, context 65,536", MISTRAL_24B.name] == pytest.approx(
        15.9, abs=0.1
    )
    assert found["prefill 4,096", GEMMA_27B.name] == pytest.approx(6.3, abs=0.05)
    step = next(row for row in rows if row["case"] == "decode batch 1, context 65,536")
    assert step["target"]["must_ms"] == 3.9


# ---- the arithmetic at the real sizes


def test_a_sequence_of_65536_holds_what_the_worked_figures_say():
    keys = 6 * (65536 + 64) * cases.bytes_a_token(NANO)
    states = 23 * (64 * 64 * 128 * 4 + 6144 * 3 * 2)
    assert cases.bytes_a_sequence(NANO, 65536) == keys + states
    assert keys == pytest.approx(0.403e9, rel=2e-3)
    assert states == pytest.approx(0.048e9 + 0.001e9, rel=2e-2)
    assert cases.bytes_a_sequence(GEMMA_27B, 65536) == pytest.approx(
        5.80e9, rel=2e-2
    )  # one block more a window
    assert cases.bytes_a_sequence(MISTRAL_24B, 65536) == pytest.approx(10.74e9, rel=2e-3)


def test_the_batch_that_fits_80_gb():
    for shape, least, most in ((NANO, 30, 44), (GEMMA_27B, 3, 4), (MISTRAL_24B, 2, 3)):
        free = (
            84.9e9 - 1.0e9 - floors.bytes_of_weights(shape)
        )  # of an 80 GB card, its context and buffers off
        batch = cases.largest_batch(free, shape, 65536, "native")
        assert least <= batch <= most
        used = batch * cases.bytes_a_sequence(shape, 65536)
        assert used < free - cases.RESERVE_BYTES < used + 1.01 * cases.bytes_a_sequence(shape, 65536)
        assert cases.largest_batch(free, shape, 65536, "torch") < batch
    assert cases.largest_batch(1e9, NANO, 65536, "native") == 0


def test_prefill_is_chunked_where_its_activations_do_not_fit():
    free = 84.9e9 - 1.0e9 - floors.bytes_of_weights(NANO)
    assert cases.prefill_chunk(free, NANO, 65536, "native") == 65536
    assert cases.prefill_chunk(free, NANO, 65536, "torch") == 32768
    assert cases.prefill_chunk(4e9, NANO, 65536, "native") == 16384
    assert (
        cases.prefill_chunk(0, NANO, 65536, "native") == 1024
    )  # it is tried, and the row says that it failed
    assert cases.prefill_chunk(free, NANO, 1000, "torch") == 1000


def test_experts_used_by_an_even_choice():
    used = [cases.experts_used(NANO, batch) for batch in (1, 8, 32, 128)]
    assert used == pytest.approx([6.0, 40.8, 100.5, 127.7], abs=0.06)


def test_repeats_fill_the_time_of_a_case():
    assert cases.repeats(REAL, 0.003) == 15
    assert cases.repeats(REAL, 0.9) == 6
    assert cases.repeats(REAL, 5.0) == 2
    assert cases.repeats(REAL, 19.0) == 0  # the first must do


def test_all_cases_at_the_floor_leave_most_of_the_time():
    """Every model and backend, each case five times: what a kernel at a third of the floor can still do."""
    least = sum(cases.least_seconds(shape, case) for shape in REAL.shapes.values() for case in REAL.cases)
    assert 2 * least * 5 / 4 < 480 / 3
    assert sum(bench_model_cuda.SHARES.values()) == pytest.approx(1.0)


def test_the_real_model_is_built_of_two_bytes_a_weight_and_nothing_else():
    model = build(NANO, torch.device("meta"))
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    held = sum(t.numel() * t.element_size() for t in tensors)
    routers, biases, steps = 23 * 128 * 2688, 23 * 128, 23 * 3 * 64
    assert held == 2 * count_parameters(NANO).total + 2 * (routers + steps) + 4 * biases
    assert held == pytest.approx(2 * 31.6e9, rel=2e-3)


@pytest.mark.parametrize("shape", [GEMMA_27B, MISTRAL_24B])
def test_dense_weights_are_those_the_floors_count(shape):
    tensors = dense.Dense(shape, "meta").tensors()
    held = sum(t.numel() * t.element_size() for t in tensors)
    norms = 2 * (2 * shape.layers + 1) * shape.width
    keys = shape.layers * cases.bytes_a_token(shape)  # which bytes_of_weights counts for one token
    assert held - norms == floors.bytes_of_weights(shape) - keys


# ---- dense models


def test_rotary_positions_turn_pairs_of_halves():
    model = dense.Dense(Transformer("one", 1, 16, 1, 1, 8, 8, 8), "cpu", torch.float64)
    model.positions(5)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    got = dense.rotate(x, *model.rope)
    rates = dense.ROPE_BASE ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.exp(1j * torch.arange(5, dtype=torch.float64)[:, None] * rates)
    want = torch.complex(x[..., :4], x[..., 4:]) * turn[:, None]
    torch.testing.assert_close(got, torch.cat([want.real, want.imag], -1))


@pytest.mark.parametrize(
    "tokens", [63, 130, 191]
)  # in the first block; where the ring has turned; at a block's edge
def test_a_windows_ring_keeps_what_is_seen(tokens):
    """Decoding from a ring of two blocks gives what attention over all keys gives, row by row."""
    shape = Transformer("ring", 2, 32, 2, 1, 16, 32, 64, windowed=1, window=40)
    model = dense.Dense(shape, "cpu", torch.float64)
    model.positions(256)
    ids = torch.randint(64, (2, tokens + 3))
    pages = model.pages(2, 200)
    for layer in pages.layers:
        layer.fill_(torch.nan)  # what nobody wrote must not be seen
    assert pages.layers[0].shape[1] == 2 * 2
    assert pages.layers[1].shape[1] == 2 * 4
    for row in range(2):
        model.prefill(ids[row, :tokens], pages, row)
    lengths = torch.full((2,), tokens, dtype=torch.int32)
    for n in range(tokens, tokens + 3):
        got = model.decode(ids[:, n], lengths, pages)
        want = torch.cat([model.prefill(row[: n + 1]) for row in ids])
        torch.testing.assert_close(got, want)
        lengths += 1


def test_dense_models_are_served_by_the_cuda_kernels(monkeypatch):
    """Strided queries and keys, a ring's table, norms with their residual: the emulator takes what a GPU will be given,
    and gives what torch does (two bf16 roundings apart)."""
    if (lacks := testing.emulator_lacks()) is not None:
        pytest.skip(f"the emulator needs {lacks}")
    monkeypatch.setattr(_native, "emulator_module", None)  # put back afterwards
    testing.load_emulator()
    monkeypatch.setattr(gpu_model, "CHECKED_TOKENS", (70, 70))  # over one block's edge: tokens cost here
    monkeypatch.setattr(gpu_model, "DECODED_TOKENS", gpu_model.WARM_TOKENS + 1)
    small = make(cases.SMALL_SHAPES[GEMMA_27B.name], torch.device("cpu"), 256)
    ids = torch.randint(256, (1, 74))
    got, want = (gpu_model.logits_of(small, ids, backend, Device("cpu")) for backend in ("emulator", "torch"))
    for part, plain in zip(got, want):
        assert gpu_model.errors(part, plain).max() < 1e-2


# ---- what goes wrong


def bench(name, backend="native"):
    heard = []
    return gpu_model.Bench(name, backend, TOY, Device("cpu"), heard.append)


def case_row(made, case):
    with Clocks(False) as clocks:
        return made.case(case, clocks)


def test_prefill_that_does_not_fit_is_tried_in_halves(monkeypatch):
    made = bench("30B-A3B")
    tried, prefill = [], made.subject.prefill

    def small_memory(ids, chunk):
        tried.append(chunk)
        if chunk > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return prefill(ids[:16], chunk)

    monkeypatch.setattr(made.subject, "prefill", small_memory)
    row = case_row(made, Case(4096))
    assert row["chunk_tokens"] == 1024
    assert tried[:2] == [2048, 1024]  # the first by arithmetic


def test_what_does_not_fit_is_a_row(monkeypatch):
    made = bench(MISTRAL_24B.name)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(made.subject, "prefill", no_memory)
    monkeypatch.setattr(made.subject, "fill", no_memory)
    wanted = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert case_row(made, Case(16))["error"] == wanted
    assert case_row(made, Case(16, 2))["error"] == wanted
    assert case_row(made, Case(16, FITS))["error"] == "not one sequence fits"


def test_logits_that_are_not_finite_are_no_time(monkeypatch):
    made = bench(MISTRAL_24B.name)
    made.subject.model.norm_D.fill_(torch.nan)
    for case in (Case(16), Case(16, 1)):
        row = case_row(made, case)
        assert row["error"] == "logits are not finite"
        assert "ms" not in row


def test_a_wrong_model_is_not_timed(monkeypatch, tmp_path):
    gpu_model.wanted(GEMMA_27B.name)  # what torch makes of it, before
    attend = dense.attention_decode
    monkeypatch.setattr(dense, "attention_decode", lambda *a, **k: attend(*a, **(k | {"window": 3})))
    events = tmp_path / "events"
    gpu_model.run(GEMMA_27B.name, "native", TOY, Device("cpu"), 60, [], events)
    found = [json.loads(line) for line in events.read_text().splitlines()]
    passed = {event["check"]["name"]: event["check"]["passed"] for event in found if "check" in event}
    right = {"prefill in chunks": True, "decode": False, "prefill": True}
    assert passed == {f"{GEMMA_27B.name} native {part}": value for part, value in right.items()}
    rows = [event["row"] for event in found if "row" in event]
    assert [row["case"] for row in rows] == [case.name for case in TOY.cases]
    assert {row["error"] for row in rows} == {"not timed: its small model is wrong"}


WORKER = """
import json, sys, time
events, skip = sys.argv[sys.argv.index("--events") + 1], sys.argv
def say(**event):
    with open(events, "a") as file: file.write(json.dumps(event) + chr(10))
def row(case): say(row=dict(model="30B-A3B", backend="native", case=case))
cases = [case for case in {cases} if case not in skip]
say(begin="build")
for case in cases:
    say(begin=case)
    if case in {hang}: time.sleep(60)
    if case in {fault}: print("an illegal memory access"); sys.exit(3)
    row(case)
if {done}: say(done=True)
"""
NAMES = [case.name for case in TOY.cases]


def watched(tmp_path, monkeypatch, hang=(), fault=(), done=True, seconds=60.0):
    """What `measure` makes of a process that does such things."""
    monkeypatch.setattr(bench_model_cuda, "SILENCE_S", 0.5)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(cases=NAMES, hang=list(hang), fault=list(fault), done=done))
    monkeypatch.setattr(bench_model_cuda.gpu_model, "__file__", str(script))
    record = bench_model_cuda.Record(TOY, True, None, time.monotonic())
    bench_model_cuda.measure(record, "30B-A3B", "native", time.monotonic() + seconds, tmp_path)
    return record


def test_processes_that_do_their_work_are_left_alone(tmp_path, monkeypatch):
    record = watched(tmp_path, monkeypatch)
    assert record.done("30B-A3B", "native") == NAMES
    assert record.checks == []
    assert record.contents()["skipped"] == []


def test_a_hang_and_a_fault_are_named_and_the_rest_is_done(tmp_path, monkeypatch):
    record = watched(tmp_path, monkeypatch, hang=NAMES[1:2], fault=NAMES[3:4])
    errors = {row["case"]: row.get("error") for row in record.rows}
    assert errors == {
        NAMES[0]: None,
        NAMES[1]: "hung: nothing for 0 s",
        NAMES[2]: None,
        NAMES[3]: "the process ended with 3: an illegal memory access",
        NAMES[4]: None,
    }
    assert [check["name"] for check in record.checks] == [f"30B-A3B native {NAMES[n]}" for n in (1, 3)]


def test_a_process_that_cannot_begin_is_not_begun_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_model_cuda.gpu_model, "__file__", str(tmp_path / "nowhere.py"))
    record = bench_model_cuda.Record(TOY, True, tmp_path / "out.json", time.monotonic())
    bench_model_cuda.measure(record, "30B-A3B", "torch", time.monotonic() + 60, tmp_path)
    assert len(record.checks) == 1
    assert "No such file" in record.checks[0]["detail"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert [line.startswith("30B-A3B torch") for line in written["skipped"]] == [True] * len(NAMES)
    assert "the process ended with 2" in written["skipped"][0]


def test_what_finds_no_time_is_named_as_skipped(tmp_path):
    late = bench_model_cuda.Record(TOY, True, None, time.monotonic())
    bench_model_cuda.measure(late, "30B-A3B", "native", time.monotonic() - 1, tmp_path)
    assert late.contents()["skipped"] == [f"30B-A3B native {name}: out of time" for name in NAMES]
    assert late.checks == []
