"""The three layers point one way: hebatron -> hebatron_kernels (its exported names) -> _native -> csrc."""

import ast
import re
from pathlib import Path

import hebatron_kernels

ROOT = Path(__file__).resolve().parent.parent
KERNELS, MODEL, CSRC = ROOT / "hebatron_kernels", ROOT / "hebatron", ROOT / "csrc"


def imports(path):
    """(module, name) of every import in a file, relative ones resolved; name is None for `import module`."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def test_the_tree_is_where_this_test_looks():
    assert len(list(MODEL.rglob("*.py"))) > 10 and len(list(KERNELS.rglob("*.py"))) > 20 and CSRC.is_dir()


def test_model_uses_only_exported_kernel_names():
    exported = set(hebatron_kernels.__all__)
    for path in MODEL.rglob("*.py"):
        for module, name in imports(path):
            if module.split(".")[0] == "hebatron_kernels":
                assert module == "hebatron_kernels", f"{path}: imports {module}"
                assert name is None or name in exported, f"{path}: {name} is not exported"


def test_kernels_do_not_import_the_model():
    for path in KERNELS.rglob("*.py"):
        assert all(module.split(".")[0] != "hebatron" for module, _ in imports(path)), path


def test_only_native_imports_compiled_modules():
    for path in KERNELS.rglob("*.py"):
        if path.name == "_native.py":
            continue
        for module, name in imports(path):
            parts = {*module.split("."), name}
            assert not parts & {"_cpu", "_cuda", "_emu"}, f"{path}: imports {module}.{name}"


def test_references_stand_alone():
    for path in KERNELS.rglob("reference.py"):
        for module, name in imports(path):
            alone = module.split(".")[0] != "hebatron_kernels" or module == "hebatron_kernels._layout"
            assert alone, f"{path}: imports {module}.{name}"


def test_nouns_import_only_their_own_rooms_and_shared_helpers():
    shared = {"_check", "_dispatch", "_layout", "_native", "_packing", "_products", "_triton"}
    for path in KERNELS.glob("*/*.py"):
        own = f"hebatron_kernels.{path.parent.name}"
        for module, name in imports(path):
            if module.split(".")[0] != "hebatron_kernels" or module.startswith(own):
                continue
            target = module.removeprefix("hebatron_kernels").strip(".") or name
            assert target.split(".")[0] in shared, f"{path}: imports {module}.{name}"


def includes(path):
    return re.findall(r'^\s*#include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


def sources(*parts):
    return [p for p in CSRC.joinpath(*parts).rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def test_csrc_knows_no_torch_and_python_only_in_bindings():
    for path in sources():
        for header in includes(path):
            assert not header.startswith(("torch/", "ATen/", "c10/")), f"{path}: {header}"
            if path.parent != CSRC:
                assert not header.startswith(("pybind11/", "Python")), f"{path}: {header}"


def test_cpu_and_cuda_do_not_know_each_other():
    for path in sources("cpu"):
        assert not any(h.startswith("cuda") for h in includes(path)), path
    for path in sources("cuda"):
        assert not any(h.startswith("cpu/") for h in includes(path)), path
    for path in sources("hebatron"):
        assert not any(h.startswith(("cpu/", "cuda")) for h in includes(path)), path


def test_only_prim_holds_inline_ptx_and_launches():
    for path in sources("cuda"):
        if path.name != "prim.cuh" and path.parent.name != "prim":
            text = path.read_text(encoding="utf-8")
            assert "<<<" not in text and not re.search(r"\basm\b", text), path


def test_every_kernel_file_has_its_header():
    fields = ["What", "Grid", "Traffic", "Roofline", "Measured", "Limits", "Why so"]
    others = {
        "bindings.cpp",
        "hebatron/check.cpp",
        "cpu/dispatch.cpp",
        "cuda/device.cu",
        "cuda/grouped_gemm.cu",
        "cuda/grouped_gemm_tiles.cu",
    }
    kernels = [
        p for p in sources() if p.suffix in {".cu", ".cpp"} and p.relative_to(CSRC).as_posix() not in others
    ]
    assert kernels
    for path in kernels:
        head = path.read_text(encoding="utf-8")[:2500]
        assert all(re.search(rf"^// {field}\b", head, re.MULTILINE) for field in fields), path


def test_no_pickle_and_no_remote_code():
    forbidden = re.compile(
        r"weights_only\s*=\s*False|\bpickle\.load|trust_remote_code\s*=\s*True|\btorch\.load\("
    )
    for path in [*MODEL.rglob("*.py"), *KERNELS.rglob("*.py")]:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path


def test_files_stay_within_their_budget():
    budgets = {".py": 400, ".cpp": 600, ".cu": 600, ".cuh": 600, ".h": 600}
    special = {"model.py": 700, "setup.py": 80}
    for path in [*MODEL.rglob("*.py"), *KERNELS.rglob("*.py"), *sources(), ROOT / "setup.py"]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= special.get(path.name, budgets[path.suffix]), f"{path}: {lines} lines"
