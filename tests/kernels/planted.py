"""Bugs planted in the CUDA kernels: the checked emulator with one text of csrc changed, for tests that must find it."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from hebatron_kernels import _native, testing

CSRC = testing.ROOT / "csrc"
TILE_LISTS = "cuda/grouped_gemm_sm90.h"


def changed(file, right, wrong, **lists):
    """The texts of csrc's files that a bug changes, by name. `lists`: other entries for the list macros of the sm_90a
    tiles (TILES="X(64, 128, 64)"), so that a bug's test compiles the kernels it runs and not all forty."""
    text = (CSRC / file).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{file} holds {text.count(right)} times: {right}"
    assert right != wrong
    texts = {file: text.replace(right, wrong)}
    for name, entries in lists.items():
        text = texts.get(TILE_LISTS) or (CSRC / TILE_LISTS).read_text(encoding="utf-8")
        definition = rf"^(#define HEBATRON_SM90_{name}\(X\))(?:.*\\\n)*.*$"
        texts[TILE_LISTS], count = re.subn(definition, rf"\1 {entries}", text, flags=re.MULTILINE)
        assert count == 1, f"{TILE_LISTS} defines HEBATRON_SM90_{name} {count} times"
    return texts


@contextmanager
def planted(file, right, wrong, **lists):
    """The checked emulator as it is with `wrong` in place of `right`, which must stand once in csrc/`file`.

    Only the kernels that hold the change are compiled again, with the commands of the checked build, and linked with
    its other objects.
    """
    texts = changed(file, right, wrong, **lists)
    build = testing.build_emulator(checked=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        module = _build(build, Path(folder), texts)
        before = _native.emulator_module
        _native.emulator_module = _native.load_extension("_emu", module)
        try:
            yield
        finally:
            _native.emulator_module = before


def _build(build, folder, files):
    ninja = [str(testing._tool("ninja")), "-C", str(build)]

    def out(*arguments):
        return subprocess.run([*ninja, *arguments], check=True, capture_output=True, text=True).stdout

    target = next(build.glob("_emu.*.so")).name
    kernels = [o for o in out("-t", "inputs", target).split() if o.endswith(".cu.o")]
    module = folder / target
    link = _last(out("-t", "commands", target)).replace(f"-o {target}", f"-o {module}")
    for number, kernel in enumerate(kernels):
        source = CSRC / kernel.partition("/csrc/")[2].removesuffix(".o")
        if not {f"cuda/{source.name}", *_includes(source)} & set(files):
            continue
        object_file = folder / f"{number}.o"
        command = _last(out("-t", "commands", kernel)).replace(f"-o {kernel}", f"-o {object_file}")
        # the changed tree stands before csrc, for the file itself and for whoever includes it
        command = command.replace(f"-I{CSRC}", f"-I{folder} -I{CSRC}", 1)
        if f"cuda/{source.name}" in files:
            command = command.replace(f"-c {source}", f"-c {folder / 'cuda' / source.name}")
        subprocess.run(command, shell=True, cwd=build, check=True, capture_output=True)
        link = link.replace(f" {kernel} ", f" {object_file} ")
    subprocess.run(link, shell=True, cwd=build, check=True, capture_output=True)
    return module


def _last(commands):
    return commands.strip().splitlines()[-1]


def _includes(source, seen=()):
    found = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.startswith('#include "cuda/'):
            name = line.split('"')[1]
            if name not in seen:
                found += [name, *_includes(CSRC / name, (*seen, name))]
    return found
