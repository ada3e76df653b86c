"""What must hold of the compiled CUDA kernels, read from the compiler's log and the machine code; no GPU is needed.

    cuda_gates.py key ROOT                       the hash under which a passed gate is remembered
    cuda_gates.py check LOG BUILD MODULE BUDGETS with cuobjdump, nvdisasm, nm, readelf and c++filt on PATH

`check` reads the log of nvcc with -Xptxas=-v,-warn-spills, the kernels' object files below BUILD and the module, and
prints every demand that is not met:
- no kernel spills, no wgmma is serialised (C75xx), ptxas warns of nothing;
- each kernel keeps to its registers and instructions in csrc/cuda/budgets.toml, uses no local memory, exists for the
  architectures its file names and is not an empty stub there;
- the module needs nothing of a driver, of libcudart or of torch: only libc, libstdc++ and Python.
"""

import hashlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A kernel compiled for an architecture it has no body for is a return and padding; the smallest real one has 100.
MIN_INSTRUCTIONS = 32
# Registers a thread of 384 and of 512 starts with where setmaxnreg then moves them between warpgroups: all of an SM's.
# With fewer the consumers would wait for ever for registers that no producer has to give.
SETMAXNREG = (168, 128)
LOCAL_MEMORY = ("LDL", "STL")
LIBRARIES = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux[\w-]*)\.so\.\d+")
VERSIONS = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
PYTHON = re.compile(r"_?Py\w+")
KEYED = (
    "csrc/cuda",
    "csrc/hebatron",
    "csrc/bindings.cpp",
    "cmake",
    "CMakeLists.txt",
    "setup.py",
    ".ci/gates",
    ".ci/cuda_gates.py",
    "bench/fetch_cutlass.sh",
)


Build = tuple[str, str]  # a kernel's symbol, its architecture


@dataclass(frozen=True)
class Log:
    """What ptxas said: the registers of every kernel, and its complaints."""

    registers: dict[Build, int]
    complaints: list[str]


def read_log(text: str) -> Log:
    registers: dict[Build, int] = {}
    complaints = []
    build: Build | None = None
    subject = "a function"
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            build = (found[1], found[2])
        elif found := re.search(r"Function properties for (\S+)", line):
            subject = found[1]
        elif found := re.search(r"Used (\d+) registers", line):
            if build is None:
                complaints.append(f"registers of an unnamed kernel: {line.strip()}")
            else:
                registers[build] = int(found[1])
        if re.search(r"\bC75\d\d\b|ptxas warning", line):
            complaints.append(line.strip())
        elif any(int(n) for n in re.findall(r"(\d+) bytes spill", line)):
            complaints.append(f"{subject}: {line.strip()}")
    return Log(registers, complaints)


def read_sass(text: str) -> dict[Build, Counter[str]]:
    """How often each kernel of `cuobjdump -sass` uses each instruction; the padding is left out."""
    kernels: dict[Build, Counter[str]] = {}
    arch = symbol = ""
    for line in text.splitlines():
        if found := re.match(r"\s*code for (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            symbol = found[1]
            kernels[symbol, arch] = Counter()
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            if found[1] != "NOP":
                kernels[symbol, arch][found[1]] += 1
    return kernels


def count(instructions: Counter[str], name: str) -> int:
    return sum(n for one, n in instructions.items() if one == name or one.startswith(f"{name}."))


def holds(instructions: Counter[str], name: str) -> bool:
    return count(instructions, name) > 0


def kernel_of(name: str) -> str:
    """The name in the source: "void hebatron::cuda::(anonymous namespace)::forward<float, 4>(Args)" is "forward"."""
    plain = name.replace("(anonymous namespace)", "anonymous")
    return re.split(r"[<(]", plain)[0].split()[-1].split("::")[-1]


def check_file(
    file: str, budget: dict[str, Any], sass: dict[Build, Counter[str]], log: Log, names: dict[str, str]
) -> list[str]:
    """What one object file's kernels lack of their budget. `names`: each symbol, demangled."""
    failures = []
    archs = {arch for _, arch in sass}
    if archs != set(budget["archs"]):
        failures.append(f"{file}: holds code for {sorted(archs)}, must for {sorted(budget['archs'])}")
    kernels = budget["kernels"]
    found = {kernel_of(names[symbol]) for symbol, _ in sass}
    failures += [
        f"{file}: {name}: no instantiation has {part} in its name"
        for name, demand in kernels.items()
        for part in demand.get("where", {})
        if not any(part in n for n in names.values() if kernel_of(n) == name)
    ]
    failures += [f"{file}: {name} is not in budgets.toml" for name in sorted(found - set(kernels))]
    failures += [
        f"{file}: {name} is in budgets.toml, not in the code" for name in sorted(set(kernels) - found)
    ]
    for symbol in sorted({symbol for symbol, _ in sass}):
        failures += [f"{file}: {symbol} is missing for {a}" for a in sorted(archs) if (symbol, a) not in sass]
    for (symbol, arch), instructions in sorted(sass.items()):
        where = f"{file}: {symbol} for {arch}"
        demand = kernels.get(kernel_of(names[symbol]), {"registers": 0})
        used = log.registers.get((symbol, arch))
        if used is None:
            failures.append(f"{where}: ptxas did not report its registers")
        elif used > demand["registers"]:
            failures.append(f"{where}: {used} registers, at most {demand['registers']}")
        elif holds(instructions, "USETMAXREG") and used not in SETMAXNREG:
            failures.append(f"{where}: setmaxnreg with {used} registers at the launch, must be {SETMAXNREG}")
        if instructions.total() < MIN_INSTRUCTIONS:
            failures.append(f"{where}: {instructions.total()} instructions, an empty stub")
        meant = list(demand.get("must", []))
        for part, more in demand.get("where", {}).items():
            meant += more if part in names[symbol] else []
        unwanted = [name.removeprefix("no ") for name in meant if name.startswith("no ")]
        failures += [f"{where}: holds {name}" for name in unwanted if name in instructions]
        wanted = [name for name in meant if not name.startswith("no ")]
        failures += [f"{where}: holds no {name}" for name in wanted if not holds(instructions, name)]
        refused = [*LOCAL_MEMORY, *demand.get("must_not", [])]
        failures += [f"{where}: holds {name}" for name in refused if holds(instructions, name)]
        failures += [
            f"{where}: holds {name} {count(instructions, name)} times, at most {most}"
            for name, most in demand.get("at_most", {}).items()
            if count(instructions, name) > most
        ]
    return failures


def check_symbols(undefined: str) -> list[str]:
    """`nm -D --undefined-only`: only versioned symbols of the C and C++ libraries, and Python's interface."""
    failures = []
    for line in undefined.splitlines():
        *_, kind, symbol = line.split()
        weak = kind in "wv"  # resolved if it is there: the loader's own hooks
        if not (weak or VERSIONS.search(symbol) or PYTHON.fullmatch(symbol)):
            failures.append(f"undefined symbol {symbol}")
    return failures


def check_needed(dynamic: str) -> list[str]:
    """`readelf -d`: the libraries the loader will ask for."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    if not needed:
        return ["readelf lists no needed library"]
    return [f"needs {name}" for name in needed if not LIBRARIES.fullmatch(name)]


def output(*command: str | Path, stdin: str = "") -> str:
    command = tuple(str(part) for part in command)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, input=stdin).stdout


def demangled(text: str) -> str:
    return output("c++filt", "-r", stdin=text)  # -r: CUTLASS's names are past c++filt's own limit


def check(log_path: Path, build: Path, module: Path, budgets: Path) -> tuple[list[str], str]:
    """Every failure, and a line of what was looked at."""
    log = read_log(log_path.read_text(encoding="utf-8", errors="replace"))
    failures = list(log.complaints)
    table = tomllib.loads(budgets.read_text(encoding="utf-8"))
    seen: set[Build] = set()
    files = []
    for path in sorted(build.rglob("csrc/cuda/**/*.cu.o")):
        sass = read_sass(output("cuobjdump", "-sass", path))
        if not sass:
            continue
        file = path.as_posix().rpartition("csrc/cuda/")[2].removesuffix(".cu.o")
        symbols = sorted({symbol for symbol, _ in sass})
        names = dict(zip(symbols, demangled("\n".join(symbols)).splitlines()))
        files.append(file)
        seen |= set(sass)
        if file in table:
            failures += check_file(file, table[file], sass, log, names)
        else:
            failures.append(f"{file}: is not in budgets.toml")
    needed = {file for file, budget in table.items() if not budget.get("optional", False)}
    failures += [f"{file}: is in budgets.toml, not in the build" for file in sorted(needed - set(files))]
    failures += [
        f"{symbol} for {arch}: in the log, in no object file"
        for symbol, arch in sorted(set(log.registers) - seen)
    ]
    failures += [
        f"{module.name}: {why}" for why in check_symbols(output("nm", "-D", "--undefined-only", module))
    ]
    failures += [f"{module.name}: {why}" for why in check_needed(output("readelf", "-d", module))]
    return failures, f"{len(seen)} kernels of {', '.join(files)}"


def key(root: Path) -> str:
    """Changes with all a passed CUDA gate depends on: the sources, the build, the gates, the compilers, Python."""
    total = hashlib.sha256()
    for name in KEYED:
        path = root / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            total.update(f"\0{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    for compiler in ("nvcc", "c++"):
        total.update(output(compiler, "--version").encode())
    total.update(sys.version.encode())
    return total.hexdigest()[:24]


def main(command: str, *arguments: str) -> int:
    paths = [Path(argument) for argument in arguments]
    if command == "key":
        print(key(*paths))
        return 0
    failures, looked_at = check(*paths)
    if failures:
        print(demangled("\n".join(failures)), file=sys.stderr)
    else:
        print(f"CUDA: {looked_at}: registers, instructions and symbols as budgeted, no spill, no C75xx")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
