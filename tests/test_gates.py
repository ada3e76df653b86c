"""The build gates' reading of logs, machine code and symbols (.ci/cuda_gates.py): each unmet demand is a failure."""

import importlib.util
import shutil
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gates = sys.modules["cuda_gates"] = load(Path(".ci/cuda_gates.py"))
digest = load(Path("cmake/digest.py"))

GEMM, HELPER = "_ZN8hebatron4cuda4gemmILi128EEEvNS_4ArgsE", "_ZN8hebatron4cuda4tidyEPf"
NAMES = {GEMM: "void hebatron::cuda::gemm<128>(Args)", HELPER: "hebatron::cuda::tidy(float*)"}
BUDGET = {
    "archs": ["sm_90a"],
    "kernels": {
        "gemm": {
            "registers": 168,
            "must": ["HGMMA", "UTMALDG.3D"],
            "must_not": ["ATOMG"],
            "at_most": {"MEMBAR": 2},
        },
        "tidy": {"registers": 40},
    },
}
LOG = f"""[3/9] nvcc -c gemm.cu
ptxas info    : 4 bytes gmem
ptxas info    : Compiling entry function '{GEMM}' for 'sm_90a'
ptxas info    : Function properties for {GEMM}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 1152 bytes smem
  ptxas info    : Compiling entry function '{HELPER}' for 'sm_90a'
  ptxas info    : Function properties for {HELPER}
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 24 registers
"""


def body(*instructions):
    """What cuobjdump prints of one kernel: the instructions, enough others around them, padding."""
    lines = []
    for i, one in enumerate([*["IMAD R0, R1, R2, R3"] * 40, *instructions, "@!P0 EXIT", "NOP", "NOP"]):
        lines.append(f"        /*{16 * i:04x}*/    {one} ;    /* 0x00000a0000017a02 */")
        lines.append(" " * 60 + "/* 0x000fe40000000f00 */")
    return "\n".join(lines)


def sass(
    gemm=("HGMMA.64x208x16.F32.BF16 R24, gdesc[UR4]", "@P0 UTMALDG.3D [UR8], [UR4]"),
    archs=("sm_90a",),
    helper=(),
):
    text = ""
    for arch in archs:
        text += (
            f"\nFatbin elf code:\n================\narch = {arch}\n\n\tcode for {arch}\n\t.target\t{arch}\n"
        )
        text += (
            f'\n\t\tFunction : {HELPER}\n\t.headerflags\t@"EF_CUDA_SM90"\n{body(*helper)}\n\t\t..........\n'
        )
        text += f'\n\t\tFunction : {GEMM}\n\t.headerflags\t@"EF_CUDA_SM90"\n{body(*gemm)}\n\t\t..........\n'
    return text


def failures(log=LOG, code=None, budget=BUDGET):
    found = gates.read_log(log)
    code = gates.read_sass(sass() if code is None else code)
    return [*found.complaints, *gates.check_file("gemm", budget, code, found, NAMES)]


def test_a_clean_build_passes():
    assert failures() == []


def test_log_gives_every_kernels_registers():
    log = gates.read_log(LOG)
    assert log.registers == {(GEMM, "sm_90a"): 168, (HELPER, "sm_90a"): 24}
    assert log.complaints == []


@pytest.mark.parametrize("kind", ["stores", "loads"])
def test_a_spill_fails(kind):
    [failure] = failures(LOG.replace(f"0 bytes spill {kind}", f"16 bytes spill {kind}", 1))
    assert failure.startswith(f"{GEMM}: 0 bytes stack frame") and f"16 bytes spill {kind}" in failure


@pytest.mark.parametrize("code", ["C7510", "C7508", "C7512"])
def test_serialised_wgmma_fails(code):
    line = (
        f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    )
    [failure] = failures(LOG + line)
    assert code in failure


def test_a_warning_of_ptxas_fails():
    [failure] = failures(LOG + "ptxas warning : Registers are spilled to local memory in function 'f'\n")
    assert "ptxas warning" in failure


def test_too_many_registers_fail():
    [failure] = failures(LOG.replace("Used 168", "Used 169"))
    assert failure == f"gemm: {GEMM} for sm_90a: 169 registers, at most 168"


def test_fewer_registers_than_setmaxnreg_hands_out_fail():
    code = sass(
        gemm=(
            "HGMMA.64x208x16.F32.BF16 R24, gdesc[UR4]",
            "UTMALDG.3D [UR8], [UR4]",
            "USETMAXREG.DEALLOC 0x28",
        )
    )
    assert failures(code=code) == []
    [failure] = failures(LOG.replace("Used 168", "Used 160"), code)
    assert "160 registers at the launch, must be (168, 128)" in failure


def test_a_missing_report_fails():
    start = LOG.index("ptxas info    : Compiling entry function")
    assert (
        failures(LOG[:start])
        == [
            f"gemm: {HELPER} for sm_90a: ptxas did not report its registers",
            f"gemm: {GEMM} for sm_90a: ptxas did not report its registers",
        ][::-1]
    )


@pytest.mark.parametrize("missing", ["HGMMA", "UTMALDG.3D"])
def test_a_missing_instruction_fails(missing):
    kept = [i for i in ("HGMMA.64x208x16.F32.BF16 R24", "UTMALDG.3D [UR8]") if missing not in i]
    [failure] = failures(code=sass(gemm=kept))
    assert failure == f"gemm: {GEMM} for sm_90a: holds no {missing}"


def with_where(**demands):
    kernels = BUDGET["kernels"]
    return BUDGET | {"kernels": kernels | {"gemm": kernels["gemm"] | {"where": demands}}}


def test_an_instantiation_may_have_demands_of_its_own():
    assert failures(budget=with_where(**{"<128>": ["HGMMA.64x208x16"]})) == []
    [failure] = failures(budget=with_where(**{"<128>": ["HGMMA.64x128x16"]}))
    assert failure == f"gemm: {GEMM} for sm_90a: holds no HGMMA.64x128x16"
    stores = ("HGMMA.64x208x16.F32.BF16 R24", "UTMALDG.3D [UR8]", "STG.E.128 [R2], R4")
    refusing = with_where(**{"<128>": ["STG.E.128", "no STG.E"]})
    assert failures(code=sass(gemm=stores), budget=refusing) == []
    [failure] = failures(code=sass(gemm=(*stores, "@P0 STG.E [R2], R4")), budget=refusing)
    assert failure == f"gemm: {GEMM} for sm_90a: holds STG.E"
    [failure] = failures(budget=with_where(**{"<64>": ["HGMMA"]}))
    assert failure == "gemm: gemm: no instantiation has <64> in its name"


def test_another_instruction_of_like_name_does_not_count():
    [failure] = failures(code=sass(gemm=("HGMMAX R1, R2", "UTMALDG.3D [UR8]")))
    assert failure.endswith("holds no HGMMA")
    [failure] = failures(code=sass(gemm=("HGMMA R1", "UTMALDG.2D [UR8]")))
    assert failure.endswith("holds no UTMALDG.3D")


@pytest.mark.parametrize("bad", ["LDL.64 R2, [R1]", "@!P1 STL [R1+0x8], R4", "@UP0 LDL R2, [R1]"])
def test_local_memory_fails(bad):
    [failure] = failures(code=sass(helper=[bad]))
    assert failure.startswith(f"gemm: {HELPER} for sm_90a: holds ")


def test_a_refused_instruction_fails():
    [failure] = failures(code=sass(gemm=("HGMMA R1", "UTMALDG.3D [UR8]", "ATOMG.E.ADD R1, [R2]")))
    assert failure == f"gemm: {GEMM} for sm_90a: holds ATOMG"


def test_an_instruction_too_often_fails():
    kept = ("HGMMA R1", "UTMALDG.3D [UR8]", "MEMBAR.ALL.GPU", "@!P0 MEMBAR.ALL.CTA")
    assert failures(code=sass(gemm=kept)) == []
    [failure] = failures(code=sass(gemm=(*kept, "@!P0 MEMBAR.ALL.GPU")))
    assert failure == f"gemm: {GEMM} for sm_90a: holds MEMBAR 3 times, at most 2"


def test_an_empty_stub_fails():
    stub = sass().split("Function : " + HELPER)[0] + f"Function : {HELPER}\n        /*0000*/  EXIT ;\n"
    stub += "".join(f"        /*{i:04x}*/  NOP ;\n" for i in range(100))
    stub += sass().split("..........", 1)[1]
    [failure] = failures(code=stub)
    assert failure == f"gemm: {HELPER} for sm_90a: 1 instructions, an empty stub"


def test_code_for_an_architecture_not_asked_for_fails():
    log = LOG + LOG.replace("sm_90a", "sm_80")
    assert "gemm: holds code for ['sm_80', 'sm_90a'], must for ['sm_90a']" in failures(
        log, sass(archs=("sm_80", "sm_90a"))
    )


def test_a_missing_architecture_fails():
    [failure] = failures(budget=BUDGET | {"archs": ["sm_80", "sm_90a"]})
    assert failure == "gemm: holds code for ['sm_90a'], must for ['sm_80', 'sm_90a']"


def test_a_kernel_missing_for_one_architecture_fails():
    code = gates.read_sass(sass(archs=("sm_80", "sm_90a")))
    del code[HELPER, "sm_80"]
    log = gates.read_log(LOG + LOG.replace("sm_90a", "sm_80"))
    found = gates.check_file("gemm", BUDGET | {"archs": ["sm_80", "sm_90a"]}, code, log, NAMES)
    assert found == [f"gemm: {HELPER} is missing for sm_80"]


def test_kernels_and_budgets_must_name_each_other():
    kernels = BUDGET["kernels"]
    [unknown, over] = failures(budget=BUDGET | {"kernels": {"gemm": kernels["gemm"]}})
    assert unknown == "gemm: tidy is not in budgets.toml" and over.endswith("24 registers, at most 0")
    [stale] = failures(budget=BUDGET | {"kernels": kernels | {"old": {"registers": 8}}})
    assert stale == "gemm: old is in budgets.toml, not in the code"


@pytest.mark.parametrize(
    "demangled",
    [
        "void hebatron::cuda::(anonymous namespace)::forward<__nv_bfloat16, float, 8>(hebatron::RmsNormArgs)",
        "hebatron::cuda::(anonymous namespace)::forward(float const*, long)",
        "void forward<(hebatron::Kind)1>(hebatron::Args<3>)",
    ],
)
def test_kernel_of_finds_the_name_in_the_source(demangled):
    assert gates.kernel_of(demangled) == "forward"


def test_symbols_of_libc_and_python_pass_and_others_fail():
    good = [
        "                 U PyObject_Str",
        "                 U _Py_Dealloc",
        "                 U memcpy@GLIBC_2.14",
        "                 U _Znwm@GLIBCXX_3.4",
        "                 U __cxa_throw@@CXXABI_1.3",
        "                 U _Unwind_Resume@GCC_3.0",
        "                 w __gmon_start__",
    ]
    assert gates.check_symbols("\n".join(good)) == []
    for bad in (
        "cuLaunchKernel",
        "cudaMalloc",
        "_ZN2at6Tensor",
        "cudaMalloc@libcudart.so.13",
        "xPyObject_Str",
    ):
        assert gates.check_symbols("\n".join([*good, f"                 U {bad}"])) == [
            f"undefined symbol {bad}"
        ]


def test_needed_libraries():
    line = " 0x0000000000000001 (NEEDED)             Shared library: [{}]"
    good = ["libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"]
    assert gates.check_needed("\n".join(map(line.format, good))) == []
    for bad in ("libcuda.so.1", "libcudart.so.13", "libtorch.so", "libc10.so"):
        assert gates.check_needed("\n".join(map(line.format, [*good, bad]))) == [f"needs {bad}"]
    assert gates.check_needed("no dynamic section") == ["readelf lists no needed library"]


def fake_tools(folder, monkeypatch, code):
    """cuobjdump, nm, readelf and c++filt that print prepared text, alone on PATH."""
    (folder / "bin").mkdir()
    answers = {
        "cuobjdump": code,
        "nm": " U memcpy@GLIBC_2.14",
        "readelf": " (NEEDED) Shared library: [libc.so.6]",
    }
    for tool, text in answers.items():
        (folder / f"{tool}.txt").write_text(text)
        (folder / "bin" / tool).write_text(f'#!/bin/sh\n{shutil.which("cat")} "{folder}/{tool}.txt"\n')
    names = "".join(f"s/{symbol}/{name}/;" for symbol, name in NAMES.items())
    (folder / "bin" / "c++filt").write_text(f'#!/bin/sh\nexec {shutil.which("sed")} "{names}"\n')
    for tool in (folder / "bin").iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))


def run_check(folder, monkeypatch, log=LOG, files=("gemm",), budgets="", code=None):
    fake_tools(folder, monkeypatch, sass() if code is None else code)
    for file in files:
        (folder / "build/x/csrc/cuda").mkdir(parents=True, exist_ok=True)
        (folder / f"build/x/csrc/cuda/{file}.cu.o").touch()
    (folder / "build.log").write_text(log)
    (folder / "budgets.toml").write_text(
        '[gemm]\narchs = ["sm_90a"]\nkernels.gemm = {registers = 168, must = ["HGMMA"]}\n'
        f"kernels.tidy = {{registers = 40}}\n{budgets}"
    )
    return gates.main("check", *[str(folder / p) for p in ("build.log", "build", "_cuda.so", "budgets.toml")])


def test_check_joins_log_objects_and_budgets(tmp_path, monkeypatch, capsys):
    assert run_check(tmp_path, monkeypatch) == 0
    assert "2 kernels of gemm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "gemm: is in budgets.toml, not in the build"),
        ({"files": ["gemm", "other"]}, "other: is not in budgets.toml"),
        ({"budgets": "[conv]\narchs = []\nkernels = {}\n"}, "conv: is in budgets.toml, not in the build"),
        ({"log": LOG + LOG.replace("4gemm", "4spam")}, "in the log, in no object file"),
        ({"log": LOG + "ptxas info : (C7510) Potential Performance Loss\n"}, "C7510"),
        ({"code": ""}, "gemm: is in budgets.toml, not in the build"),
    ],
)
def test_check_fails(tmp_path, monkeypatch, capsys, changes, message):
    assert run_check(tmp_path, monkeypatch, **changes) == 1
    assert message in capsys.readouterr().err


def test_check_passes_over_an_optional_file_that_is_not_built(tmp_path, monkeypatch):
    budgets = "[cutlass]\narchs = []\noptional = true\nkernels = {}\n"
    assert run_check(tmp_path, monkeypatch, budgets=budgets) == 0


def test_key_follows_sources_gates_and_compilers(tmp_path, monkeypatch):
    tree, tools = tmp_path / "tree", tmp_path / "bin"
    for name in gates.KEYED:
        file = tree / name if (ROOT / name).is_file() else tree / name / "file"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (tree / "README.md").write_text("not part of it")
    tools.mkdir()
    for tool in ("nvcc", "c++"):
        (tools / tool).write_text("#!/bin/sh\necho 13.0\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    first = gates.key(tree)
    (tree / "README.md").write_text("changed")
    assert gates.key(tree) == first
    keys = {first}
    (tree / "csrc/cuda/file").write_text("changed")
    keys.add(gates.key(tree))
    (tree / "csrc/cuda/file").rename(tree / "csrc/cuda/renamed")
    keys.add(gates.key(tree))
    (tree / ".ci/gates").write_text("changed")
    keys.add(gates.key(tree))
    (tools / "nvcc").write_text("#!/bin/sh\necho 13.1\n")
    keys.add(gates.key(tree))
    assert len(keys) == 5


def test_what_the_key_covers_exists():
    assert all((ROOT / name).exists() for name in gates.KEYED)


def test_every_kernel_file_has_a_budget():
    csrc = ROOT / "csrc"
    files = {
        digest.kernel_name(p, csrc) for p in (csrc / "cuda").rglob("*.cu") if digest.holds_kernel(p, csrc)
    }
    table = tomllib.loads((csrc / "cuda/budgets.toml").read_text())
    assert set(table) == files
    for file, budget in table.items():
        assert set(budget) <= {"archs", "optional", "kernels"}, file
        for name, demand in budget["kernels"].items():
            assert {"registers"} <= set(demand) <= {"registers", "must", "where", "must_not", "at_most"}, (
                f"{file}.{name}"
            )
            assert 0 < demand["registers"] <= 255, f"{file}.{name}"


def test_holds_knows_variants_only():
    code = Counter({"REDUX.SUM": 1, "RED.E.ADD": 1})
    assert gates.holds(code, "RED") and gates.holds(code, "REDUX")
    assert not gates.holds(Counter({"REDUX.SUM": 1}), "RED")


# The Triton kernels' gate, without Triton
