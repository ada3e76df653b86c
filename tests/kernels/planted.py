"""Bugs planted in the CUDA kernels: the checked emulator with one text of csrc changed, for tests that must find it."""

import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from hebatron_kernels import _native, testing

CSRC = testing.ROOT / "csrc"


@contextmanager
def planted(file, right, wrong):
    """The checked emulator as it is with `wrong` in place of `right`, which must stand once in csrc/`file`.

    Only the kernels that hold the change are compiled again, with the commands of the checked build, and linked with
    its other objects.
    """
    text = (CSRC / file).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{file} holds {text.count(right)} times: {right}"
    build = testing.build_emulator(checked=True)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / file
        changed.parent.mkdir(parents=True)
        changed.write_text(text.replace(right, wrong), encoding="utf-8")
        module = _build(build, Path(folder), file)
        before = _native.emulator_module
        _native.emulator_module = _native.load_extension("_emu", module)
        try:
            yield
        finally:
            _native.emulator_module = before


def _build(build, folder, file):
    ninja = [str(testing._tool("ninja")), "-C", str(build)]

    def out(*arguments):
        return subprocess.run([*ninja, *arguments], check=True, capture_output=True, text=True).stdout

    target = next(build.glob("_emu.*.so")).name
    kernels = [o for o in out("-t", "inputs", target).split() if o.endswith(".cu.o")]
    module = folder / target
    link = _last(out("-t", "commands", target)).replace(f"-o {target}", f"-o {module}")
    for number, kernel in enumerate(kernels):
        source = CSRC / kernel.partition("/csrc/")[2].removesuffix(".o")
        if file not in (f"cuda/{source.name}", *_includes(source)):
            continue
        object_file = folder / f"{number}.o"
        command = _last(out("-t", "commands", kernel)).replace(f"-o {kernel}", f"-o {object_file}")
        # the changed tree stands before csrc, for the file itself and for whoever includes it
        command = command.replace(f"-I{CSRC}", f"-I{folder} -I{CSRC}", 1)
        if file == f"cuda/{source.name}":
            command = command.replace(f"-c {source}", f"-c {folder / file}")
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
