"""The code that a case's result depends on, and its version: a hash of the syntax trees.

A case that calls a user's function may do anything, so all code of this package counts for it except drawing. For other
cases, the modules of the attack and the defence with all their imports count, and so do loading, training, measuring and the
user's file. Comments, docstrings, descriptions of settings, formatting, the command line, reports, drawing, and other attacks and defences do not
count, nor do the versions of torch and Python, which are in the record.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from dhbe.bench.cases import Case
from dhbe.errors import Refused

PACKAGE = Path(__file__).resolve().parents[1]
ALWAYS = ("training", "evaluation.measuring", "networks", "data", "suspects", "api.machine")
"""Modules that every case uses; they count with all their imports."""
ALONE = ("bench.working", "api.running", "api.erasing", "api.attacking", "api.searching", "api.halving")
"""Modules that import all attacks and defences; they count without their imports."""
PRESETS = {"fast": "fast", "paper": "dhbe", "official": "dhbe"}


def version(case: Case) -> str:
    """The version of the code that a case's result depends on, 12 hexadecimal digits.

    Raises:
        Refused: The user's file cannot be read as Python.
    """
    digest = hashlib.sha256()
    for path in sorted(files(case), key=str):
        digest.update(_meaning(path))
    return digest.hexdigest()[:12]


def joined(versions: Iterable[str]) -> str:
    """Combines several versions into one."""
    return hashlib.sha256(" ".join(versions).encode()).hexdigest()[:12]


def files(case: Case) -> set[Path]:
    """The source files that a case's result depends on, without those of its victim."""
    starts = [_file(name) for name in ALWAYS]
    if case.work == "plant":
        starts.append(PACKAGE / "attacks" / f"{case.settings['attack'].replace('-', '_')}.py")
    elif case.work == "erase":
        name = case.settings["defense"]
        room = PACKAGE / "defenses"
        starts.append(
            room / f"{PRESETS[name]}.py" if name in PRESETS else room / "peers" / f"{name.replace('-', '_')}.py"
        )
    elif case.work == "scan":
        starts.append(_file("search.scan"))
    elif case.work == "call":
        starts += [
            path
            for path in PACKAGE.rglob("*.py")
            if path.relative_to(PACKAGE).parts[0] not in ("bench", "cli", "report")
        ]
    if case.settings.get("file"):
        starts.append(Path(case.settings["file"]))
    if case.settings.get("without"):
        starts.append(_file("bench.parts"))
    found = {_file(name) for name in ALONE}
    queue = [path for path in starts if path.exists() or path == Path(case.settings.get("file") or "")]
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += _imported(path)
    return found


@cache
def _file(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        raise Refused(f"cannot read {path} as Python: {error}") from error


@cache
def _meaning(path: Path) -> bytes:
    """The syntax tree of a file as bytes, without docstrings and descriptions of settings."""
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _told(part)] or [ast.Pass()]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Setting":
            node.args = node.args[1:]  # what --help says
    return ast.dump(tree).encode()


def _told(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _imported(path: Path) -> list[Path]:
    """Files of this package that a file imports, except `__init__` files that only list attacks or defences."""
    names = list(_names(path))
    found = [_file(name) for name in names if "/" not in name]
    if PACKAGE not in path.parents:  # the user's; what lies beside it counts too
        found += [Path(f"{name}.py") for name in names if "/" in name]
    lists = {PACKAGE / room / "__init__.py" for room in ("", "attacks", "defenses", "defenses/peers", "api", "bench")}
    return [each for each in found if each.exists() and each not in lists]


def _names(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dhbe":
            module = node.module.removeprefix("dhbe").lstrip(".")
            yield module or "__init__"
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ("/".join([*node.module.split("."), alias.name]) for alias in node.names)
            yield node.module.replace(".", "/")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("dhbe.") for alias in node.names if alias.name.startswith("dhbe."))
