"""Nothing in the package is reached by tests alone: a walk over its source from the verbs and the public names.

A name leads to what it was imported as, an attribute of a file to what it is there; any other attribute, of which the
source does not tell whose it is, to every method of that name. So what is called unreached surely is, and a few methods
may be called reached that are not.
What a coming diagnosis will call stays, and the head of its file says so, in the words of `HEAD`.
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import finetune

ROOT = Path(finetune.__file__).parent
HEAD = re.compile(r"For diagnosis, and called by nothing else yet: ((?:`\w+`(?:, )?)+)\.")
ORDINARY = {"property", "cached_property", "classmethod", "staticmethod", "contextmanager", "cache"}
"""Decorators that leave it to our own code to call a method."""

PROMISES = {"finetune.runs.folder:FILES"}
"""Lists for readers, to which tests hold what is done."""


@dataclass
class Piece:
    """A function, method or constant, a class without its methods, or (without a name) what else an import runs."""

    place: str
    """`module:name`."""
    lines: int = 0
    names: set[str] = field(default_factory=set)
    attributes: set[tuple[str, str]] = field(default_factory=set)
    """(name it is asked of, if that is one; attribute)."""
    comes_with: str = ""
    """The class whose users call this method, though no source of ours does: a library does."""

    @property
    def name(self) -> str:
        return self.place.partition(":")[2]

    def note(self, node: ast.AST) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                self.names.add(part.id)
            elif isinstance(part, ast.Attribute):
                self.attributes.add((part.value.id if isinstance(part.value, ast.Name) else "", part.attr))


@dataclass
class Module:
    """A file: its pieces, and what names stand for that it imports from us, as `module:name`."""

    pieces: dict[str, Piece]
    imported: dict[str, str]


def read(module: str, text: str) -> Module:
    """The pieces of a file."""
    tree, pieces = ast.parse(text), [Piece(f"{module}:")]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    imported = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in imports
        if node.module.startswith("finetune")
        for alias in node.names
    }
    ours = {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | set(imported)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            pieces.append(Piece(f"{module}:{node.name}", _num_lines(node)))
        elif isinstance(node, ast.ClassDef):
            pieces += _methods(module, node, ours)
            node.body = [part for part in node.body if not isinstance(part, ast.FunctionDef)]
            pieces.append(Piece(f"{module}:{node.name}", _num_lines(node)))
        elif (name := _constant(node)) is not None:
            pieces.append(Piece(f"{module}:{name}", _num_lines(node)))
        else:
            pieces[0].note(node)
            continue
        pieces[-1].note(node)
    return Module({piece.name: piece for piece in pieces}, imported)


def _methods(module: str, node: ast.ClassDef, ours: set[str]) -> list[Piece]:
    is_of_a_library = any(not (isinstance(base, ast.Name) and base.id in ours) for base in node.bases)
    found = []
    for method in node.body:
        if isinstance(method, ast.FunctionDef):
            piece = Piece(f"{module}:{node.name}.{method.name}", _num_lines(method))
            piece.note(method)
            decorators = {ast.unparse(one).partition("(")[0] for one in method.decorator_list} - ORDINARY
            if method.name.startswith("__") or decorators or is_of_a_library:
                piece.comes_with = node.name
            found.append(piece)
    return found


def _constant(node: ast.stmt) -> str | None:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _class_of(piece: Piece) -> str:
    """The place of a method's class; of anything else nothing."""
    return piece.place.rpartition(".")[0] if "." in piece.name else ""


def _num_lines(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


def walk(modules: dict[str, Module], starts: set[str], words: set[str]) -> set[str]:
    """All places that `starts` (places) and `words` (attributes, such as those of templates) lead to."""
    of_name: dict[str, list[str]] = {}
    for module in modules.values():
        for piece in module.pieces.values():
            of_name.setdefault(piece.name.rpartition(".")[2], []).append(piece.place)
    seen, waiting = set(), [*starts, *(place for word in words for place in of_name.get(word, ()))]
    while waiting:
        if (place := waiting.pop()) in seen:
            continue
        seen.add(place)
        name_of_module, _, name = place.partition(":")
        module = modules.get(name_of_module, Module({}, {}))
        if name not in module.pieces:
            waiting += [module.imported[name]] if name in module.imported else []
            continue
        piece = module.pieces[name]
        waiting.append(f"{name_of_module}:")
        waiting += [module.imported.get(used, f"{name_of_module}:{used}") for used in piece.names]
        for owner, used in piece.attributes:
            file = module.imported.get(owner, "").replace(":", ".")
            waiting += (
                [f"{file}:{used}"] if file in modules else [p for p in of_name.get(used, ()) if p.endswith(f".{used}")]
            )
        waiting += [other.place for other in module.pieces.values() if name and other.comes_with == name]
    return seen


@pytest.fixture(scope="module")
def modules():
    def name(path):
        return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")

    return {name(path): read(name(path), path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


@pytest.fixture(scope="module")
def for_diagnosis():
    """Names that heads of files keep for the diagnosis, as places."""
    found = set()
    for path in ROOT.rglob("*.py"):
        head = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        found |= {f"{module}:{name}" for told in HEAD.findall(head) for name in re.findall(r"\w+", told)}
    return found


@pytest.fixture(scope="module")
def starts(modules):
    """The verbs, whose functions a decorator hands to typer, and what the package is asked for."""
    doors = [name for name in modules if re.fullmatch(r"finetune(\.cli.*|\.__main__)?", name)]
    return {piece.place for name in doors for piece in modules[name].pieces.values()}


@pytest.fixture(scope="module")
def words():
    """The public names, and whatever a template may ask for."""
    templates = "".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.j2"))
    return {*re.findall(r"\w+", templates), *finetune.__all__}


def test_nothing_is_reached_by_tests_alone(modules, starts, words, for_diagnosis):
    pieces = [piece for module in modules.values() for piece in module.pieces.values() if piece.name]
    methods = {piece.place for piece in pieces if _class_of(piece) in for_diagnosis}
    found = walk(modules, starts | for_diagnosis | methods | PROMISES, words)
    assert len(pieces) > 1000
    unreached = [f"{piece.place} ({piece.lines} lines)" for piece in pieces if piece.place not in found]
    assert not unreached, "call it, keep it for the diagnosis in the head of its file, or delete it"


def test_what_is_kept_for_the_diagnosis_is_there_and_called_by_nothing_else(modules, starts, words, for_diagnosis):
    assert len(for_diagnosis) > 5
    assert all(name.partition(":")[2] in modules[name.partition(":")[0]].pieces for name in for_diagnosis)
    assert not for_diagnosis & walk(modules, starts, words), "the head of its file need not name it any more"


SOURCE = """
from finetune.other import helper as own
import torch

LIMIT = limit()

def limit(): return 1
def called(): return own().told.asked + LIMIT
def lonely(): return called()

class Used(torch.nn.Module):
    def forward(self): return inner()
    def told(self): return 1

class Plain:
    def __init__(self): pass
    def asked(self): return 1
    @property
    def forgotten(self): return 1

def inner(): return Plain()
def told(): return 1
"""


def test_the_walk_follows_calls_imports_attributes_and_methods_that_a_library_calls():
    modules = {"one": read("one", SOURCE), "finetune.other": read("finetune.other", "def helper(): 1")}
    found = walk(modules, {"one:called"}, set())
    assert found >= {
        "one:called",
        "finetune.other:helper",
        "one:Used.told",
        "one:Plain.asked",
        "one:LIMIT",
        "one:limit",
    }
    assert not found & {"one:lonely", "one:inner", "one:told", "one:Plain"}
    found = walk(modules, {"one:Used"}, set())
    assert found >= {"one:Used.forward", "one:inner", "one:Plain.__init__"}
    assert not found & {"one:Plain.forgotten", "one:LIMIT"}
