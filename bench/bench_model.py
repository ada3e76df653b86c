"""Whole models: hebatron against its torch form, transformers and llama.cpp, and experts against dense models.

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_model.py [--what KIND ...] [--only TEXT ...]
        [--rivals NAME ...] [--rounds 9] [--seconds 40] [--out FILE.json]
    python bench/bench_model.py --prepare       writes the checkpoint and GGUF files into build/bench (minutes, once)
    python bench/bench_model.py --what floors   the real sizes on an H100, computed; needs no GPU
    python bench/bench_model.py --device cuda   30B-A3B on a GPU against dense models (bench_model_cuda.py)

The shape is `scaled_570m` with random weights, one file for all rivals; each is a process of its own (bench/rivals.py)
and has its turn in every round, so that ratios are of neighbours in time. A rival that would take more than --seconds
for a case gets fewer rounds, and the row says how many. One that is not installed is named as absent
(bench/fetch_peers.sh). Correctness first: every rival's logits against fp32.

prefill   a prompt's last logits; the limit is the peak of bf16 products, operations counted by bench/floors.py
decode    16 tokens, one after another; the limit is reading the active weights, the states and the keys from DRAM,
          counted in bf16 (llama-q8_0 reads half of that)
train     forward, backward, clipping and fused AdamW on fp32 master weights with bf16 compute, one sequence;
          transformers: bf16 weights throughout
memory    of a rival's process: resident after loading, and the peak of a prefill of 2,048 and of a step of 512
gain      the experts' model against dense ones of as many parameters in all and as many active, same depth and
          mixers, ours all three; beside each measured ratio stands the ratio of their floors on this machine
profile   where the native model spends its time, by operator
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import floors
import torch
from common import ROOT, Case, interleaved, peak, read_rate, save, show
from rivals import LLAMA, Process, gguf_file, model_config, start

PRESET = "scaled_570m"
FOLDER = ROOT / "build" / "bench" / PRESET
LOGITS = FOLDER.with_suffix(".logits.pt")
KINDS = ("prefill", "decode", "train", "memory", "gain", "profile", "floors")
RIVALS = ("native", "torch", "transformers", "llama-bf16", "llama-q8_0")
PROMPTS, PROMPT_TOKENS = 12, 12
# Relative error of the logits, root of mean squares, of the third best prompt: bf16 rounding sends a token whose sixth
# and seventh expert are nearly tied to the other one, and a prompt with such a token differs by 15 to 40 %. Without
# one: 1.6 %. A model that is wrong has no prompt that agrees.
ERRORS = {"llama-q8_0": 0.06}
USUAL_ERROR = 0.03
STEPS = 16  # of a decode call
PREFILL = (512, 2048, 8192)
DECODE = (512, 8192)
TRAIN = (512, 2048)
GAIN = {"moe": PRESET, "dense, equal total": f"{PRESET}:total", "dense, equal active": f"{PRESET}:active"}
GAIN_DECODE = [(batch, context) for context in DECODE for batch in (1, 8, 32)]


# ---- what is computed with


def prepare() -> None:
    """The checkpoint, its GGUF files and the exact logits of the prompts, where they are missing."""
    from gguf_model import GGUF, write_gguf

    from hebatron import Hebatron
    from hebatron.hub import export_hf

    if not FOLDER.is_dir():
        export_hf(Hebatron(model_config(PRESET)), None, FOLDER, torch.bfloat16)
    missing = [kind for kind in ("bf16", "q8_0") if GGUF.is_dir() and not gguf_file(FOLDER, kind).exists()]
    if not missing and LOGITS.exists():
        return
    model = Hebatron.from_pretrained(FOLDER, dtype=torch.float32)
    for kind in missing:
        write_gguf(model, gguf_file(FOLDER, kind), kind)
    prompts = torch.randint(
        model.config.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        logits = torch.cat([model(prompt[None], logits_to_keep=1).logits[:, 0] for prompt in prompts])
    torch.save((prompts, logits), LOGITS)


def absent(names: Iterable[str]) -> dict[str, str]:
    found = {}
    if importlib.util.find_spec("transformers") is None:
        found["transformers"] = "transformers is not installed"
    for name in ("llama-bf16", "llama-q8_0"):
        if not LLAMA.exists():
            found[name] = f"no {LLAMA.relative_to(ROOT)}: bench/fetch_peers.sh builds it"
    return {name: why for name, why in found.items() if name in names}


class Rivals:
    """The processes by (kind, source), started when first asked for and stopped together."""

    def __init__(self) -> None:
        self.running: dict[tuple[str, str], Process] = {}

    def get(self, kinds: Iterable[str], source: str = str(FOLDER)) -> list[Process]:
        keys = [(kind, source) for kind in kinds]
        new = [key for key in dict.fromkeys(keys) if key not in self.running]
        for key in new:  # one after another: two loading at once would need twice the memory
            self.running[key] = start(*key).wait()
        return [self.running[key] for key in keys]

    def close(self) -> None:
        for process in self.running.values():
            process.close()
        self.running.clear()


def check(names: list[str], rivals: Rivals) -> None:
    """Every rival computes the same model: its logits against ours in fp32."""
    prompts, exact = torch.load(LOGITS)
    for name, process in zip(names, rivals.get(names)):
        errors = []
        for prompt, wanted in zip(prompts.tolist(), exact):
            got = torch.tensor(process.ask(f"logits {' '.join(map(str, prompt))}"))
            errors.append(float((got - wanted).norm() / wanted.norm()))
        error, limit = sorted(errors)[2], ERRORS.get(name, USUAL_ERROR)
        print(
            f"{name}: logits differ from fp32 by {100 * error:.2f} % (limit {100 * limit:.0f} %)", flush=True
        )
        if not error <= limit:
            raise ValueError(f"bench_model: {name} must compute the same model, got errors {errors}")


# ---- the shape against peers


def model_cases(what: list[str], names: list[str], rivals: Rivals) -> list[Case]:
    config = model_config(PRESET)
    found = []

    def case(name: str, calls: Callable, ops: list[floors.Op], times: int, limit: str, tokens: int) -> Case:
        return Case(name, calls, times * floors.operations(ops), times * floors.streamed(ops), limit, tokens)

    def asked(line: str, before: str = "") -> Callable[[], dict[str, Callable[[], object]]]:
        def calls() -> dict[str, Callable[[], object]]:
            processes = dict(zip(names, rivals.get(names)))
            if before:
                for process in processes.values():
                    process.ask(before)
            return {name: lambda p=process: p.seconds(line) for name, process in processes.items()}

        return calls

    def training(tokens: int) -> Callable[[], dict[str, Callable[[], object]]]:
        def calls() -> dict[str, Callable[[], object]]:
            found: dict[str, Callable[[], object]] = {}
            for name in names:
                if name in ("native", "torch"):
                    ours = rivals.get(["training"])[0]
                    found[name] = lambda n=name, p=ours: p.seconds(f"train {tokens} {n}")
                elif name == "transformers":
                    theirs = rivals.get(["training-transformers"])[0]
                    found[name] = lambda p=theirs: p.seconds(f"train {tokens}")
            return found

        return calls

    if "prefill" in what:
        for tokens in PREFILL:
            ops = floors.forward(config, floors.Work(1, tokens))
            found.append(case(f"prefill {tokens}", asked(f"prefill {tokens}"), ops, 1, "bfloat16", tokens))
    if "decode" in what:
        for context in DECODE:
            ops = floors.forward(config, floors.Work(1, 1, context))
            calls = asked(f"decode {STEPS}", f"open 1 {context}")
            found.append(case(f"decode at context {context}", calls, ops, STEPS, "read", STEPS))
    if "train" in what:
        for tokens in TRAIN:
            ops = floors.training(config, tokens)
            found.append(case(f"train {tokens}", training(tokens), ops, 1, "bfloat16", tokens))
    return found


def memory(names: list[str], rivals: Rivals) -> list[dict]:
    """Processes of their own: what earlier cases left in an allocator would be counted."""
    rows: list[dict] = []
    lines = {"prefill 2048": {name: (name, "prefill 2048") for name in names}}
    ours = {name: ("training", f"train 512 {name}") for name in names if name in ("native", "torch")}
    theirs = {"transformers": ("training-transformers", "train 512")} if "transformers" in names else {}
    lines["train 512"] = ours | theirs
    for case, asked in lines.items():
        row: dict = {"case": f"memory of {case}", "rivals": {}}
        for name, (kind, line) in asked.items():
            rivals.close()
            process = rivals.get([kind])[0]
            resident = process.ask("resident")[0]
            process.ask("peak")
            process.ask(line)
            gigabytes = {
                "resident_gb": round(resident / 1e9, 2),
                "peak_gb": round(process.ask("peak")[0] / 1e9, 2),
            }
            row["rivals"][name] = gigabytes
            print(f"{row['case']}: {name} {gigabytes}", flush=True)
        rows.append(row)
    rivals.close()
    return rows


# ---- experts against dense models


def this_machine() -> floors.Machine:
    """The limits now: medians of nine probes each. 32 MB of activations stay in the last-level cache."""
    products = statistics.median(peak("bfloat16") for _ in range(9))
    return floors.Machine("this machine", products, statistics.median(read_rate() for _ in range(9)), 32e6)


def gain_cases(rivals: Rivals) -> list[tuple[Case, dict[str, list[floors.Op]]]]:
    configs = {name: model_config(source) for name, source in GAIN.items()}
    found = []

    def add(name: str, kind: str, line: str, before: str, tokens: int, count: Callable) -> None:
        def calls() -> dict[str, Callable[[], object]]:
            processes = {n: rivals.get([kind], source)[0] for n, source in GAIN.items()}
            for process in processes.values():
                if before:
                    process.ask(before)
            return {n: lambda p=process: p.seconds(line) for n, process in processes.items()}

        ops = {n: count(config) for n, config in configs.items()}
        limit = "read" if "decode" in name else "bfloat16"
        work = STEPS if "decode" in name else 1
        moe = ops["moe"]
        amounts = (work * floors.operations(moe), work * floors.streamed(moe))
        found.append((Case(name, calls, *amounts, limit, tokens), ops))

    for n in PREFILL:
        add(
            f"gain prefill {n}",
            "native",
            f"prefill {n}",
            "",
            n,
            lambda c, n=n: floors.forward(c, floors.Work(1, n)),
        )
    for batch, context in GAIN_DECODE:
        work = floors.Work(batch, 1, context)
        name, before = f"gain decode batch {batch} context {context}", f"open {batch} {context}"
        line, tokens = f"decode {STEPS}", STEPS * batch
        add(name, "native", line, before, tokens, lambda c, w=work: floors.forward(c, w))
    for n in TRAIN:
        line = f"train {n} native"
        add(f"gain train {n}", "training", line, "", n, lambda c, n=n: floors.training(c, n))
    return found


def gain(case: Case, ops: dict[str, list[floors.Op]], rounds: int, seconds_each: float) -> dict:
    before = this_machine()
    row = interleaved(case, rounds, seconds_each)
    after = this_machine()
    machine = floors.Machine(
        "this machine", (before.products + after.products) / 2, (before.read + after.read) / 2, before.cache
    )
    least = {name: floors.seconds(found, machine) for name, found in ops.items()}
    show(row)
    for name, value in row["rivals"].items():
        value["floor_ratio"] = round(least[name] / least["moe"], 2)
        value["percent_of_limit"] = (
            None if name != "moe" else value["percent_of_limit"]
        )  # the work counted is moe's
        if name != "moe":
            ratio = value["times_slower_than_moe"]
            print(f"    {name}: {ratio} times the experts' time; floors {value['floor_ratio']} times")
    return row


# ---- the command


def main() -> None:
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: bench_model_cuda.py")
    if where.parse_known_args()[0].device == "cuda":
        from bench_model_cuda import main as on_a_gpu

        raise SystemExit(on_a_gpu())
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[where], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=KINDS, default=["prefill", "decode"])
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name holds one")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=40.0, help="the most one rival takes for a case")
    parser.add_argument("--prepare", action="store_true", help="only write what is missing in build/bench")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    if options.what == ["floors"]:
        results = floors.show_real_sizes()
        if options.out:
            save(options.out, results)
        return
    prepare()
    if options.prepare:
        return
    missing = absent(options.rivals)
    for name, why in missing.items():
        print(f"{name}: absent, {why}")
    names = [name for name in options.rivals if name not in missing]
    gc.collect()
    print(f"peak of bf16 products {peak('bfloat16') / 1e9:.0f} GFLOP/s", flush=True)
    rivals = Rivals()
    try:
        measure(options, names, rivals)
    finally:
        rivals.close()
    print(f"peak of bf16 products {peak('bfloat16') / 1e9:.0f} GFLOP/s", flush=True)


def measure(options: argparse.Namespace, names: list[str], rivals: Rivals) -> None:
    results: list[dict] = []

    def keep(rows: list[dict]) -> None:
        results.extend(rows)
        if options.out:  # each time: a run that is cut short has what it measured
            save(options.out, results, absent=absent(options.rivals))

    def wanted(name: str) -> bool:
        return any(text in name for text in options.only)

    cases = [case for case in model_cases(options.what, names, rivals) if wanted(case.name)]
    if any(not case.name.startswith("train") for case in cases):
        check(names, rivals)
    for case in cases:
        if case.name.startswith("train"):
            for key in [key for key in rivals.running if not key[0].startswith("training")]:
                rivals.running.pop(key).close()
        keep([interleaved(case, options.rounds, options.seconds)])
        show(results[-1])
    if "memory" in options.what:
        keep(memory(names, rivals))
    if "gain" in options.what:
        for case, ops in gain_cases(rivals):
            if wanted(case.name):
                keep([gain(case, ops, options.rounds, options.seconds)])
    if "profile" in options.what:
        for kind, line in (
            ("native", "prefill 2048"),
            ("native", "decode 16"),
            ("training", "train 512 native"),
        ):
            if wanted(line):
                process = rivals.get([kind])[0]
                process.ask("open 1 512" if kind == "native" else line)
                process.ask(line)
                process.ask(f"profile {line}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
