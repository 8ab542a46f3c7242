"""Python sources read as trees, names followed through re-exports and base classes; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

MAX_DEPTH = 20  # re-exports, base classes and aliases followed before giving up


class NoSuchName(LookupError):
    """The dotted name certainly does not exist."""

    def __init__(self, message: str, known: list[str]) -> None:
        super().__init__(message)
        self.known = known  # names that exist in its place


class Unclear(LookupError):
    """The sources do not say: only an import can."""


@dataclass(frozen=True)
class Module:
    """A parsed source file."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def find_module(dotted: str) -> tuple[Module, list[str]]:
    """The longest part of a dotted name that is a source file, and the names left over."""
    top, *parts = dotted.split(".")
    spec = find_spec(top) if top.isidentifier() else None
    if spec is None:
        raise NoSuchName(f"there is no package {top!r}", [])
    if not spec.submodule_search_locations:
        return _parse(top, Path(str(spec.origin))), parts
    folder = Path(next(iter(spec.submodule_search_locations)))
    name = top
    while parts and (folder / parts[0]).is_dir() and not (folder / f"{parts[0]}.py").is_file():
        folder = folder / parts[0]
        name = f"{name}.{parts.pop(0)}"
    if parts and (folder / f"{parts[0]}.py").is_file():
        return _parse(f"{name}.{parts[0]}", folder / f"{parts[0]}.py"), parts[1:]
    if not (folder / "__init__.py").is_file():
        known = sorted(path.stem for path in folder.glob("*.py"))
        raise NoSuchName(f"there is no module {name}.{parts[0] if parts else ''}", known)
    return _parse(name, folder / "__init__.py"), parts


@lru_cache
def _parse(name: str, path: Path) -> Module:
    if path.suffix != ".py":
        raise Unclear(name)
    try:
        return Module(name, path, ast.parse(path.read_bytes()))
    except SyntaxError as error:
        raise Unclear(name) from error


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those inside `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _statements(node.body + node.orelse + [s for h in node.handlers for s in h.body])


def defined_names(module: Module) -> list[str]:
    """The classes, functions and submodules that a module has, for suggestions."""
    index = _index(module)
    beside = [path.stem for path in module.path.parent.glob("*.py")] if module.path.name == "__init__.py" else []
    return sorted({*index.defined, *index.imported, *beside} - {"__init__", "__all__"})


@dataclass(frozen=True)
class _Index:
    """What the top level of a module binds."""

    defined: dict[str, ast.AST]  # classes, functions and assigned expressions
    imported: dict[str, tuple[str, str]]  # name -> the module it comes from and its name there
    stars: tuple[str, ...]  # modules whose names are all taken over
    dynamic: bool  # has a __getattr__ of its own


@lru_cache
def _index(module: Module) -> _Index:
    defined: dict[str, ast.AST] = {}
    imported: dict[str, tuple[str, str]] = {}
    stars = []
    for node in _statements(module.tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined.update((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            defined[node.target.id] = node.value
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, node)
            for alias in node.names:
                if alias.name == "*":
                    stars.append(source)
                else:
                    imported[alias.asname or alias.name] = (source, alias.name)
    return _Index(defined, imported, tuple(reversed(stars)), "__getattr__" in defined)


def lookup(module: Module, name: str, tried: set[tuple[str, str]] | None = None) -> tuple[Module, ast.AST]:
    """Where a module's name is defined: its class, function or assigned expression.

    Args:
        module: where to begin.
        name: without dots.
        tried: (module, name) pairs that this search has been at already; star imports go in circles.

    Raises:
        NoSuchName: the sources show that there is none.
        Unclear: they do not tell.
    """
    tried = set() if tried is None else tried
    if (module.name, name) in tried:
        raise NoSuchName(f"{module.name} has no {name}", [])
    tried.add((module.name, name))
    index = _index(module)
    if name in index.defined:
        return module, index.defined[name]
    if name in index.imported:
        return _imported_name(*index.imported[name], tried)
    for source in index.stars:
        try:
            return _imported_name(source, name, tried)
        except NoSuchName:
            continue
    if index.dynamic:
        raise Unclear(name)
    raise NoSuchName(f"{module.name} has no {name}", defined_names(module))


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of the module that a `from` statement reads."""
    if not node.level:
        return node.module or ""
    parts = module.package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join(base + ([node.module] if node.module else []))


def _imported_name(source: str, name: str, tried: set[tuple[str, str]]) -> tuple[Module, ast.AST]:
    module, rest = find_module(f"{source}.{name}")
    if rest != [name]:
        raise Unclear(f"{source}.{name}")  # a module itself, or a name made at run time
    return lookup(module, name, tried)


def attribute(module: Module, node: ast.AST, name: str, depth: int = 0) -> tuple[Module, ast.AST]:
    """A method of a class or of its bases."""
    if not isinstance(node, ast.ClassDef) or depth > MAX_DEPTH:
        raise Unclear(name)
    methods = [stmt for stmt in node.body if isinstance(stmt, ast.FunctionDef) and stmt.name == name]
    if methods:
        return module, methods[-1]
    for owner, base in bases(module, node):
        try:
            return attribute(owner, base, name, depth + 1)
        except NoSuchName:
            continue
    raise NoSuchName(f"{node.name} has no {name}", [s.name for s in node.body if isinstance(s, ast.FunctionDef)])


def bases(module: Module, node: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
    """The classes that a class inherits from, `object` and Generic left out."""
    for base in node.bases:
        if isinstance(base, ast.Subscript):
            base = base.value
        names = ast.unparse(base).split(".")
        if names[-1] in {"object", "Generic", "Protocol", "ABC"}:
            continue
        owner, found = resolve(module, names)
        if not isinstance(found, ast.ClassDef):
            raise Unclear(ast.unparse(base))
        yield owner, found


def resolve(module: Module, names: list[str]) -> tuple[Module, ast.AST]:
    """A possibly dotted name as code inside `module` sees it."""
    if len(names) == 1:
        return lookup(module, names[0])
    for node in _statements(module.tree.body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name.partition(".")[0]) == names[0]:
                    start = alias.name if alias.asname else names[0]
                    owner, rest = find_module(".".join([start] + names[1:]))
                    if len(rest) == 1:
                        return lookup(owner, rest[0])
    raise Unclear(".".join(names))
