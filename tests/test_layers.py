"""The subpackages of clipft ("rooms") form layers ("floors"), and import only from lower ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipft

PACKAGE = Path(clipft.__file__).parent
FLOORS = (
    {"cli"},
    {"tune"},
    {"api"},
    {"browse"},
    {"search", "ablation", "doctor"},
    {"report"},
    {"training"},
    {"evaluation", "export"},
    {"runs"},
    {"embedding"},
    {"distributed"},
    {"data", "storage", "models"},
    {"metrics"},
    {"config"},
    {"core"},
)
"""The floors from the top down. A room imports only from floors below its own. The rule does not
apply to the package's ``__init__`` (the version, the lazy public names) and ``__main__``."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MOST_MODULES = 12


def imported_rooms(path: Path) -> Iterator[str]:
    """Yield the subpackages of ``clipft`` that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        yield from (m.split(".")[1] for m in modules if m.startswith("clipft."))


def modules_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def upward_imports(room: str, path: Path) -> set[str]:
    return {r for r in imported_rooms(path) if r != room and FLOOR[r] <= FLOOR[room]}


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_imports_only_from_the_floors_below(room):
    for path in modules_of(room):
        upward = upward_imports(room, path)
        assert not upward, f"{path.relative_to(PACKAGE)} imports {sorted(upward)} from above"


def test_an_upward_import_is_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def work():\n    from clipft.cli.console import Output\n")
    assert upward_imports("training", module) == {"cli"}
    module.write_text("from clipft.models.pretrained import load_pretrained\n")
    assert upward_imports("storage", module) == {"models"}, "neighbours do not know each other"


def test_every_room_stands_on_a_floor():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set(FLOOR)


@pytest.mark.parametrize("folder", sorted({p.parent for p in PACKAGE.rglob("*.py")}), ids=str)
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    modules = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES
    purpose = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert purpose, "each folder says in its __init__ what it is for"


def test_only_the_terminal_knows_typer():
    users = [p for p in PACKAGE.rglob("*.py") if "import typer" in p.read_text(encoding="utf-8")]
    assert {p.relative_to(PACKAGE).parts[0] for p in users} == {"cli"}
