"""Who may import whom: data flows one way through the house."""

import ast
from pathlib import Path

import pytest

import clipft

PACKAGE = Path(clipft.__file__).parent
GROUND = {
    "settings",
    "settings_sources",
    "settings_text",
    "section",
    "files",
    "machine",
    "errors",
    "scenarios",
    "records",
    "cache",
    "s3_url",
    "words",
    "__init__",
}
ALLOWED = {
    "storage": GROUND,
    "data": GROUND | {"drawing"},
    "modelling": GROUND | {"drawing"},
    "evaluation": GROUND,
    "reporting": GROUND,
    "training": GROUND | {"data", "modelling", "evaluation"},
    "doctor": GROUND | {"storage", "data", "modelling", "training"},
    "cli": None,
}


def imported(path: Path) -> set[str]:
    """Names right under ``clipft`` that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        names |= {m.split(".")[1] for m in modules if m.startswith("clipft.")}
    return names


@pytest.mark.parametrize("service", sorted(ALLOWED))
def test_a_service_imports_only_what_stands_below_it(service):
    allowed = ALLOWED[service]
    for path in (PACKAGE / service).rglob("*.py"):
        reached = imported(path) - {service}
        assert allowed is None or reached <= allowed, f"{path.name} imports {reached - allowed}"


def test_the_public_functions_stand_below_the_face():
    for name in ("api.py", "report_files.py"):
        assert "cli" not in imported(PACKAGE / name)


def test_only_the_face_knows_typer():
    users = {p for p in PACKAGE.rglob("*.py") if "import typer" in p.read_text(encoding="utf-8")}
    assert {p.parent.name for p in users} == {"cli"}
