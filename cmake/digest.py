"""Digests of the kernel files, compiled into the modules: `digest.py OUTPUT CSRC PATH=ARCHS...`, paths inside CSRC.

A kernel's digest covers its file and every header of csrc/cuda it includes, directly or not, as tokens: comments
and layout do not count. csrc/hebatron is left out, because a new operator in the contract would put every kernel in
doubt, and a new meaning of an argument changes the kernel that reads it. So are foreign headers and the compiler,
whose major version stands beside the digest in hebatron_kernels/evidence.json.

OUTPUT becomes a header with one line X("norm", "<digest>", "80-real,90a-real") a kernel file. Files without a kernel
(device.cu) get none.
"""

import hashlib
import re
import sys
from pathlib import Path

TOKEN = re.compile(
    r"""
    (?P<comment> //[^\n]* | /\*.*?\*/ )
  | (?P<newline> \n )
  | (?P<space> \s+? )
  | (?P<raw> (?:u8|[uUL])?R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)" )
  | (?P<text> (?:u8|[uUL])?"(?:\\.|[^"\\\n])*" | [uUL]?'(?:\\.|[^'\\\n])+' )
  | (?P<number> \.?\d(?:[eEpP][+-] | '?[\w.])* )
  | (?P<word> \w+ )
  | (?P<mark_longest> <<=|>>=|<=>|->\*|\.\.\.|::|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\#\# | . )
    """,
    re.VERBOSE | re.DOTALL,
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
KERNEL = re.compile(r"\b__global__\b|#[ \t]*include[ \t]*<cutlass/")


def code_of(path: Path) -> str:
    """The file without its comments."""
    source = path.read_text(encoding="utf-8").replace("\\\n", "")
    return TOKEN.sub(lambda m: " " if m.lastgroup == "comment" else m.group(), source)


def tokens(source: str) -> list[str]:
    """The C++ tokens of a file. A line's end is one only after a preprocessor directive, where it has a meaning."""
    found: list[str] = []
    directive = False
    line_begins = True
    for match in TOKEN.finditer(source.replace("\\\n", "")):
        kind, text = match.lastgroup, match.group()
        if kind == "newline":
            if directive:
                found.append("\n")
            directive, line_begins = False, True
        elif kind not in ("comment", "space"):
            directive = directive or (line_begins and text == "#")
            line_begins = False
            found.append(text)
    return found


def closure(path: Path, csrc: Path) -> dict[str, Path]:
    """A file and the headers of csrc/cuda it reaches, by name inside csrc."""
    reached: dict[str, Path] = {}
    pending = [path]
    while pending:
        file = pending.pop()
        name = file.relative_to(csrc).as_posix()
        if name in reached:
            continue
        reached[name] = file
        for header in INCLUDE.findall(code_of(file)):
            places = [place / header for place in (csrc, file.parent)]
            pending += [p.resolve() for p in places if p.is_file() and csrc / "cuda" in p.resolve().parents][
                :1
            ]
    return reached


def digest(path: Path, csrc: Path) -> str:
    """16 hexadecimal digits over the tokens of the file and its headers, in the order of their names."""
    total = hashlib.sha256()
    for name, file in sorted(closure(path, csrc).items()):
        total.update("\0".join(["", name, *tokens(file.read_text(encoding="utf-8"))]).encode())
    return total.hexdigest()[:16]


def holds_kernel(path: Path, csrc: Path) -> bool:
    return any(KERNEL.search(code_of(file)) for file in closure(path, csrc).values())


def kernel_name(path: Path, csrc: Path) -> str:
    return path.relative_to(csrc / "cuda").with_suffix("").as_posix()


def main(output: str, csrc: str, *files: str) -> None:
    root = Path(csrc).resolve()
    lines = [
        "// Written by cmake/digest.py: X(kernel, digest, architectures).",
        "#define HEBATRON_KERNELS(X) \\",
    ]
    for file in sorted(files):
        name, archs = file.split("=")
        path = root / name
        if holds_kernel(path, root):
            lines.append(f'  X("{kernel_name(path, root)}", "{digest(path, root)}", "{archs}") \\')
    text = "\n".join([*lines, ""]) + "\n"
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
