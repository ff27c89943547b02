"""The walls of the house: who may import whom, what is public, what starts fast, what a file may weigh."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import finetune
from finetune.config.recipe import recipe_keys

ROOT = Path(finetune.__file__).parent
ROOMS = [
    "errors",
    "saying",
    "compute",
    "process",
    "config",
    "metrics",
    "runs",
    "planning",
    "data",
    "tracking",
    "models",
    "features",
    "training",
    "inference",
    "model_selection",
    "ensembles",
    "evaluation",
    "reporting",
    "export",
    "run",
    "handing_in",
    "preparing",
    "pipeline",
    "ensembling",
    "demo",
    "cli",
    "__init__",
    "__main__",
]  # from the ground up; a room imports itself and what stands before it
FILES = sorted(ROOT.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_files_are_found():
    assert len(FILES) > 30
    assert {_room(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_look_down_only(path):
    allowed = ROOMS[: ROOMS.index(_room(path)) + 1]
    for name in _imports(path):
        if name.startswith("finetune."):
            assert name.split(".")[1] in [*allowed, "__version__"], f"{path} imports {name}"


def test_tests_import_no_tests():
    """What several of them need stands beside them, in files that hold no test."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    assert len(files) > 50
    for path in files:
        assert not [name for name in _imports(path) if name.startswith("test_")], path
        if not path.name.startswith("test_"):
            tree = ast.parse(path.read_text())
            assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")], (
                path
            )


def test_no_circle_of_files():
    """Imports inside functions count: they only hide a circle."""
    names = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in FILES}
    below = {name: _imports(path) & names.keys() - {name} for name, path in names.items()}
    while free := [name for name, needed in below.items() if not needed]:
        below = {name: needed.difference(free) for name, needed in below.items() if name not in free}
    assert not below, sorted(below)


def test_training_and_judging_need_no_features():
    """What they need of the images is the data set, and of the probe its weights and answers."""
    for path in FILES:
        if _room(path) in ("training", "inference", "ensembles", "evaluation", "reporting", "export"):
            assert not [name for name in _imports(path) if name.startswith("finetune.features")], path


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("pytorch_lightning", {"training"}),
        ("albumentations", {"data"}),
        ("mlflow", {"tracking"}),
        ("typer", {"cli"}),
        ("jinja2", {"reporting"}),
        ("pyarrow", {"data"}),
    ],
)
def test_a_library_is_imported_in_one_room_only(library, homes):
    rooms = {_room(path) for path in FILES if any(name.split(".")[0] == library for name in _imports(path))}
    assert rooms == homes


def test_every_dependency_is_imported_and_every_import_is_declared():
    """A library for a trifle is none of ours, and one that only comes with another is named beside it."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    declared = {
        re.split(r"[<>=]", line)[0] for line in project["dependencies"] + project["optional-dependencies"]["heic"]
    }
    comes_with = {
        "cv2": "albumentations",
        "markupsafe": "jinja2",
        "requests": "mlflow",
        "sqlalchemy": "mlflow",
        "alembic": "mlflow",
    }
    named = {"yaml": "pyyaml", "PIL": "pillow"}
    imported = {name.partition(".")[0] for path in FILES for name in _imports(path)} - sys.stdlib_module_names
    imported = {named.get(name, name.replace("_", "-")) for name in imported - {"finetune"}}
    assert {comes_with.get(name, name) for name in imported} == declared


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 80, f"{node.name} is too long"


LOOSE = re.compile(r"\b(dict|Mapping|MutableMapping)\[str, (Any|object)\]")
LOOSE_BY_RIGHT = {
    "finetune.models.backbones.Backbone.network": "options of an architecture are timm's: any name, any value",
    "finetune.config.reading.read_mapping": "a YAML file before it is checked",
    "finetune.config.decided.shared_by_stages": "a section of a plan before it is checked",
    "finetune.compute.Compute.describe": "environment.json tells people what a machine said of itself",
}


def _signatures(path: Path):
    """Name of each function, and of the class of a method, with the types it takes and gives."""
    for owner in [tree := ast.parse(path.read_text()), *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef):
                taken = node.args
                arguments = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg]
                types = [one.annotation for one in arguments if one and one.annotation]
                types += [node.returns] if node.returns else []
                yield getattr(owner, "name", node.name), node.name, [ast.unparse(one) for one in types]


def _names_used_elsewhere() -> set[str]:
    """What any folder imports of another, and what users do."""
    used = {f"{home}.{name}" for name, home in finetune._HOMES.items()}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            home = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if home.startswith("finetune.") and home.split(".")[1] != _room(path):
                used |= {f"{home}.{name.name}" for name in node.names}
    return used


def test_what_goes_from_folder_to_folder_has_a_type():
    """A dictionary of anything hides keys that nobody writes and keys that nobody reads."""
    used, found = _names_used_elsewhere(), set()
    for path in FILES:
        home = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        for owner, name, types in _signatures(path):
            if f"{home}.{owner}" in used and not name.startswith("_") and any(map(LOOSE.search, types)):
                found.add(f"{home}.{name}" if owner == name else f"{home}.{owner}.{name}")
    assert len(used) > 200
    assert found == LOOSE_BY_RIGHT.keys()


def test_no_exception_is_swallowed():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: a bare except"
                if isinstance(node.type, ast.Name) and node.type.id == "Exception":
                    assert path.parent.name == "cli", f"{path}:{node.lineno}"


@pytest.mark.parametrize("words", ["--help", "recipes list", "zoo list", "recipes check"])
def test_the_words_floor_starts_without_torch(words):
    code = (
        "import sys; sys.argv = ['finetune', *sys.argv[1:]]\n"
        "from finetune.cli import main\n"
        "try: main()\n"
        "except SystemExit as leave: assert not leave.code, leave.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'mlflow', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_import_is_lazy():
    code = "import sys, finetune; assert not {'torch', 'yaml', 'pydantic', 'typer'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_frozen():
    assert sorted(finetune.__all__) == [
        "Network",
        "Plan",
        "Recipe",
        "Run",
        "compare",
        "ensemble",
        "evaluate",
        "load_recipe",
        "load_run",
        "make_plan",
        "open_dataset",
        "plan",
        "predict",
        "report",
        "resume",
        "survey",
        "train",
        "zoo",
    ]
    assert all(getattr(finetune, name) is not None for name in finetune.__all__)


def test_verbs_are_frozen():
    from finetune.cli import app
    from finetune.cli.catalogue import recipes_app, zoo_app

    def verbs(group):
        return {command.name or command.callback.__name__ for command in group.registered_commands}

    assert verbs(app) == {
        "demo",
        "train",
        "plan",
        "resume",
        "evaluate",
        "predict",
        "compare",
        "ensemble",
        "export",
        "report",
        "ui",
    }
    assert verbs(recipes_app) == {"list", "show", "copy", "check"}
    assert verbs(zoo_app) == {"list", "show", "add", "verify", "rank"}


def test_recipe_keys_are_frozen():
    assert recipe_keys() == (Path(__file__).parent / "golden" / "recipe_keys.txt").read_text().split()


def test_no_page_promises_a_figure_that_is_not_there():
    for page in [ROOT.parent / "README.md", *(ROOT.parent / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        assert "ot measured on this version" not in text, page
        assert not re.findall(r"<!-- (\S+) -->\n\s*<!-- /\1 -->", text), page  # a table's place, and no table
