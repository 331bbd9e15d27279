"""The structure of the package: which room may import which (docs: CONTRIBUTING.md)."""

import ast
import subprocess
import sys

from conftest import ROOT

ROOMS = {  # a room, and what it may import beside itself and the corridor
    "io": "",
    "data": "",
    "models": "io",
    "methods": "models io data",
    "conversion": "models io",
    "evaluation": "models io data",
    "training": "methods models io data evaluation",
    "tasks": "io data models methods conversion evaluation training doctor",
    "doctor": "io data models methods conversion evaluation training",
}
CORRIDOR = {"units", "errors", "config", "files", "flops", "figures", "sample", "cli", "__init__"}


def imports_of(file):
    """The modules of mimkit that a file imports, also inside functions, but not for type checkers alone."""
    found = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] == "mimkit"}


def room_of(module):
    return [*module.split("."), "__init__"][1]


FILES = sorted((ROOT / "mimkit").rglob("*.py"))


def refused(file):
    """Imports of a file that the matrix does not allow."""
    room = file.relative_to(ROOT / "mimkit").with_suffix("").parts[0]
    allowed = {room, *ROOMS[room].split(), *CORRIDOR} if room in ROOMS else set(CORRIDOR)
    found = imports_of(file) - {"mimkit"}
    if file.name == "family.py":  # discovers the families in this package, and names none
        found -= {"mimkit.converters"}
    return sorted(name for name in found if room_of(name) not in allowed)


def test_each_room_imports_what_it_may():
    """`cli.py` may import all rooms, and `__init__.py` registers the networks."""
    odd = {str(f.relative_to(ROOT)): refused(f) for f in FILES if f.stem != "cli" and f.parent.name != "mimkit"}
    corridor = [f for f in FILES if f.parent.name == "mimkit" and f.stem not in ("cli", "__init__")]
    odd |= {f.name: refused(f) for f in corridor}
    assert not {file: names for file, names in odd.items() if names}


def test_the_matrix_refuses(tmp_path, monkeypatch):
    """Negative control: an import that crosses the matrix is found, also inside a function."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "mimkit" / "models" / "odd.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from mimkit.tasks import detection\n")
    assert refused(file) == ["mimkit.tasks", "mimkit.tasks.detection"]


def test_converters_are_discovered_and_import_the_conversion_room():
    assert not [
        f for f in FILES if any("mimkit.converters." in f"{name}." for name in imports_of(f) - {"mimkit.converters"})
    ]
    users = [f.relative_to(ROOT / "mimkit").as_posix() for f in FILES if "mimkit.converters" in imports_of(f)]
    assert users in ([], ["conversion/family.py"])  # it lists the package, and names no family
    for file in sorted((ROOT / "converters").glob("*.py")):
        rooms = {room_of(name) for name in imports_of(file) if name != "mimkit"}
        assert rooms <= {"conversion", "converters", "errors", "io", "models"}, file.name


def test_no_module_is_part_of_a_circle():
    """Imports at the top of modules, those for type checkers aside, form no circle."""
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    tops = {}
    for name, file in names.items():
        body = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        targets = {f"{n.module}.{a.name}" for n in body if isinstance(n, ast.ImportFrom) for a in n.names}
        targets |= {n.module for n in body if isinstance(n, ast.ImportFrom)}
        tops[name] = {t for t in targets if t in names and t != name}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in sorted(tops[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(tops):
        visit(name, [])


def test_each_top_level_folder_of_the_package_is_a_room():
    folders = {f.name for f in (ROOT / "mimkit").iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == {*ROOMS, "sample"}
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['tool']['setuptools']['packages'])",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    packages = {".".join(f.parent.relative_to(ROOT).parts) for f in FILES if f.name == "__init__.py"}
    assert packages == {*listed} - {"mimkit.recipes", "mimkit.converters"}
