"""What a class or function accepts, read from its source: nothing is imported, so torch's seconds are not paid."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from otl.sources import (
    MAX_DEPTH,
    Module,
    NoSuchName,
    Unclear,
    attribute,
    bases,
    defined_names,
    find_module,
    lookup,
    resolve,
)


@dataclass(frozen=True)
class Type:
    """What a parameter takes; `any` where the annotation is missing or not a plain type."""

    kind: str  # any, none, bool, int, float, str, literal, list, dict
    choices: tuple[Any, ...] = ()  # of a literal
    items: tuple[tuple[Type, ...], ...] = ()  # of a list: one entry for every position, or one for all of them
    fixed: bool = False  # a list with exactly as many elements as `items`


ANY = (Type("any"),)


@dataclass(frozen=True)
class Parameter:
    """One named argument."""

    types: tuple[Type, ...]  # any one of these
    required: bool


@dataclass(frozen=True)
class Signature:
    """The named arguments, without self; `open` where **kwargs takes any other."""

    parameters: dict[str, Parameter]
    open: bool = False


class Unknown:
    """The value of an interpolation that only the run itself can resolve."""


@lru_cache
def signature(target: str) -> Signature:
    """The signature of a class, function or method by its dotted name.

    Raises:
        NoSuchName: there is no such package, module or name.
        Exception: whatever an import raised, where the sources alone do not tell.
    """
    try:
        module, rest = find_module(target)
        if not rest:
            raise NoSuchName(f"{target} is a module, not a class or function", defined_names(module))
        owner, node = lookup(module, rest[0])
        for name in rest[1:]:
            owner, node = attribute(owner, node, name)
        return _signature_of(owner, node, bound=len(rest) > 1)
    except Unclear:
        return _imported(target)


def _signature_of(module: Module, node: ast.AST, *, bound: bool, depth: int = 0) -> Signature:
    if isinstance(node, ast.FunctionDef):
        static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
        return _of_function(module, node, skip=1 if bound and not static else 0)
    if not isinstance(node, ast.ClassDef) or depth > MAX_DEPTH:
        raise Unclear(ast.dump(node)[:80])
    inits = [stmt for stmt in node.body if isinstance(stmt, ast.FunctionDef) and stmt.name == "__init__"]
    if inits:
        own = _of_function(module, inits[-1], skip=1)
        return _with_inherited(module, node, own, depth) if own.open else own
    if any(ast.unparse(d).split("(")[0].endswith("dataclass") for d in node.decorator_list):
        return Signature(_fields(module, node, depth))
    for owner, base in bases(module, node):
        return _signature_of(owner, base, bound=False, depth=depth + 1)
    return Signature({})


def _with_inherited(module: Module, node: ast.ClassDef, own: Signature, depth: int) -> Signature:
    """**kwargs are taken to go to the first base class, whose names are then accepted too."""
    for owner, base in bases(module, node):
        try:
            inherited = _signature_of(owner, base, bound=False, depth=depth + 1)
        except (Unclear, NoSuchName):
            break
        optional = {k: Parameter(p.types, False) for k, p in inherited.parameters.items()}
        return Signature(optional | own.parameters, inherited.open)
    return own


def _of_function(module: Module, node: ast.FunctionDef, *, skip: int) -> Signature:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(positional, defaults), *zip(args.kwonlyargs, args.kw_defaults)][skip:]
    parameters = {
        arg.arg: Parameter(_types(module, arg.annotation, default), default is None) for arg, default in pairs
    }
    return Signature(parameters, open=args.kwarg is not None)


def _fields(module: Module, node: ast.ClassDef, depth: int) -> dict[str, Parameter]:
    """The fields of a dataclass, those of its bases first."""
    found: dict[str, Parameter] = {}
    for owner, base in bases(module, node):
        found |= _fields(owner, base, depth + 1)
    for stmt in node.body:
        if isinstance(stmt, ast.AnnAssign) and isinstance(stmt.target, ast.Name):
            if "ClassVar" in ast.unparse(stmt.annotation):
                continue
            given = ast.unparse(stmt.value) if stmt.value else ""
            required = stmt.value is None or (given.startswith("field(") and "default" not in given)
            found[stmt.target.id] = Parameter(_types(module, stmt.annotation, None), required)
    return found


def _types(module: Module, annotation: ast.expr | None, default: ast.expr | None) -> tuple[Type, ...]:
    if annotation is None:
        return _types_of_default(default)
    types = _annotated(module, annotation, 0)
    if isinstance(default, ast.Constant) and default.value is None:
        types += (Type("none"),)
    return ANY if Type("any") in types else types


def _types_of_default(default: ast.expr | None) -> tuple[Type, ...]:
    """What an argument without an annotation takes, as far as its default says."""
    if isinstance(default, ast.Tuple):
        items = tuple(_types_of_default(item) for item in default.elts)
        return (Type("list", items=items, fixed=True),)
    if not isinstance(default, ast.Constant) or not isinstance(default.value, bool | int | float):
        return ANY
    return (Type("bool" if isinstance(default.value, bool) else "float"), Type("none"))


PLAIN = {"int": "int", "float": "float", "bool": "bool", "str": "str", "Path": "str", "PathLike": "str", "dict": "dict"}
LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple", "set", "frozenset"}
DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}


def _annotated(module: Module, node: ast.expr, depth: int) -> tuple[Type, ...]:
    """The plain types of an annotation; ANY for what is not plain."""
    if depth > MAX_DEPTH:
        return ANY
    if isinstance(node, ast.Constant):
        if node.value is None:
            return (Type("none"),)
        if isinstance(node.value, str):
            return _annotated(module, ast.parse(node.value, mode="eval").body, depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _annotated(module, node.left, depth + 1) + _annotated(module, node.right, depth + 1)
    if isinstance(node, ast.Subscript):
        return _subscripted(module, node, depth)
    name = ast.unparse(node).split(".")[-1]
    if name in PLAIN:
        return (Type(PLAIN[name]),)
    if name in LISTS:
        return (Type("list"),)
    if name in DICTS:
        return (Type("dict"),)
    try:
        owner, found = resolve(module, ast.unparse(node).split("."))
    except LookupError:
        return ANY
    return _annotated(owner, found, depth + 1) if isinstance(found, ast.expr) else ANY


def _subscripted(module: Module, node: ast.Subscript, depth: int) -> tuple[Type, ...]:
    name = ast.unparse(node.value).split(".")[-1]
    inside = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return (Type("literal", choices=tuple(item.value for item in inside if isinstance(item, ast.Constant))),)
    if name == "Optional":
        return (*_annotated(module, inside[0], depth + 1), Type("none"))
    if name == "Union":
        return tuple(t for item in inside for t in _annotated(module, item, depth + 1))
    if name == "Annotated":
        return _annotated(module, inside[0], depth + 1)
    if name in DICTS:
        return (Type("dict"),)
    if name in LISTS:
        ends_open = isinstance(inside[-1], ast.Constant) and inside[-1].value is ...
        items = tuple(_annotated(module, item, depth + 1) for item in inside[: len(inside) - ends_open])
        return (Type("list", items=items, fixed=name in {"tuple", "Tuple"} and not ends_open),)
    return ANY


def unclear(value: Any) -> bool:
    """Whether some of a value is known only once the run has a folder."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is Unknown or any(map(unclear, inner))


def fits(value: Any, one: Type) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match one.kind:
        case "any":
            return True
        case "none":
            return value is None
        case "bool":
            return isinstance(value, bool)
        case "int":
            return is_number and isinstance(value, int)
        case "float":
            return is_number
        case "str":
            return isinstance(value, str)
        case "dict":
            return isinstance(value, dict)
        case "literal":
            return any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in one.choices
            )
    return isinstance(value, list) and _fits_list(value, one)


def _fits_list(values: list[Any], one: Type) -> bool:
    if one.fixed and len(values) != len(one.items):
        return False
    items = one.items if one.fixed else one.items * len(values)
    return not items or all(v is Unknown or any(fits(v, t) for t in types) for v, types in zip(values, items))


def describe(types: tuple[Type, ...]) -> str:
    """The accepted types in words."""
    words = {"none": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
    words |= {"dict": "a mapping", "list": "a list"}
    parts: list[str] = []
    for one in types:
        if one.kind == "literal":
            parts += [str(choice) for choice in one.choices]
        elif one.fixed:
            parts.append(f"a list of {len(one.items)}")
        else:
            parts.append(words[one.kind])
    *others, last = dict.fromkeys(parts)
    return f"{', '.join(others)} or {last}" if others else last


def _imported(target: str) -> Signature:
    """The signature by importing, where the sources do not tell."""
    parts = target.split(".")
    found: Any = import_module(parts[0])
    for index, part in enumerate(parts[1:], 1):
        if not hasattr(found, part):
            import_module(".".join(parts[: index + 1]))
        found = getattr(found, part)
    parameters, is_open = {}, False
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            parameters[parameter.name] = Parameter(ANY, parameter.default is parameter.empty)
    return Signature(parameters, is_open)
