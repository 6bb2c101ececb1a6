"""How large and how dense the code is: `python -m tests.repo.size_report`, part of `make lint`.

Lines alone can be saved by writing longer ones, so density is shown beside length. A code line is
a line with at least one token that is neither a comment nor a docstring.
"""

from __future__ import annotations

import ast
import io
import itertools
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
WIDTH = 100
CORE = ("slicefine", "kernels")
SOURCES = (*CORE, "benchmarks", "examples")
EVERYTHING = (*SOURCES, "tests")
# The one class that may have more methods: the layer is where weight, master, optimizer, state
# dicts and sharding meet, and each of them calls a method of its own.
LARGEST_CLASS = "SliceLayer"
LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
BEFORE_A_STATEMENT = {tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


@dataclass
class Size:
    """Counts of some files. comments: lines that hold nothing but a comment."""

    lines: int = 0
    code_lines: int = 0
    tokens: int = 0
    comments: int = 0
    long_lines: int = 0
    format_skips: int = 0

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / max(1, self.code_lines)

    @property
    def comment_share(self) -> float:
        return self.comments / max(1, self.code_lines)

    @property
    def long_share(self) -> float:
        return self.long_lines / max(1, self.lines)


@dataclass
class Named:
    """A file, function or class with its length (a class: its number of methods)."""

    size: int
    name: str = field(compare=False)


def python_files(folders: Iterable[str]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def tokens_of(text: str) -> Iterator[tokenize.TokenInfo]:
    """Every token; an f-string is one token on every Python, as any other string is."""
    start = getattr(tokenize, "FSTRING_START", None)
    end = getattr(tokenize, "FSTRING_END", None)
    open_strings: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if start is not None and token.type == start:
            open_strings.append(token)
        elif end is not None and token.type == end:
            first = open_strings.pop()
            if not open_strings:
                yield first._replace(type=tokenize.STRING, end=token.end)
        elif not open_strings:
            yield token


def is_docstring(token: tokenize.TokenInfo, before: int) -> bool:
    """before: type of the last token that was neither a comment nor an empty line."""
    return token.type == tokenize.STRING and before in BEFORE_A_STATEMENT


def size_of(text: str) -> Size:
    """Counts of one file's text."""
    lines = text.splitlines()
    found = Size(
        lines=len(lines),
        long_lines=sum(len(line) > WIDTH for line in lines),
        format_skips=sum("# fmt: " + "skip" in line for line in lines),
    )
    code: set[int] = set()
    before = tokenize.ENCODING
    for token in tokens_of(text):
        if token.type == tokenize.COMMENT:
            found.comments += token.line.lstrip().startswith("#")
        docstring = is_docstring(token, before)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            before = token.type
        if token.type in LAYOUT or docstring:
            continue
        found.tokens += 1
        code.update(range(token.start[0], token.end[0] + 1))
    found.code_lines = len(code)
    return found


def total(folders: Iterable[str]) -> Size:
    """Counts of all Python files of some folders together."""
    found = Size()
    for path in python_files(folders):
        size = size_of(path.read_text(encoding="utf-8"))
        for name, value in vars(size).items():
            setattr(found, name, getattr(found, name) + value)
    return found


def largest_files() -> list[Named]:
    """Sources of every language, the longest first."""
    paths = [
        *python_files(("slicefine", "kernels", "benchmarks")),
        *(ROOT / "csrc").iterdir(),
    ]
    sizes = [
        Named(
            len(path.read_text(encoding="utf-8").splitlines()), str(path.relative_to(ROOT))
        )
        for path in paths
    ]
    return sorted(sizes, key=lambda entry: entry.size, reverse=True)


def nodes_of(folders: Iterable[str], kind: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path in python_files(folders):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path, node


def largest_functions() -> list[Named]:
    found = []
    for path, node in nodes_of(("slicefine", "kernels", "benchmarks"), ast.FunctionDef):
        assert isinstance(node, ast.FunctionDef)
        length = (node.end_lineno or 0) - node.lineno + 1
        found.append(Named(length, f"{path.relative_to(ROOT)}:{node.name}"))
    return sorted(found, key=lambda entry: entry.size, reverse=True)


def largest_classes() -> list[Named]:
    """Classes by their number of methods."""
    found = []
    for path, node in nodes_of(SOURCES, ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        methods = sum(isinstance(part, ast.FunctionDef) for part in node.body)
        found.append(Named(methods, f"{path.relative_to(ROOT)}:{node.name}"))
    return sorted(found, key=lambda entry: entry.size, reverse=True)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    # kernels/ is a source root and no package
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """module -> modules of this repository that it imports, in functions and for types too."""
    files = {module_name(path): path for path in python_files(SOURCES)}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    wanted.add(inner if inner in files else node.module)
        graph[module] = (wanted & files.keys()) - {module}
    # the package's front door re-exports everything, lazily: through it, no module is a circle
    graph["slicefine"] = set()
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    return seen


def import_circles() -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    graph = import_graph()
    reach = {module: reachable(graph, module) for module in graph}
    circles: list[list[str]] = []
    for module in sorted(graph):
        members = {other for other in reach[module] if module in reach[other]}
        if members and not any(module in circle for circle in circles):
            circles.append(sorted(members | {module}))
    return circles


def folder_circles() -> list[tuple[str, str]]:
    """Pairs of top folders whose modules import each other."""
    graph = import_graph()
    top = lambda module: module.partition(".")[0]
    pairs = {(top(a), top(b)) for a, others in graph.items() for b in others}
    names = sorted({name for pair in pairs for name in pair})
    return [
        (a, b)
        for a, b in itertools.combinations(names, 2)
        if (a, b) in pairs and (b, a) in pairs
    ]


def readme() -> tuple[int, int]:
    """(lines, pictures) of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return len(text.splitlines()), text.count("![") + text.count("<img")


def report() -> str:
    """The figures, a line each."""
    core, tests, all_files = total(CORE), total(("tests",)), total(EVERYTHING)
    names = lambda entries: ", ".join(
        f"{entry.name} {entry.size}" for entry in entries[:10]
    )
    lines, pictures = readme()
    return "\n".join(
        (
            f"largest files: {names(largest_files())}",
            f"largest functions: {names(largest_functions())}",
            f"most methods: {names(largest_classes()[:3])}",
            f"tokens per code line: core {core.tokens_per_line:.2f}, tests"
            f" {tests.tokens_per_line:.2f}",
            f"comment lines of their own: core {core.comments}, {core.comment_share:.1%} of"
            f" {core.code_lines} code lines",
            f"lines over {WIDTH} columns: {all_files.long_share:.2%}; formatter switched off:"
            f" {all_files.format_skips}",
            f"import circles: {len(import_circles())}; folders that import each other:"
            f" {len(folder_circles())}",
            f"README: {lines} lines, {pictures} pictures",
        )
    )


if __name__ == "__main__":
    print(report())
    for circle in import_circles():
        print("import circle:", ", ".join(circle))
    sys.exit(0)
