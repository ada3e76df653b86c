"""One whole model on one GPU with one backend: built, held to fp64, timed case by case. A process of its own, which
bench_model_cuda.py starts: kernels that have never run may fault or hang, and must take no other model along.

    python bench/gpu_model.py MODEL BACKEND --events FILE [--device cuda] [--toy] [--seconds 60] [--skip CASE ...]

Weights are drawn in bf16 where they stay (63 GB of 80), never on the host and never in fp32. Every event is a line of
JSON in FILE as soon as it happens: {"begin": what}, {"check": ...}, {"row": ...}, {"ceilings": ...}, {"done": true}.

prefill   one sequence through an empty cache that it fills, in chunks where memory asks for it, the logits of the last
          token; CUDA events around it, so its launches count
decode    one token of every sequence behind caches of random keys and states, from one CUDA graph; its ids are drawn
          ahead, since a random model's own choices would soon be the same in all rows, and so would their experts
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from floors import Machine
from gpu_device import Clocks, Device, summary
from gpu_model_cases import (
    FITS,
    REAL,
    RESERVE_BYTES,
    ROOM_TOKENS,
    SMALL_SHAPES,
    TOY,
    Case,
    Plan,
    Row,
    bytes_to_decode,
    experts_used,
    largest_batch,
    least_seconds,
    prefill_chunk,
    repeats,
    with_floors,
)
from gpu_model_kinds import Experts, FixedStep, Subject, chosen_experts, make
from torch import Tensor

import hebatron_kernels as hk
from hebatron.config import ModelConfig

BF16 = torch.bfloat16
FARTHEST = 2**-9  # beside twice torch's own bf16 error: half a last bit of bf16
# Prefilled (and in chunks of), past where a ring of two blocks begins anew; decoded after them, over a block's edge.
CHECKED_TOKENS, DECODED_TOKENS = (188, 100), 6
WARM_TOKENS = 3  # before a graph is replayed


# ---- right before fast


def errors(got: Tensor, want: Tensor) -> Tensor:
    """Of each row of logits, relative."""
    got, want = got.double().cpu(), want.double().cpu()
    return torch.linalg.vector_norm(got - want, dim=1) / torch.linalg.vector_norm(want, dim=1)


def prepared(device: Device, call: Callable[[], None]) -> tuple[Callable[[], None], Row]:
    """The replay of a step's graph, or the step where an operator reads the GPU on the host: the row says which. Three
    steps go by."""
    with hk.host_reads() as reads:
        call()
    replay, graph = device.prepare(call, capture=not reads)
    return replay, {"graph": graph} | ({"uncaptured": sorted(set(reads))} if reads else {})


def logits_of(subject: Subject, ids_QT: Tensor, backend: str, device: Device) -> list[Tensor]:
    """Logits of every sequence, as `wanted` has them: after a prefill in chunks, after decoding on from there as the
    timed cases do, and after a prefill of all of it."""
    first = CHECKED_TOKENS[0]
    last: list[Tensor] = []
    with torch.no_grad(), hk.use_backend(backend):
        prefilled, step = subject.follow(ids_QT[:, :first], CHECKED_TOKENS[1])
        whole = torch.cat([subject.prefill(ids_T, len(ids_T)) for ids_T in ids_QT])
    fixed = FixedStep(step, ids_QT[:, first:].T.contiguous(), first, backend)

    def call() -> None:
        last[:] = fixed()[:1]

    replay, _ = prepared(device, call)
    decoded = []
    for _ in range(DECODED_TOKENS - WARM_TOKENS):
        replay()
        decoded.append(last[0].clone())
    return [prefilled, torch.cat(decoded), whole]


@cache
def wanted(name: str) -> tuple[Subject, Tensor, list[Tensor], list[Tensor]]:
    """A small model of this kind on the CPU, ids, what follows them in fp64, and what torch makes of it in bf16."""
    host = torch.device("cpu")
    small = make(SMALL_SHAPES[name], host, 256)
    tokens = CHECKED_TOKENS[0] + DECODED_TOKENS
    ids_QT = torch.randint(256, (4, tokens), generator=torch.Generator().manual_seed(1))
    twin = small.to(host, torch.float64)
    after_QTV = torch.stack([twin.all_logits(ids_T, DECODED_TOKENS + 1) for ids_T in ids_QT])
    decoded_SQV = after_QTV[:, 1 + WARM_TOKENS :].transpose(0, 1)
    exact = [after_QTV[:, 0], decoded_SQV.flatten(0, 1), after_QTV[:, -1]]
    return small, ids_QT, exact, logits_of(small, ids_QT, "torch", Device("cpu"))


def check(name: str, backend: str, device: Device) -> list[Row]:
    """The small model on the device against fp64, beside torch's bf16 on the CPU.

    Rounding may send a token to another expert, so the limit is for the quarter of the logits that agree best, and
    twenty times wider for the rest: a wrong row or step is off by all of it.
    """
    small, ids_QT, want, usual = wanted(name)
    found = logits_of(small.to(device.device, BF16), ids_QT.to(device.device), backend, device)
    rows: list[Row] = []
    for part, got, plain, exact in zip(("prefill in chunks", "decode", "prefill"), found, usual, want):
        error, other = (errors(logits, exact).sort().values for logits in (got, plain))
        quarter = len(error) // 4
        limit = 2 * float(other[quarter]) + FARTHEST
        passed = float(error[quarter]) <= limit and float(error[-1]) <= 20 * limit  # not of NaN
        detail = f"off fp64 by {error[quarter]:.2e}, at most {error[-1]:.2e}; limit {limit:.2e}"
        about = {"kernel": "model", "check": "values", "name": f"{name} {backend} {part}"}
        rows.append(about | {"passed": passed, "detail": detail})
    return rows


# ---- timed


class Bench:
    """A model where it is timed, and the rates that its floors are counted by."""

    def __init__(
        self, name: str, backend: str, plan: Plan, device: Device, say: Callable[[Row], None]
    ) -> None:
        self.name, self.backend, self.plan, self.device = name, backend, plan, device
        self.shape = plan.shapes[name]
        reached = device.ceilings(plan.copy_bytes, plan.matmul_size, plan.repeats)
        self.machine = Machine("measured", reached.flops_per_second, reached.bytes_per_second)
        say({"ceilings": {"model": name, "backend": backend, **vars(reached)}})
        device.free()
        begin = time.monotonic()
        self.subject = make(self.shape, device.device, max(case.tokens for case in plan.cases) + ROOM_TOKENS)
        device.synchronize()
        self.seconds_built = time.monotonic() - begin
        self.vocab = self.shape.vocab_size if isinstance(self.shape, ModelConfig) else self.shape.vocab

    def release(self) -> None:
        if self.device.cuda:
            gc.collect()
            self.device.free()

    def free_bytes(self, case: Case) -> float:
        """What the device has left; on the CPU as much as three sequences and a half need."""
        self.release()
        if self.device.cuda:
            return float(torch.cuda.mem_get_info()[0])
        return RESERVE_BYTES + 3.5 * bytes_to_decode(self.shape, case.tokens, self.backend)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.vocab, shape, device=self.device.device)

    def timed(self, call: Callable[[], Any], first_seconds: float) -> Row:
        count = repeats(self.plan, first_seconds)
        taken = self.device.rounds({"call": call}, count)["call"] if count else [1e3 * first_seconds]
        return dict(vars(summary(taken, False)))

    def prefill(self, case: Case) -> Row:
        """In half the chunk where it does not fit: the arithmetic estimates, and a dense model has but one way."""
        free = self.free_bytes(case)
        chunk = case.tokens
        if isinstance(self.shape, ModelConfig):
            chunk = prefill_chunk(free, self.shape, case.tokens, self.backend)
        while True:
            try:
                return self._prefill(case, chunk) | {"chunk_tokens": chunk}
            except torch.OutOfMemoryError:
                if not isinstance(self.shape, ModelConfig) or chunk <= 1024:
                    raise
            chunk = -(-chunk // 2)
            self.free_bytes(case)  # outside the handler: there the failed call's tensors are still held

    def _prefill(self, case: Case, chunk: int) -> Row:
        ids_T = self.ids(case.tokens)

        def call() -> Tensor:
            with torch.no_grad(), hk.use_backend(self.backend):
                return self.subject.prefill(ids_T, chunk)

        begin = time.monotonic()
        finite = bool(call().isfinite().all())
        row = self.timed(call, time.monotonic() - begin)
        return row if finite else {"error": "logits are not finite"}

    def decode(self, case: Case) -> Row:
        """With a tenth of the sequences less where as many as fit by arithmetic do not."""
        batch = case.batch or largest_batch(self.free_bytes(case), self.shape, case.tokens, self.backend)
        while batch > 0:
            try:
                row = self._decode(case, batch) | {"batch": batch}
                # a bucket's padding may not fit beside as many as fit
                return row | (self.by_generate(case, batch) if case.batch != FITS else {})
            except torch.OutOfMemoryError:
                if case.batch != FITS:
                    raise
            batch -= -(-batch // 10)
            self.free_bytes(case)
        return {"error": "not one sequence fits"}

    def _decode(self, case: Case, batch: int) -> Row:
        ids_SQ = self.ids(ROOM_TOKENS, batch)
        fixed = FixedStep(self.subject.fill(batch, case.tokens), ids_SQ, case.tokens, self.backend)
        last: list[Tensor] = []

        def call() -> None:
            last[:] = fixed()

        with chosen_experts(self.subject) as used:
            call()
            counts = used()
        row: Row = {}
        if isinstance(self.shape, ModelConfig) and counts:  # the floor is that of an even choice
            row["experts_used"] = round(sum(counts) / len(counts), 1)
            row["experts_even"] = round(experts_used(self.shape, batch), 1)
        replay, how = prepared(self.device, call)
        begin = time.monotonic()
        replay()
        self.device.synchronize()
        row |= self.timed(replay, time.monotonic() - begin) | how
        return row if bool(last[0].isfinite().all()) else {"error": "logits are not finite"}

    def by_generate(self, case: Case, batch: int) -> Row:
        """The same step by the decoder that `generate` uses, from its call on the host to its last kernel."""
        if not isinstance(self.subject, Experts):
            return {}
        ids_Q, decoder = self.ids(batch), self.subject.decoder(batch, case.tokens)

        def call() -> None:
            with hk.use_backend(self.backend):
                decoder(ids_Q)

        try:
            for _ in range(2):  # launched, captured
                call()
            taken = self.device.rounds({"call": call}, min(self.plan.repeats, ROOM_TOKENS - 2))["call"]
        except RuntimeError as error:  # what was timed before it stands
            return {"generate_error": first_line(error)}
        return {"generate_ms": summary(taken, False).ms}

    def case(self, case: Case, clocks: Clocks) -> Row:
        begin = time.monotonic()
        if self.device.cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            row = self.prefill(case) if case.batch is None else self.decode(case)
        except (RuntimeError, ValueError) as error:  # memory, or a form that this GPU or torch lacks: a row
            row = {"error": first_line(error)}
        if "ms" in row:
            row = with_floors(row, self.shape, case, self.machine)
        if self.device.cuda and self.device.alive():
            self.release()
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        about = {"model": self.name, "backend": self.backend, "case": case.name}
        return about | row | {"clocks": clocks.between(begin, time.monotonic())}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def run(
    name: str, backend: str, plan: Plan, device: Device, seconds: float, skip: list[str], events: Path
) -> None:
    """Every case that is not in `skip`, most wanted first, for `seconds`; what happens is told in `events`."""
    deadline = time.monotonic() + seconds

    def say(event: Row) -> None:
        with events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    torch.manual_seed(0)
    say({"begin": "check"})
    checks = check(name, backend, device)
    for found in checks:
        say({"check": found})
    about = {"model": name, "backend": backend}
    cases = [case for case in plan.cases if case.name not in skip]
    if not all(found["passed"] for found in checks):
        for case in cases:
            say({"row": about | {"case": case.name, "error": "not timed: its small model is wrong"}})
        say({"done": True})
        return
    say({"begin": "build"})
    with Clocks(device.cuda) as clocks:
        bench = Bench(name, backend, plan, device, say)
        say({"built": about | {"seconds": round(bench.seconds_built, 2)}})
        for case in cases:
            least = least_seconds(bench.shape, case) if device.cuda else 0.0
            if time.monotonic() + least > deadline:
                say({"row": about | {"case": case.name, "skipped": "out of time"}})
                continue
            say({"begin": case.name})
            say({"row": bench.case(case, clocks)})
            if not device.alive():
                break  # the process is of no more use; what it has not done is for another
        else:
            say({"done": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=list(REAL.shapes))
    parser.add_argument("backend", choices=["native", "torch"])
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--skip", nargs="*", default=[], help="cases by name")
    o = parser.parse_args()
    plan = TOY if o.toy else REAL
    run(o.model, o.backend, plan, Device(o.device), o.seconds, o.skip, o.events)


if __name__ == "__main__":
    main()
