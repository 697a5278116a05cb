"""Places of a piece of Python in a file, compared by syntax; and its replacement.

A piece is read in each way that Python allows: statements, the head of a compound
statement ("if x > 0:"), an expression, what stands in the brackets of an index, items
of a dict or arguments of a call. Formatting, brackets that change nothing and quotes do
not count. Attributes, keywords, strings, numbers and names of the module must agree;
local variables may have other names in the file, each one name throughout.
"""

import ast
import builtins
import functools
import re
import textwrap
from typing import NamedTuple

# What a piece is put into to become a module; its own lines begin at the second.
_FRAMES = {
    "statements": ("", ""),
    "head": ("", " pass"),
    "expression": ("(", ")"),
    "index": ("x[", "]"),
    "items": ("{", "}"),
    "arguments": ("f(", ")"),
}
_BODIES = ("body", "orelse", "finalbody", "handlers")
_IGNORED = ("type_comment", "kind")
_BUILTINS = frozenset(dir(builtins))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant, ast.Starred)


class Place(NamedTuple):
    """Where a piece stands in a file.

    Attributes:
        start: the first byte.
        end: the byte after the last.
        line: of the first byte, from 1.
        reading: how the piece was read, a key of `_FRAMES`.
        renamed: {name in the piece: another name in the file}.
        known: the names that code at this place may use.
    """

    start: int
    end: int
    line: int
    reading: str
    renamed: dict
    known: frozenset


def places(source, old, new, within=""):
    """All places of a piece with the fewest renamed variables.

    Args:
        source: text of the file.
        old: the piece.
        new: its replacement; both must allow the same reading.
        within: the function or class that holds it ("f", "C.f"), or "".

    Returns:
        A list of `Place`.

    Raises:
        ValueError: the piece or its replacement is no Python.
    """
    file, matches, readable = _file(source), {}, False
    for reading in _FRAMES:
        pattern = _read(reading, old)
        if not pattern or _read(reading, new) is None:
            continue
        if (
            reading == "statements"
            and _is_expression(pattern)
            and _is_expression(_read(reading, new))
        ):
            continue  # the expression is the same place, and others
        readable = True
        for nodes, start, end in file.candidates(reading, len(pattern)):
            if within and f".{within}." not in f".{'.'.join(file.path[nodes[0]])}.":
                continue
            names = _Names(file)
            if all(map(names.agree, pattern, nodes)):
                line = source.encode()[:start].count(b"\n") + 1
                known = file.known | file.local[nodes[0]] | _free(nodes)
                place = Place(start, end, line, reading, names.renamed, known)
                matches.setdefault((start, end), place)
    if not readable:
        raise ValueError(f"neither Python nor a part of it: {old!r} -> {new!r}")
    fewest = min((len(p.renamed) for p in matches.values()), default=0)
    return [p for p in matches.values() if len(p.renamed) == fewest]


def replace(source, place, new):
    """The file's text with a piece replaced.

    Raises:
        ValueError: the replacement uses a name that is not known at the place.
    """
    nodes = [_Rename(place.renamed).visit(n) for n in _read(place.reading, new)]
    strange = _free(nodes) - place.known
    if strange:
        raise ValueError(f"no {', '.join(sorted(strange))} at line {place.line}")
    data, start, end = source.encode(), place.start, place.end
    if not nodes and place.reading in ("items", "arguments"):
        # The comma goes, too: the one behind, or the one before at the end.
        behind = re.match(rb"\s*,", data[end:])
        before = re.search(rb",\s*$", data[:start])
        if behind:
            end += behind.end()
        elif before:
            start = before.start()
    column = start - (data.rfind(b"\n", 0, start) + 1)
    text = _write(place.reading, nodes)
    if place.reading == "statements":
        text = textwrap.indent(text, " " * column)[column:]
    return (data[:start] + text.encode() + data[end:]).decode()


def _read(reading, text):
    """The nodes of a piece read in one way; None where that cannot be."""
    before, behind = _FRAMES[reading]
    text = textwrap.dedent(text).strip()
    if not text and reading in ("statements", "items", "arguments"):
        return []
    if reading == "head":
        if not text.endswith(":"):
            return None
    elif before:
        before, behind = f"{before}\n", f"\n{behind}"
    try:
        body = ast.parse(before + text + behind).body
    except SyntaxError:
        return None
    if reading == "statements":
        return body
    if len(body) != 1:
        return None
    if reading == "head":
        body[0].body = []  # of a head alone; `_Names.agree` asks for it
        return body
    value = body[0].value
    if reading == "expression":
        return [value] if text else None
    if reading == "index" and isinstance(value, ast.Subscript):
        parts = ast.walk(value.slice)
        return [value.slice] if any(isinstance(p, ast.Slice) for p in parts) else None
    if reading == "items" and isinstance(value, ast.Dict):
        return _items(value)
    if reading == "arguments" and isinstance(value, ast.Call):
        return _arguments(value)
    return None


def _write(reading, nodes):
    """Source text of nodes, to stand where nodes of this reading stood."""
    if reading == "statements":
        return "\n".join(map(ast.unparse, nodes or [ast.Pass()]))
    if reading == "head":
        return ast.unparse(nodes[0])
    if reading == "index":
        whole = ast.Subscript(ast.Name("x"), nodes[0], ast.Load())
        return ast.unparse(whole)[2:-1]
    if reading == "items":
        return ", ".join(f"{ast.unparse(i.key)}: {ast.unparse(i.value)}" for i in nodes)
    text = ", ".join(map(ast.unparse, nodes))
    if reading == "expression" and not isinstance(nodes[0], _ATOMS):
        text = f"({text})"
    return text


class _Item(ast.AST):
    """A key of a dict with its value."""

    _fields = ("key", "value")


def _items(node):
    return [
        _Item(key=key, value=value)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is not None
    ]


def _arguments(node):
    both = [*node.args, *node.keywords]
    return sorted(both, key=lambda n: (n.lineno, n.col_offset))


def _is_expression(nodes):
    return len(nodes) == 1 and isinstance(nodes[0], ast.Expr)


class _Names:
    """The renamed variables of one comparison."""

    def __init__(self, file):
        self._file = file
        self._there, self._back = {}, {}  # {name in the piece: in the file}, reversed

    @property
    def renamed(self):
        return {old: new for old, new in self._there.items() if old != new}

    def agree(self, pattern, node):
        """Whether two nodes are the same but for names of local variables."""
        if type(pattern) is not type(node):
            return False
        if isinstance(pattern, ast.Constant):
            same = type(pattern.value) is type(node.value)
            return same and pattern.value == node.value
        if isinstance(pattern, ast.Name) and not self._same(
            pattern.id, node.id, self._file.local[node]
        ):
            return False
        fields = [f for f in pattern._fields if f not in _IGNORED]
        if isinstance(pattern, ast.Name):
            fields.remove("id")
        elif isinstance(pattern, ast.arg):
            if not self._same(pattern.arg, node.arg, self._file.local[node]):
                return False
            fields = [] if pattern.annotation is None else ["annotation"]
        elif getattr(pattern, "body", None) == []:
            fields = [f for f in fields if f not in _BODIES]
        return all(self._fit(getattr(pattern, f), getattr(node, f)) for f in fields)

    def _fit(self, old, new):
        if isinstance(old, ast.AST):
            return self.agree(old, new)
        if isinstance(old, list):
            return len(old) == len(new) and all(map(self._fit, old, new))
        return old == new

    def _same(self, old, new, local):
        """Whether a name of the piece can be this name of the file."""
        fixed = self._file.module | _BUILTINS
        if old != new and (new not in local or old in fixed):
            return False
        there, back = self._there.setdefault(old, new), self._back.setdefault(new, old)
        return there == new and back == old


class _Rename(ast.NodeTransformer):
    def __init__(self, names):
        self._names = names

    def visit_Name(self, node):
        return ast.Name(self._names.get(node.id, node.id), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self._names.get(node.arg, node.arg), node.annotation)


def _free(nodes):
    """Names that nodes use and do not bind."""
    used, bound = set(), set()
    for node in (n for top in nodes for n in ast.walk(top)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return used - bound


class _File:
    """The syntax of one file.

    Attributes:
        module: names bound at its top.
        known: those, the built-in ones and all that are imported anywhere.
        local: {node: names of local variables there}.
        path: {node: names of the functions and classes around it}.
    """

    def __init__(self, source):
        lines = source.encode().splitlines(keepends=True)
        self._data = source.encode()
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._tree = ast.parse(source)
        self.local, self.path = {}, {}
        self._nodes = []
        self._enter(self._tree, frozenset(), ())
        top = [n for n in self._nodes if not self.local[n] and not self.path[n]]
        self.module = frozenset().union(*map(_bound, top), *map(_imported, top))
        self.known = self.module | _BUILTINS.union(*map(_imported, self._nodes))

    def _enter(self, node, local, path):
        self.local[node], self.path[node] = local, path
        self._nodes.append(node)
        if isinstance(node, (*_FUNCTIONS, *_COMPREHENSIONS)):
            inner = (n for n in ast.walk(node) if n is not node)
            local = local.union(*map(_bound, inner))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            path = (*path, node.name)
        for child in ast.iter_child_nodes(node):
            self._enter(child, local, path)

    def _span(self, first, last):
        start = self._starts[first.lineno - 1] + first.col_offset
        return start, self._starts[last.end_lineno - 1] + last.end_col_offset

    def candidates(self, reading, size):
        """Yields ([node, ...], start, end) of what a reading can be compared with."""
        if reading == "head":
            for node in self._nodes:
                if isinstance(node, ast.stmt) and isinstance(
                    getattr(node, "body", None), list
                ):
                    parts = [n for n in ast.iter_child_nodes(node) if n]
                    yield [node], *self._head(node, parts)
        elif reading in ("expression", "index"):
            inside = set()  # f-strings: their parts have no places of their own
            for node in self._nodes:
                if isinstance(node, ast.JoinedStr):
                    inside.update(n for n in ast.walk(node) if n is not node)
            for node in self._nodes:
                index = reading == "index" and isinstance(node, ast.Subscript)
                one = node.slice if index else node
                if one in inside or not isinstance(one, ast.expr):
                    continue
                if index or reading == "expression":
                    yield [one], *self._span(one, one)
        else:
            for run in self._runs(reading):
                for at in range(len(run) - size + 1):
                    part = run[at : at + size]
                    yield part, *self._span(*self._ends(part))

    def _ends(self, part):
        first, last = part[0], part[-1]
        if isinstance(first, _Item):
            first, last = first.key, last.value
        return first, last

    def _runs(self, reading):
        for node in self._nodes:
            if reading == "items" and isinstance(node, ast.Dict):
                items = _items(node)
                for item in items:
                    self.local[item] = self.local[node]
                    self.path[item] = self.path[node]
                yield items
            elif reading == "arguments" and isinstance(node, ast.Call):
                yield _arguments(node)
            elif reading == "statements":
                bodies = (getattr(node, name, None) for name in _BODIES)
                yield from (b for b in bodies if isinstance(b, list) and b)

    def _head(self, node, parts):
        """The bytes from a compound statement's first word to its colon."""
        start, _ = self._span(node, node)
        body = node.body[0].lineno, node.body[0].col_offset
        ends = [start]
        for part in (n for top in parts for n in ast.walk(top)):
            if hasattr(part, "lineno") and (part.lineno, part.col_offset) < body:
                ends.append(self._span(part, part)[1])
        return start, self._data.index(b":", max(ends)) + 1


def _bound(node):
    """The names of variables, functions and classes that one node binds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.ExceptHandler) and node.name:
        return {node.name}
    return set()


def _imported(node):
    if isinstance(node, ast.alias):
        return {(node.asname or node.name).split(".")[0]}
    return set()


@functools.lru_cache(maxsize=128)
def _file(source):
    return _File(source)
