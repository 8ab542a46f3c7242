"""What a class says of itself in constants, read from its source: nothing is imported."""

from __future__ import annotations

import ast
from typing import Any

from otl.sources import MAX_DEPTH, Module, NoSuchName, Unclear, attribute, bases, find_module, lookup


def declared(target: str, name: str) -> Any:
    """The value of a class attribute, the class's own or inherited, that is written out in constants.

    Args:
        target: dotted name of the class.
        name: of the attribute.

    Raises:
        Unclear: the sources do not tell it: it is computed, or not there.
    """
    try:
        owner, expression = _attribute(*_class(target), name)
        return _value(owner, expression, {}, 0)
    except NoSuchName as error:
        raise Unclear(f"{target}.{name}") from error


def written_in(target: str, method: str) -> str:
    """The module in whose source a class's method stands: its own, or that of the first base that has it.

    Raises:
        Unclear: the sources do not tell.
    """
    try:
        return attribute(*_class(target), method)[0].name
    except NoSuchName as error:
        raise Unclear(f"{target}.{method}") from error


def descends(target: str, ancestor: str) -> bool:
    """Whether a class is another one or inherits from it, both by their dotted names; False where the sources end."""
    try:
        return _descends(*_class(target), ancestor)
    except (NoSuchName, Unclear):
        return False


def _class(target: str) -> tuple[Module, ast.ClassDef]:
    module, rest = find_module(target)
    if len(rest) != 1:
        raise Unclear(target)
    owner, node = lookup(module, rest[0])
    if not isinstance(node, ast.ClassDef):
        raise Unclear(target)
    return owner, node


def _descends(module: Module, node: ast.ClassDef, ancestor: str) -> bool:
    own = f"{module.name}.{node.name}" == ancestor
    return own or any(_descends(owner, base, ancestor) for owner, base in bases(module, node))


def _attribute(module: Module, node: ast.ClassDef, name: str) -> tuple[Module, ast.expr]:
    """The expression that a class, or the first base that does, gives an attribute."""
    for stmt in node.body:
        match stmt:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                return module, value
            case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if found == name:
                return module, value
            case ast.FunctionDef(name=found) if found == name:
                raise Unclear(name)
    for owner, base in bases(module, node):
        try:
            return _attribute(owner, base, name)
        except NoSuchName:
            continue
    raise NoSuchName(f"{node.name} has no {name}", [])


def _value(module: Module, node: ast.AST, local: dict[str, Any], depth: int) -> Any:
    """What an expression comes to: texts, numbers, lists and dicts of them, names of such, `|`, `**` and `for`.

    Args:
        module: where it stands.
        local: the names that a `for` around it has given.
    """
    if depth > MAX_DEPTH:  # a name that is made of itself
        raise Unclear(ast.unparse(node))

    def inner(child: ast.AST, **names: Any) -> Any:
        return _value(module, child, local | names, depth + 1)

    match node:
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return [inner(element) for element in elements]
        case ast.Name(id=name) if name in local:
            return local[name]
        case ast.Name(id=name):
            owner, found = lookup(module, name)
            return _value(owner, found, {}, depth + 1)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return inner(left) | inner(right)
        case ast.Dict(keys=keys, values=values):
            merged: dict[Any, Any] = {}
            for key, value in zip(keys, values):
                merged |= inner(value) if key is None else {inner(key): inner(value)}
            return merged
        case ast.DictComp(generators=[ast.comprehension(target=ast.Name(id=name), iter=each, ifs=[])]):
            return {inner(node.key, **{name: one}): inner(node.value, **{name: one}) for one in inner(each)}
    raise Unclear(ast.unparse(node))
