"""The book's preprocessor: directives, formulas, code, results, figures. Oracles: texts written by hand."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from figures import chart
from figures.find import draw
from preprocessor import cpp as cpp_source
from preprocessor import results as saved_results
from preprocessor.arithmetic import evaluate, shown
from preprocessor.chapter import Chapters
from preprocessor.code import Code, signature_of, source_of
from preprocessor.cpp import CSRC, cpp, cpp_source_of
from preprocessor.directives import expand
from preprocessor.errors import BookError
from preprocessor.mathml import with_mathml
from preprocessor.measure import measure_all
from preprocessor.results import Results
from tiny_llm_course.repo import Repo
from tiny_llm_course.source import functions, names_in, with_body_of, with_function
from tiny_llm_course.starter import starter
from tiny_llm_course.syllabus import read_syllabus
from tiny_llm_course.units import Day

MACHINE = {
    **{"version": "0.1.0", "python": "3.11", "mlx": "0.32.4", "processor": "2 x ACME"},
    **{"instruction_set": "avx2", "threads": 2},
}
LAB = {
    "tables": [
        {
            "title": "Bytes",
            "rows": [{"what": "used", "bytes": {"predicted": 1024, "measured": 1000}}, {"what": "all"}],
            "shown": {
                "heads": ["what", "bytes"],
                "is_text": [True, False],
                "rows": [["used | kept", "1,000"]],
            },
        }
    ],
    "picture": {
        **{"title": "Time", "x": "tokens", "y": "ms", "x_base": 2, "y_base": None},
        **{"x_is_share": False, "y_is_share": False},
        "lines": [
            {"name": "ours", "points": [[1, 2.0], [2, 4.0]], "is_predicted": False},
            {"name": "ours", "points": [[1, 2.5], [2, 5.0]], "is_predicted": True},
        ],
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results with a lab and a text."""
    monkeypatch.setattr(saved_results, "FOLDER", tmp_path)
    common = {"date": "2026-01-02", "machine": MACHINE}
    files: Mapping[str, dict[str, Any]] = {
        "bytes": {"command": "pdm run lab bytes --json", "json": LAB, **common},
        "talk": {"command": "pdm run try 3.1", "output": "one\ntwo\nthree\n", **common},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.fixture
def directives(folder: Path) -> Results:
    return Results(chart.svg)


# ---- directives ----


def test_a_directive_is_replaced_by_what_it_returns() -> None:
    assert expand("a {{shout x y}} b", {"shout": str.upper}, "c.md") == "a X Y b"


@pytest.mark.parametrize("text", ["`{{shout x}}`", "`` `{{shout x}}` ``", "```text\n{{shout x}}\n```"])
def test_directives_in_code_stay_as_they_are(text: str) -> None:
    assert expand(text, {"shout": str.upper}, "c.md") == text


def test_an_unknown_directive_is_named_with_its_line_and_the_known_ones() -> None:
    with pytest.raises(BookError, match=r"c\.md:3: \{\{whisper x\}\}: unknown directive \(known: shout\)"):
        expand("a\n\n{{whisper x}}", {"shout": str.upper}, "c.md")


def test_an_error_of_a_directive_gets_the_file_and_the_line() -> None:
    def fail(arguments: str) -> str:
        raise BookError(f"no {arguments}")

    with pytest.raises(BookError, match=r"c\.md:2: \{\{fail cheese\}\}: no cheese"):
        expand("a\n{{fail cheese}}", {"fail": fail}, "c.md")


def test_the_arguments_of_a_directive_may_continue_on_the_next_line() -> None:
    assert expand("{{shout x\n  y}}", {"shout": str.upper}, "c.md") == "X Y"


def test_a_directive_that_is_never_closed_stops_the_build() -> None:
    with pytest.raises(BookError, match=r"c\.md:2: \{\{ is never closed"):
        expand("a\n{{shout x", {"shout": str.upper}, "c.md")


# ---- formulas ----


def test_formulas_become_mathml() -> None:
    text = with_mathml("Cost $`x^2`$.\n\n```math\n\\frac{a}{b}\n```\n", "c.md")
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mrow><msup>' in text
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in text
    assert "<mfrac>" in text
    assert "$" not in text


def test_dollar_signs_in_prose_and_in_fences_are_not_formulas() -> None:
    text = "It costs $5.\n\n```console\n$ echo $`x`$\n```\n"
    assert with_mathml(text, "c.md") == text


def test_an_invalid_formula_stops_the_build() -> None:
    with pytest.raises(BookError, match=r"c\.md: the formula"):
        with_mathml("$`x^`$", "c.md")


# ---- numbers ----


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * 3 * 64", 384),
        ("165 / 8192", 165 / 8192),
        ("-7 // 2", -4),
        ("2 ** 10 - 1", 1023),
        ("ceil(100 / 16)", 7),
        ("128 + sum(128 + s for s in range(1, 101))", 17_978),
        ("max(1, 2) + min([3, 4])", 5),
        ("half(10)", 5),
    ],
)
def test_arithmetic_is_evaluated(expression: str, value: float) -> None:
    assert evaluate(expression, {"half": lambda x: x / 2}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1 +",
        "x",
        "__import__('os')",
        "(1).real",
        "[1, 2]",
        "'a'",
        "1 / 0",
        "open('f')",
        "lambda: 1",
        "1 < 2",
    ],
)
def test_anything_else_than_arithmetic_is_rejected(expression: str) -> None:
    with pytest.raises(BookError):
        evaluate(expression, {})


@pytest.mark.parametrize(
    ("number", "form", "text"),
    [
        (23_040, "", "23,040"),
        (2.71828, "", "2.72"),
        (12_345.6, "", "12,346"),
        (0.8541, "percent", "85.4%"),
        (2**29, "bytes", "512 MiB"),
        (999.6, ",d", "1,000"),
        (2.5, ".2f", "2.50"),
    ],
)
def test_numbers_are_shown_in_the_requested_form(number: float, form: str, text: str) -> None:
    assert shown(number, form) == text


def test_an_unknown_form_is_rejected() -> None:
    with pytest.raises(BookError, match="'eggs' is not a format"):
        shown(1.5, "eggs")


# ---- code ----


def test_code_shows_a_definition_without_the_indentation_of_its_class() -> None:
    code = source_of("paged_attention.BlockAllocator.num_free")
    assert code.startswith("@property\ndef num_free(self) -> int:\n    ")


def test_a_signature_over_several_lines_is_joined() -> None:
    text = signature_of("paged_kernel.paged_attention")
    assert text.startswith("def paged_attention(q: mx.array, ")
    assert text.endswith(") -> mx.array:")
    assert "\n" not in text


def test_the_signature_of_a_class_lists_its_public_methods() -> None:
    lines = signature_of("paged_attention.BlockAllocator").splitlines()
    assert lines[0] == "class BlockAllocator:"
    assert "    def free(self, block: int) -> None: ..." in lines
    assert not any("_check_known" in line for line in lines)


def test_a_long_signature_has_the_lines_of_the_source() -> None:
    assert signature_of("engine.Engine.generate").splitlines()[1].startswith("    self, prompt: PromptType")


def test_other_packages_are_named_with_their_package() -> None:
    assert signature_of("tiny_llm_checkpoints.model_config.ModelConfig").startswith("class ModelConfig:")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paged_attention.BlockTable.forks", "did you mean BlockTable.fork"),
        ("no_such_module.f", "not MODULE.NAME"),
        ("paged_attention", "not MODULE.NAME"),
    ],
)
def test_an_unknown_name_stops_the_build(name: str, message: str) -> None:
    with pytest.raises(BookError, match=message):
        Code(frozenset()).signature(name)


def test_only_the_solutions_show_the_code_of_an_exercise() -> None:
    code = Code(frozenset({"paged_attention.BlockTable.fork"}))
    for name in ("paged_attention.BlockTable.fork", "paged_attention.BlockTable"):
        with pytest.raises(BookError, match="fork is an exercise"):
            code.code(name)
    assert "def fork" in code.signature("paged_attention.BlockTable.fork")
    assert "def share_block" in code.code("paged_attention.BlockTable.share_block")


# ---- C++ of the kernels ----


@pytest.mark.parametrize(
    ("file", "name", "first", "last"),
    [
        (
            "kernels/quantized_matmul.cpp",
            "add_four",
            "template <int BITS, typename Activation, int ROWS",
            "}",
        ),
        ("ops/transformer_block.cpp", "BlockJob::run", "void run(const Kernels& kernels) const {", "}"),
        ("ops/transformer_block.cpp", "Division::Division", "Division(int64_t T, int64_t threads) : ", "}"),
        ("kernels/vec.h", "Dot<BITS, int16_t>::add", "INLINE_MEMBER void add(u32w weights, Four", "}"),
        ("kernels/kernels.h", "GroupScale", "struct GroupScale {", "};"),
        ("ops/transformer_block.cpp", "TransformerBlock::operator()", "std::tuple<mx::array, ", "}"),
        ("thread_pool.h", "ThreadPool::take_pieces", "void take_pieces() {", "}"),
    ],
)
def test_cpp_is_found_by_its_name(file: str, name: str, first: str, last: str) -> None:
    lines = cpp_source_of(file, name).splitlines()
    assert lines[0].startswith(first)
    assert lines[-1] == last


def test_overloads_of_a_name_are_shown_together() -> None:
    assert cpp_source_of("kernels/vec.h", "fma").count(" fma(f32") == 2


def test_part_of_a_definition_is_shown_without_its_indentation() -> None:
    text = cpp('kernels/vec.h fma from "INLINE f32x8 fma" to "}"')
    assert text.startswith("```cpp\nINLINE f32x8 fma(")
    assert text.endswith("\n}\n```")
    assert cpp('kernels/vec.h exp from "V r =" to "V r ="').splitlines()[1].startswith("V r = fma(")


@pytest.mark.parametrize("file", sorted(CSRC.rglob("*.[ch]*")), ids=lambda file: file.name)
def test_every_file_of_the_kernels_can_be_read(file: Path) -> None:
    with pytest.raises(BookError, match="has no 'cheese'"):
        cpp_source_of(str(file.relative_to(CSRC)), "cheese")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("kernels/vec.h fmaa", "kernels/vec.h has no 'fmaa'; did you mean fma?"),
        ("kernels/cheese.h fma", "is not a file of csrc"),
        ("kernels/vec.h", "is not a file of csrc, or the name is missing"),
        ('kernels/vec.h exp from "cheese" to "}"', "0 lines contain 'cheese'"),
        ('kernels/vec.h exp from "p = fma" to "}"', "lines contain 'p = fma': it must be one"),
        ('kernels/vec.h exp from "V r =" to "cheese"', "no later line contains 'cheese'"),
    ],
)
def test_unknown_cpp_stops_the_build(arguments: str, message: str) -> None:
    with pytest.raises(BookError, match=re.escape(message)):
        cpp(arguments)


def test_a_brace_that_is_never_closed_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_source, "CSRC", tmp_path)
    (tmp_path / "a.cpp").write_text("int f() {\n")
    with pytest.raises(BookError, match=r"a\.cpp: the brace in line 1 is never closed"):
        cpp_source_of("a.cpp", "f")


def test_braces_in_comments_texts_and_characters_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_source, "CSRC", tmp_path)
    text = "int f() {\n  // }\n  g(\"}\", '}');\n  return 1'000;\n}"
    (tmp_path / "a.cpp").write_text(f"{text}\n\nint g() {{ return 2; }}\n")
    assert cpp_source_of("a.cpp", "f") == text
    assert cpp_source_of("a.cpp", "g") == "int g() { return 2; }"


# ---- results ----


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("bytes tables.0.rows.0.bytes.measured", "1,000"),
        ("bytes tables.0.rows.what=used.bytes.predicted as bytes", "1 KiB"),
        ("bytes tables.0.title", "Bytes"),
    ],
)
def test_a_value_is_found_by_its_path(directives: Results, arguments: str, text: str) -> None:
    assert directives.value(arguments) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("byte tables.0.title", "no result 'byte'; did you mean bytes"),
        ("bytes tables.1.title", "there is no '1': it has items 0 to 0"),
        ("bytes tables.0.rows.what=free.bytes", "0 items have what=free"),
        ("bytes tables.0.cheese", "there is no 'cheese': it has title, rows, shown"),
        ("bytes tables.0", "is not one value"),
    ],
)
def test_a_missing_value_stops_the_build(directives: Results, arguments: str, message: str) -> None:
    with pytest.raises(BookError, match=message):
        directives.value(arguments)


def test_calc_combines_values(directives: Results) -> None:
    path = "tables.0.rows.what=used.bytes"
    measured, predicted = (f'value("bytes", "{path}.{name}")' for name in ("measured", "predicted"))
    assert directives.calc(f"{measured} / {predicted} as percent") == "97.7%"


def test_a_table_has_its_numbers_at_the_right_and_names_its_source(directives: Results) -> None:
    table = directives.table("bytes")
    assert table.splitlines()[:3] == ["| what | bytes |", "| --- | --: |", r"| used \| kept | 1,000 |"]
    assert "Bytes. <code>pdm run lab bytes</code> on 2 x ACME, avx2 kernels, 2 threads, MLX 0.32.4." in table


def test_a_chart_draws_every_line_and_says_its_ends_in_words(directives: Results) -> None:
    chart = directives.chart("bytes")
    assert chart.count('class="blue curve"') == 2  # the measured line, and its sample in the legend
    assert chart.count('class="blue curve dashed"') == 2
    assert "ours (predicted): from 2.5 at 1 to 5 at 2." in chart
    assert "\n\n" not in chart  # an empty line would end the HTML block


def test_output_shows_the_command_and_the_wanted_lines(directives: Results) -> None:
    assert directives.output("talk 2-3").startswith("```console\n$ pdm run try 3.1\ntwo\nthree\n```")
    with pytest.raises(BookError, match="'2-4' is not FIRST-LAST within 1-3"):
        directives.output("talk 2-4")


def test_a_result_of_the_other_kind_stops_the_build(directives: Results) -> None:
    with pytest.raises(BookError, match="is JSON"):
        directives.output("bytes")
    with pytest.raises(BookError, match="has no tables"):
        directives.table("talk")


def test_measuring_saves_what_the_command_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs.toml").write_text('days = "pdm run map"\nmachine = "pdm run info --json"\n')
    measure_all([], only_missing=False)
    assert capsys.readouterr().out.startswith("[1/2] days: pdm run map\n[2/2] machine: ")
    assert "3.1  Allocator" in (saved_results.read("days").output or "")
    assert saved_results.read("machine").json["machine"]["threads"] >= 1


def test_a_run_is_prepared_in_an_overlay_of_its_own(folder: Path) -> None:
    (folder / "runs.toml").write_text(
        'after = "pdm run progress"\n'
        '[written]\ncommand = "pdm run progress"\nstart = "1.1"\nbefore = ["pdm run skip 1.1.2"]\n'
        'writes."attention.py" = "def softmax(x):\\n    return x\\n"\n'
    )
    measure_all(["written", "after"], only_missing=False)
    assert (saved_results.read("written").output or "").startswith("1.1  [xs.] ")
    assert (saved_results.read("after").output or "").startswith("1.1  [---] ")


def test_a_run_must_end_with_the_exit_code_that_it_names(folder: Path) -> None:
    (folder / "runs.toml").write_text('[bad]\ncommand = "pdm run map"\nexit_code = 1\n')
    with pytest.raises(BookError, match="pdm run map: exit code 0"):
        measure_all(["bad"], only_missing=False)


def test_measuring_an_unknown_name_or_a_failing_command_is_an_error(folder: Path) -> None:
    (folder / "runs.toml").write_text('bad = "pdm run hint 9.9.9"\n')
    with pytest.raises(BookError, match=r"has no cheese \(has: bad\)"):
        measure_all(["cheese"], only_missing=False)
    with pytest.raises(BookError, match="exit code"):
        measure_all(["bad"], only_missing=False)


# ---- figures and exercises ----


def test_an_unknown_figure_stops_the_build() -> None:
    chapters = Chapters.of_the_project()
    for name, message in {"day_3_1.forks": "did you mean fork", "cheese.x": "no figures/cheese.py"}.items():
        with pytest.raises(BookError, match=message):
            chapters.expanded(f"{{{{figure {name}}}}}", "c.md")


def test_a_figure_is_one_block_of_html_with_its_description() -> None:
    element = draw("map.3.1").inline()
    assert "\n\n" not in element
    assert "<desc>Lit: block tables, allocator.</desc>" in element


def test_every_day_with_a_chapter_is_lit_on_the_map() -> None:
    for day in ("2.1", "2.2", "2.3", *(f"3.{day}" for day in range(1, 8))):
        assert 'class="' in draw(f"map.{day}").inline()


def test_a_task_shows_the_contract_and_never_the_body() -> None:
    chapters = Chapters.of_the_project()
    task = chapters.expanded("{{task 3.1.6}}", "c.md")
    assert "### Task 6: `BlockTable.fork` {#task-6}" in task
    assert 'def fork(self) -> "BlockTable":' in task
    assert ">>> child = table.fork()" in task
    assert "add_ref" not in task
    assert '<details class="contract" open>\n<summary>The docstring</summary>\n' in task
    assert "add_ref" in chapters.expanded("{{solutions 3.1}}", "c.md")


def test_a_solution_has_neither_the_docstring_nor_a_decorator_of_the_reference() -> None:
    shown = Chapters.of_the_project().expanded("{{solutions 1.4}}", "c.md")
    assert "def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:\n    wide" in shown
    assert "@accelerated" not in shown


def test_a_helper_is_shown_once_with_the_first_solution_that_calls_it() -> None:
    shown = Chapters.of_the_project().expanded("{{solutions 3.1}}", "c.md")
    assert shown.count("def _last_block_is_shared(") == shown.count("def _copy_on_write(") == 1
    third, fourth = (
        shown.partition(f"<summary>3.1.{task} ")[2].partition("</details>")[0] for task in (3, 4)
    )
    assert "def _last_block_is_shared(" in third
    assert "`BlockTable._last_block_is_shared` is shown in 3.1.3." in fourth
    assert "The starter does not have `BlockTable._copy_on_write`:\n\n```python\ndef _copy" in fourth


def with_solutions(day: Day, module: str, text: str) -> tuple[str, list[str]]:
    """A day's starter with all that its solutions show for a module, and the names of those functions."""
    repo, names = Repo.here(), []
    source = starter(repo, module, day)
    for exercise in day.of_module(module):
        fold = text.partition(f"<summary>{exercise.id} ")[2].partition("</details>")[0]
        blocks = re.findall(r"([^\n]*)\n\n```python\n(.*?)\n```", fold, re.DOTALL)
        for before, code in blocks:
            name = before.split("`")[1] if "`" in before else exercise.name
            owner = name.rpartition(".")[0]
            shown = f"class {owner}:\n{indent(code, '    ')}\n" if owner else f"{code}\n"
            source = (with_body_of if name == exercise.name else with_function)(source, shown, name)
            names.append(name)
        for line in re.findall(r"`((?:from|import) [^`\n]+)`", fold):
            source += f"{line}\n"
    return source, names


@pytest.mark.parametrize("day", [day.id for day in read_syllabus(Repo.here().syllabus).days if day.modules])
def test_what_the_solutions_show_defines_every_name_that_it_uses(day: str) -> None:
    """Oracles: ruff's undefined names, and the functions of the reference that the starter lacks."""
    unit = read_syllabus(Repo.here().syllabus).day(day)
    text = Chapters.of_the_project().expanded(f"{{{{solutions {day}}}}}", "c.md")
    for module in unit.modules:
        source, shown = with_solutions(unit, module, text)
        assert {one.name for one in unit.of_module(module)} <= set(shown)
        ruff = ["ruff", "check", "--isolated", "--no-cache", "--select", "F821", "--quiet", "-"]
        checked = subprocess.run(ruff, input=source, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        reference = (Repo.here().reference / f"{module}.py").read_text(encoding="utf-8")
        lacking = {name.rpartition(".")[2] for name in functions(reference).keys() - functions(source).keys()}
        called = {name: sorted(lacking & names_in(source, name)) for name in shown}
        assert not any(called.values()), f"{module}.py lacks {called}"


def test_the_docstring_of_a_task_is_folded_on_a_day_with_parts() -> None:
    task = Chapters.of_the_project().expanded("{{task 3.2.8}}", "c.md")
    assert '<details class="contract">\n<summary>The docstring</summary>\n' in task
    assert ">>> child = beams.fork_beam(0)" in task


def test_an_unknown_day_or_exercise_stops_the_build() -> None:
    chapters = Chapters.of_the_project()
    for text in ("{{tasks 9.9}}", "{{task 3.1.99}}", "{{may_use 3.2z}}", "{{solutions cheese}}"):
        with pytest.raises(BookError):
            chapters.expanded(text, "c.md")
