"""Nothing that a config, a checkpoint or a data set holds is executed."""

import ast
from pathlib import Path

import mimkit.converters
import mimkit.recipes
import pytest

import mimkit

FILES = sorted(
    file for package in (mimkit, mimkit.recipes, mimkit.converters) for file in Path(package.__path__[0]).glob("*.py")
)
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dangers(code: str) -> list[str]:
    """Calls and imports by which a file that is read could run code, or write where it likes."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                found.append(name)
            if name.endswith((".extractall", ".extract")):
                found.append(name)
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(name)
            found += [word for word in ("allow_pickle", "trust_remote_code") if given.get(word, "False") != "False"]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_code_of_ours_executes_what_it_reads(file):
    assert dangers(file.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "yaml.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "tar.extractall(x)",
    ],
)
def test_the_search_for_dangers_finds_them(code):
    assert dangers(code)
