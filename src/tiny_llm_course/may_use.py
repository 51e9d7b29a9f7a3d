"""Lists the interfaces of other files that an exercise may use: those that the reference's solution calls.

They are read from the reference with `ast`, so the list is never out of date: imported names, and members of
objects whose class follows from annotations, constructors and return types. The syllabus declares what cannot
be found this way (`may_use`). Helpers that the starter omits are searched too, but never listed. The order is
alphabetical, so that the list does not reveal how the solution combines its entries.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .errors import CourseError
from .interfaces import Interface, constructor, field_summary, first_line, is_keyword_only, shown
from .repo import Repo
from .source import Function, functions
from .units import Day, Exercise, Unit

SEQUENCES = {"list", "tuple", "set", "Seq", "Sequence", "Iterable", "Iterator", "deque", "frozenset"}
PRIVATE = re.compile(r"\._(?!_)")
CHECKPOINTS = "tiny_llm_checkpoints"  # the package that the reference builds on; exercises call it too
MAPPINGS = {"dict", "Mapping", "OrderedDict", "defaultdict"}


# A member of a class: its module, its name with the class, and its function, annotation or value.
Member = tuple[str, str, ast.stmt | ast.expr]


def may_use(repo: Repo, day: Day, exercise: Exercise) -> list[Interface]:
    """The interfaces that one exercise may use, sorted by module and name."""
    reference = Reference(repo.reference)
    removed = set(day.removed_from(exercise.module))
    found = _used(reference, exercise.module, exercise.name, removed, set())
    found |= {_split(name) for name in exercise.may_use}
    gone = {_split(name) for name in day.removed}
    return [reference.interface(module, name) for module, name in sorted(found - gone)]


def _split(name: str) -> tuple[str, str]:
    """Split `module.name` of the reference, or `package.module.name` of the package below it."""
    package = f"{CHECKPOINTS}." if _is_below(name) else ""
    module, _, rest = name.removeprefix(package).partition(".")
    return package + module, rest


def unit_may_use(repo: Repo, unit: Unit) -> list[Interface]:
    """The interfaces that the exercises of a day or a part may use, each once."""
    return sorted({one for exercise in unit.exercises for one in may_use(repo, unit.day, exercise)})


@dataclass(frozen=True)
class Kind:
    """A class of the reference, or a container. of: the kind of a container's items."""

    module: str = ""
    name: str = ""
    of: "Kind | None" = None


def _used(
    reference: "Reference", module: str, name: str, removed: set[str], seen: set[str]
) -> set[tuple[str, str]]:
    """The interfaces of other modules that a function uses, directly or in the removed helpers it calls."""
    if name in seen:
        return set()
    seen.add(name)
    node = reference.functions(module)[name]
    reader = _Reader(reference, module, name.rpartition(".")[0], node)
    found = {one for one in reader.found if one[0] != module and not PRIVATE.search(one[1])}
    for helper in removed:
        if helper.rpartition(".")[2] in reader.mentioned:
            found |= _used(reference, module, helper, removed, seen)
    return found


class Reference:
    """The modules of the reference and of the package below it (`tiny_llm_checkpoints.X`), parsed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tree(self, module: str) -> ast.Module:
        """A module's parsed source; an empty module if the file does not exist."""
        package, _, name = module.rpartition(".")
        folder = self.folder.parent / package if package else self.folder
        file = folder / f"{name}.py"
        return _parsed(file, file.stat().st_mtime_ns if file.exists() else 0)

    def functions(self, module: str) -> dict[str, Function]:
        """Every function of a module, by name."""
        return _functions(self.tree(module))

    def imports(self, module: str) -> dict[str, tuple[str, str]]:
        """The names that a module imports from its package, each with its module and original name."""
        return _imports(self.tree(module), module.rpartition(".")[0])

    def defined(self, module: str, name: str) -> ast.stmt | None:
        """The class, function or constant of that name at the top level of a module."""
        for node in self.tree(module).body:
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return node
            if isinstance(node, ast.Assign) and any(_is_name(target, name) for target in node.targets):
                return node
            if isinstance(node, ast.AnnAssign) and _is_name(node.target, name):
                return node
        return None

    def definition(self, module: str, name: str) -> tuple[str, str] | None:
        """The module and name that a name refers to; None if it is not defined in the reference."""
        if self.defined(module, name) is not None:
            return module, name
        return self.imports(module).get(name)

    def kind(self, module: str, annotation: ast.expr | None) -> Kind | None:
        """The kind that an annotation means; for a union, its first member that is in the reference."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.Name):
            return self._named(self.definition(module, annotation.id))
        if isinstance(annotation, ast.BinOp):
            return self.kind(module, annotation.left) or self.kind(module, annotation.right)
        if isinstance(annotation, ast.Subscript):
            return self._generic(module, annotation)
        return self._written(module, annotation)

    def _written(self, module: str, value: ast.expr | None) -> Kind | None:
        """The kind of a value without an annotation: of a call `C(...)`, or of a container of such calls."""
        if isinstance(value, ast.Call):
            return self.kind(module, value.func)
        held = self.kind(module, _held(value)) if value is not None else None
        return Kind(of=held) if held is not None else None

    def member(self, kind: Kind, name: str) -> Member | None:
        """A member of a class or its bases: where it is defined, and its function or annotation.

        A value assigned in a method says the least about the type, so it is used only if nothing else is
        found.
        """
        node = self.defined(kind.module, kind.name)
        if not isinstance(node, ast.ClassDef):
            return None
        found = self._declared(node, name)
        if found is None and (inherited := self._inherited(kind.module, node, name)) is not None:
            return inherited
        found = found or self._assigned(node, name, is_annotated=False)
        return None if found is None else (kind.module, f"{kind.name}.{name}", found)

    def _declared(self, node: ast.ClassDef, name: str) -> ast.stmt | ast.expr | None:
        """A class's own member, as a function or an annotation."""
        for part in node.body:
            if isinstance(part, Function) and part.name == name:
                return part
            if isinstance(part, ast.AnnAssign) and _is_name(part.target, name):
                return part.annotation
        return self._assigned(node, name, is_annotated=True)

    def _inherited(self, module: str, node: ast.ClassDef, name: str) -> Member | None:
        """A member of one of the class's bases."""
        for base in node.bases:
            kind = self.kind(module, base.value if isinstance(base, ast.Subscript) else base)
            found = self.member(kind, name) if kind is not None else None
            if found is not None:
                return found
        return None

    def result(self, module: str, found: ast.stmt | ast.expr | None) -> Kind | None:
        """The kind of a field, or of a function's return value."""
        annotation = found.returns if isinstance(found, Function) else found
        return self.kind(module, annotation) if isinstance(annotation, ast.expr) else None

    def interface(self, module: str, name: str) -> Interface:
        """An interface as shown to a learner. Raises `CourseError` for an unknown name."""
        owner, _, member = name.rpartition(".")
        if not owner:
            place = self.definition(module, name)
            if place is None:
                raise CourseError(f"there is no {module}.{name}")
            node = self.defined(*place)
            if isinstance(node, ast.ClassDef):
                made_from = constructor(node, self._keyword_bases(place[0], node))
                return Interface(module, name, f"{name}{made_from}", first_line(node))
            return shown(module, name, node)
        found = self.member(Kind(module, owner), member)
        if found is None:
            raise CourseError(f"there is no {module}.{name}")
        interface = shown(module, name, found[2])
        holder = self.defined(found[0], found[1].rpartition(".")[0])
        return interface._replace(summary=interface.summary or field_summary(holder, member))

    def _keyword_bases(self, module: str, node: ast.ClassDef) -> set[str]:
        """The bases of a class whose fields are keyword-only."""
        kinds = {ast.unparse(base): self.kind(module, base) for base in node.bases}
        defined = {name: self.defined(kind.module, kind.name) for name, kind in kinds.items() if kind}
        return {name for name, base in defined.items() if base is not None and is_keyword_only(base)}

    def _named(self, place: tuple[str, str] | None) -> Kind | None:
        """The kind of a class, or of the type that a type alias stands for."""
        node = self.defined(*place) if place is not None else None
        if isinstance(node, ast.Assign):
            return self.kind(place[0], node.value) if place is not None else None
        return Kind(*place) if place is not None and isinstance(node, ast.ClassDef) else None

    def _generic(self, module: str, annotation: ast.Subscript) -> Kind | None:
        outer = annotation.value.id if isinstance(annotation.value, ast.Name) else ""
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer in SEQUENCES:
            held = self.kind(module, inner[0])
        elif outer in MAPPINGS:
            held = self.kind(module, inner[-1])
        else:
            return self.kind(module, annotation.value)  # a generic class of the reference
        return Kind(of=held) if held is not None else None

    def _assigned(self, node: ast.ClassDef, name: str, *, is_annotated: bool) -> ast.expr | None:
        """The annotation of `self.name` in a method's assignment.

        is_annotated: if False, find the assigned value of an assignment without annotation instead.
        """
        for method in (part for part in node.body if isinstance(part, Function)):
            parameters = {one.arg: one.annotation for one in [*method.args.args, *method.args.kwonlyargs]}
            for part in ast.walk(method):
                if is_annotated and isinstance(part, ast.AnnAssign) and _is_self(part.target, name):
                    return part.annotation
                if isinstance(part, ast.Assign) and (value := _value_for(part, name)) is not None:
                    is_parameter = isinstance(value, ast.Name) and value.id in parameters
                    if is_parameter == is_annotated:
                        return parameters[value.id] if isinstance(value, ast.Name) and is_parameter else value
        return None


@dataclass
class _Reader:
    """Reads one function: the interfaces of other modules that it uses, and every name in it."""

    reference: Reference
    module: str
    owner: str
    node: Function
    found: set[tuple[str, str]] = field(default_factory=set)
    mentioned: set[str] = field(default_factory=set)
    known: dict[str, Kind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parameters()
        body = self.node.body[1:] if ast.get_docstring(self.node) else self.node.body
        for _ in range(2):  # in a loop, a name may be used above the line that binds it
            for statement in body:
                for part in ast.walk(statement):
                    self._bind(part)
        for statement in body:
            for part in ast.walk(statement):
                self._use(part)

    def _parameters(self) -> None:
        if self.owner:
            self.known["self"] = Kind(self.module, self.owner)
        for one in [*self.node.args.args, *self.node.args.kwonlyargs]:
            if (kind := self.reference.kind(self.module, one.annotation)) is not None:
                self.known[one.arg] = kind

    def _bind(self, part: ast.AST) -> None:
        """Record the kinds of the names that a part of the code binds, if they can be found."""
        pairs: list[tuple[ast.expr, ast.expr, bool]] = []
        if isinstance(part, ast.Assign):
            pairs = [(target, part.value, False) for target in part.targets]
        elif isinstance(part, ast.NamedExpr):
            pairs = [(part.target, part.value, False)]
        elif isinstance(part, ast.For | ast.comprehension | ast.AsyncFor):
            pairs = [(part.target, part.iter, True)]
        elif isinstance(part, ast.withitem) and part.optional_vars is not None:
            pairs = [(part.optional_vars, part.context_expr, False)]
        for target, value, is_item in pairs:
            for name, source in _unpacked(target, value):
                kind = self._kind(source)
                kind = kind.of if kind is not None and is_item else kind
                if kind is not None:
                    self.known[name] = kind

    def _use(self, part: ast.AST) -> None:
        if isinstance(part, ast.Name):
            self.mentioned.add(part.id)
            place = self.reference.imports(self.module).get(part.id)
            if place is not None:
                self.found.add(place)
        elif isinstance(part, ast.Attribute):
            self.mentioned.add(part.attr)
            kind = self._kind(part.value)
            member = self.reference.member(kind, part.attr) if kind is not None else None
            if member is not None:
                self.found.add(member[:2])
        elif isinstance(part, ast.Call) and not isinstance(part.func, ast.Name):
            kind = self._kind(part.func)
            member = self.reference.member(kind, "__call__") if kind is not None else None
            if member is not None:
                self.found.add(member[:2])

    def _kind(self, value: ast.expr) -> Kind | None:
        """The kind of an expression's value, if it can be found."""
        if isinstance(value, ast.Name):
            return self.known.get(value.id)
        if isinstance(value, ast.Attribute):
            return self._member_kind(value)
        if isinstance(value, ast.Call):
            return self._call(value)
        if isinstance(value, ast.Subscript):
            inner = self._kind(value.value)
            return inner if isinstance(value.slice, ast.Slice) else inner.of if inner is not None else None
        return self._kind_within(value)

    def _kind_within(self, value: ast.expr) -> Kind | None:
        """The kind of an expression that passes on or contains another expression."""
        if isinstance(value, ast.Await | ast.Starred):
            return self._kind(value.value)
        if isinstance(value, ast.IfExp):
            return self._kind(value.body) or self._kind(value.orelse)
        held = _held(value)
        inside = self._kind(held) if held is not None else None
        return Kind(of=inside) if inside is not None else None

    def _member_kind(self, value: ast.Attribute) -> Kind | None:
        kind = self._kind(value.value)
        member = self.reference.member(kind, value.attr) if kind is not None else None
        return self.reference.result(member[0], member[2]) if member is not None else None

    def _call(self, value: ast.Call) -> Kind | None:
        function = value.func
        if isinstance(function, ast.Name):
            if (
                function.id in ("list", "tuple", "sorted", "reversed", "set", "enumerate", "next")
                and value.args
            ):
                return self._kind(value.args[0])
            place = self.reference.definition(self.module, function.id)
            if place is None:
                return None
            node = self.reference.defined(*place)
            return Kind(*place) if isinstance(node, ast.ClassDef) else self.reference.result(place[0], node)
        if isinstance(function, ast.Attribute):
            if function.attr in ("values", "get", "pop", "popleft"):
                inner = self._kind(function.value)
                if inner is not None and inner.of is not None:
                    return inner if function.attr == "values" else inner.of
            return self._member_kind(function)
        return None


def _held(value: ast.expr) -> ast.expr | None:
    """One item of a container display or comprehension."""
    if isinstance(value, ast.Dict):
        return value.values[0] if value.values else None
    if isinstance(value, ast.List | ast.Tuple | ast.Set):
        return value.elts[0] if value.elts else None
    if isinstance(value, ast.DictComp):
        return value.value
    return value.elt if isinstance(value, ast.ListComp | ast.SetComp | ast.GeneratorExp) else None


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The names of an assignment, each with its value."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=False):
            yield from _unpacked(one, other)
    elif isinstance(target, ast.Tuple) and _calls(value, "enumerate") and len(target.elts) == 2:
        yield from _unpacked(target.elts[1], value)
    elif isinstance(target, ast.Tuple) and _calls(value, "zip"):
        assert isinstance(value, ast.Call)
        for one, other in zip(target.elts, value.args, strict=False):
            yield from _unpacked(one, other)


def _calls(value: ast.expr, name: str) -> bool:
    return isinstance(value, ast.Call) and _is_name(value.func, name)


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_self(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name and _is_name(node.value, "self")


def _value_for(node: ast.Assign, name: str) -> ast.expr | None:
    """The value that an assignment gives to `self.name`."""
    for target in node.targets:
        if _is_self(target, name):
            return node.value
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for one, value in zip(target.elts, node.value.elts, strict=False):
                if _is_self(one, name):
                    return value
    return None


@cache
def _functions(tree: ast.Module) -> dict[str, Function]:
    return functions(ast.unparse(tree))


@cache
def _imports(tree: ast.Module, package: str) -> dict[str, tuple[str, str]]:
    """The imported names. package: `tiny_llm_checkpoints` for its modules; empty for the reference's."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and (node.level or _is_below(node.module)):
            module = f"{package}.{node.module}" if node.level and package else node.module
            found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return found


def _is_below(module: str) -> bool:
    return module.partition(".")[0] == CHECKPOINTS


@cache
def _parsed(file: Path, changed: int) -> ast.Module:
    """Parse a file. changed: its modification time, so that a new version is parsed again; 0 if missing."""
    return ast.parse(file.read_text(encoding="utf-8") if changed else "")
