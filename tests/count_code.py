"""Count the package's files, lines and functions: ``python -m tests.count_code [FOLDER]``.

The figures describe the structure of the code, not its quality. Code is hard to follow with many
tiny functions as well as with a few huge ones.
"""

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    """Yield every function and method of a module, including nested ones."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def length(function: Function) -> int:
    """Return the number of lines from ``def`` to the end of the body."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def used_once(sources: dict[Path, str], trees: dict[Path, ast.Module]) -> list[tuple[str, int]]:
    """Return private functions that are used only once in their module, with their lengths."""
    found = []
    for path, tree in trees.items():
        for function in functions(tree):
            name = function.name
            if not name.startswith("_") or name.startswith("__"):
                continue
            if len(re.findall(rf"\b{name}\b", sources[path])) == 2:
                found.append((f"{path}:{name}", length(function)))
    return found


def is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        "Protocol" in ast.unparse(base) for base in node.bases
    )


def report(package: Path) -> dict[str, float]:
    """Return the figures of a package, by name."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    lengths = [length(f) for tree in trees.values() for f in functions(tree)]
    lines = sum(source.count("\n") for source in sources.values())
    folders = Counter(path.parent for path in sources if path.name != "__init__.py")
    once = used_once(sources, trees)
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    return {
        "modules": len(sources),
        "modules without __init__.py": sum(folders.values()),
        "most modules in a folder, without __init__.py": max(folders.values()),
        "lines": lines,
        "lines that are not blank": sum(
            1 for s in sources.values() for line in s.splitlines() if line.strip()
        ),
        "functions": len(lengths),
        "functions per 1,000 lines": round(1000 * len(lengths) / lines, 1),
        "median function, lines": median(lengths),
        "longest function, lines": max(lengths),
        "longest module, lines": max(source.count("\n") for source in sources.values()),
        "Protocols": sum(map(is_protocol, nodes)),
        "private functions used once": len(once),
        "of those, 6 lines or fewer": sum(1 for _, lines in once if lines <= 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="a checkout")
    parser.add_argument("--once", action="store_true", help="list private functions used once")
    arguments = parser.parse_args()
    package = arguments.folder / "clipft"
    for name, value in report(package).items():
        print(f"{name:<48}{value:>10,}")
    readme = arguments.folder / "README.md"
    print(f"{'words of the README':<48}{len(readme.read_text(encoding='utf-8').split()):>10,}")
    if arguments.once:
        sources = {p: p.read_text(encoding="utf-8") for p in sorted(package.rglob("*.py"))}
        for name, lines in used_once(sources, {p: ast.parse(s) for p, s in sources.items()}):
            print(f"{lines:>4}  {name}")


if __name__ == "__main__":
    main()
