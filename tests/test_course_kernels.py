"""Kernels in C++: their starters are blank, and they are built into a library that the engine then uses."""

import json
import os
import sys
from pathlib import Path

import pytest

import tiny_llm_kernels
from tiny_llm_course import blame, cpp, testing
from tiny_llm_course.blame import find_blame
from tiny_llm_course.compare import KERNEL_WORK, WORK, Comparison, Measured, as_text, works_of
from tiny_llm_course.doctor import examine
from tiny_llm_course.errors import CourseError
from tiny_llm_course.outcome import Outcome, first_to_fix, signal_report
from tiny_llm_course.overview import map_text, progress, progress_text
from tiny_llm_course.progress import remember
from tiny_llm_course.repo import Repo
from tiny_llm_course.starter import set_aside, skip, start
from tiny_llm_course.testing import run_day
from tiny_llm_course.views import tasks
from toy_course import replace, run, syllabus_of

KERNEL = """// A kernel.
#include "kernels.h"

namespace tiny_llm::TINY_LLM_ISA {

// ---- helpers ----

/// Doubles.
template <typename T>
static T helper(T x) {
  return x + x;

}

// ---- the rest ----

/// Given.
struct Kept {
  int x;
};

/// Twice.
int twice(const Kept& job, int64_t end) {
  if (end) {

    return helper(job.x);
  }
  return 0;
}

}  // namespace tiny_llm::TINY_LLM_ISA
"""


def test_a_kernel_is_blanked_part_by_part() -> None:
    blank = cpp.blanked(KERNEL, ["twice"], ["helper"], "2.4.4 twice.cpp")
    assert "helper" not in blank
    assert "// ---- helpers ----" not in blank
    assert '/// Twice.\nint twice(const Kept& job, int64_t end) {\n#error "2.4.4 twice.cpp"\n}\n\n}' in blank
    assert "/// Given.\nstruct Kept {\n  int x;\n};" in blank
    with pytest.raises(CourseError, match="does not define thrice"):
        cpp.blanked(KERNEL, ["thrice"], [], "m")


def test_a_kernels_starter_states_the_task(tmp_path: Path) -> None:
    here = Repo.here().with_overlay(tmp_path)
    syllabus = syllabus_of(here)
    days = [day for day in syllabus.days if day.kernels]
    assert [day.id for day in days] == ["2.4", "2.5"]
    for day in days:
        [option] = [line for line in tasks(here, day).splitlines() if line.startswith("option:")]
        assert option.startswith(f"option:  {day.id}.{len(day.exercises) + 1}, ")
        [file] = cpp.start_kernels(here, day)
        assert "tiny_llm::TINY_LLM_ISA)" in file.read_text("utf-8")
        assert max(map(len, file.read_text("utf-8").splitlines())) <= 120
        run = cpp.compiles(here, file.read_text("utf-8"))
        assert run.returncode
        assert day.kernels[0].message in run.stderr
        with pytest.raises(CourseError, match="exists already"):
            cpp.start_kernels(here, day)
    assert "[quantized_matmul.cpp, not built]" in map_text(here, syllabus)
    with pytest.raises(CourseError, match=r"quantized_matmul\.cpp is not built yet"):
        run_day(here, syllabus, days[0], [])
    with pytest.raises(CourseError, match=r"quantized_matmul\.cpp does not compile\nquantized_matmul\.cpp:"):
        cpp.build(here, syllabus)
    with pytest.raises(CourseError, match=r"day 1\.1 has no kernel in C\+\+"):
        cpp.start_kernels(here, syllabus.day("1.1"))
    assert len(set_aside(here, days[0])) == 1
    [flash] = cpp.own_kernels(here, syllabus)
    assert flash.name == "flash_attention"
    library = tmp_path / "_kernels.so"
    library.touch()
    assert cpp.build_of(here, flash) is cpp.Build.DONE
    os.utime(tmp_path / flash.file, ns=(0, library.stat().st_mtime_ns + 1))
    assert "[flash_attention.cpp, newer than your library]" in map_text(here, syllabus)
    findings = {finding.what: finding for finding in examine(here, syllabus)}
    assert not findings[flash.file].ok
    assert "pdm run build-kernels" in findings[flash.file].advice


def test_a_kernel_in_cpp_can_be_started_and_skipped(tmp_path: Path) -> None:
    begun = run(["start", "2.5", "--cpp"], tmp_path)
    for words in ("Attention in tiles", "You do not need", "FlashJob in ", "vec.h", "namespace", "absorb"):
        assert words in begun.stdout, begun.stderr
    assert (tmp_path / "flash_attention.cpp").read_text("utf-8").startswith("// 2.5.3: write absorb and ")
    assert "pdm run diff 2.5 --anyway" in run(["hint", "2.5.3", "3"], tmp_path).stdout
    assert "the reference's flash_attention.cpp runs" in run(["skip", "2.5.3"], tmp_path).stdout
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [
        tmp_path / ".backups" / "flash_attention.cpp.1.bak"
    ]
    assert run(["skip", "2.5.3"], tmp_path).stderr.startswith("error: flash_attention.cpp is not started: ")


@pytest.fixture
def written(tmp_path: Path) -> Repo:
    """The real course with a written kernel of day 2.4 and a library that is newer."""
    here = Repo.here().with_overlay(tmp_path)
    (tmp_path / "quantized_matmul.cpp").write_text("// written\n", "utf-8")
    (tmp_path / "_kernels.so").touch()
    os.utime(tmp_path / "quantized_matmul.cpp", ns=(0, 0))
    return here


def edit(repo: Repo) -> None:
    """Make the kernel newer than the library."""
    library = repo.overlay / "_kernels.so"
    os.utime(repo.overlay / "quantized_matmul.cpp", ns=(0, library.stat().st_mtime_ns + 1))


def test_an_outdated_library_is_refused_but_a_blank_kernel_is_not(written: Repo) -> None:
    syllabus = syllabus_of(written)
    cpp.refuse_outdated(written, syllabus)
    assert cpp.whose_kernels(written, syllabus) == [
        "compiled kernels: your quantized_matmul.cpp; all others are the reference's"
    ]
    cpp.start_kernels(written, syllabus.day("2.5"))
    os.utime(written.overlay / "_kernels.so", ns=(0, 1))
    os.utime(written.overlay / "quantized_matmul.cpp", ns=(0, 0))
    cpp.refuse_outdated(written, syllabus)  # flash_attention.cpp is blank: the reference's version runs
    assert cpp.whose_kernels(written, syllabus)[1] == (
        "your flash_attention.cpp is not built: the reference's version runs"
    )
    edit(written)
    with pytest.raises(
        CourseError, match=r"quantized_matmul\.cpp is newer than your library, which would run"
    ):
        cpp.refuse_outdated(written, syllabus)
    (written.overlay / "_kernels.so").unlink()
    cpp.refuse_outdated(written, syllabus)


@pytest.mark.parametrize("command", [["try", "2.4"], ["compare", "1.2"]])
def test_commands_refuse_an_outdated_library(written: Repo, command: list[str]) -> None:
    edit(written)
    refused = run(command, written.overlay)
    assert refused.returncode == 1
    assert "newer than your library" in refused.stderr
    assert refused.stdout == ""


def test_compare_measures_the_kernel_if_only_the_kernel_is_the_learners(written: Repo) -> None:
    day = syllabus_of(written).day("2.4")
    assert works_of(written, day) == [KERNEL_WORK]
    side = Measured(0.001, 0.001, 0.001, 0)
    text = as_text(written, day, Comparison(side, side, 0, 4, 0.0), KERNEL_WORK)
    assert "2.4.6 quantized_matmul.cpp: your kernel in C++ against the reference's" in text
    assert "your Python code" not in text
    start(written, day)
    assert works_of(written, day) == [WORK, KERNEL_WORK]
    edit(written)
    with pytest.raises(CourseError, match="not built yet"):
        works_of(written, day)


def test_compare_measures_python_if_the_kernel_is_blank(tmp_path: Path) -> None:
    here = Repo.here().with_overlay(tmp_path)
    day = syllabus_of(here).day("2.5")
    cpp.start_kernels(here, day)
    with pytest.raises(CourseError, match="not built yet"):
        works_of(here, day)
    start(here, day)
    assert works_of(here, day) == [WORK]


def test_progress_shows_a_kernel(written: Repo) -> None:
    syllabus = syllabus_of(written)
    [row] = [row for row in progress(written, syllabus) if row["day"] == "2.4"]
    assert row["kernels"] == {"2.4.6": "written"}
    assert not row["started"]
    assert "[-----x]" in progress_text(written, syllabus)
    remember(written, syllabus.day("2.4"), passed=True)
    [row] = [row for row in progress(written, syllabus) if row["day"] == "2.4"]
    assert (row["tests"], row["done"]) == ("only 2.4.6: passes", False)
    start(written, syllabus.day("2.4"))
    skip(written, syllabus.day("2.4"), syllabus.day("2.4").exercises)
    assert "[sssssx]" in progress_text(written, syllabus)


def test_a_passing_run_says_which_exercises_are_the_references(written: Repo) -> None:
    day = syllabus_of(written).day("2.4")
    says = "your 2.4.6 quantized_matmul.cpp passes. 2.4.1 to 2.4.5 are the reference's: pdm run start 2.4"
    assert testing._passes(written, day) == says
    start(written, day)
    assert testing._passes(written, day).startswith("day 2.4 passes.")


FAILING = Outcome(1, ("tests_refsol/test_week_2_day_4.py::test_task_6_groups",))


def test_a_failure_that_only_the_kernel_causes_is_blamed_on_its_file(
    written: Repo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests pass without the learner's library, and fail with it."""
    monkeypatch.setattr(blame.Trials, "_run", lambda self, exchanged: not cpp.libraries(exchanged))
    syllabus = syllabus_of(written)
    day = syllabus.day("2.4")
    found = find_blame(written, syllabus, day, FAILING)
    assert found.kernels == day.kernels
    line = str(first_to_fix(FAILING, day, found.kernels[0]))
    assert line.startswith("first: 2.4.6 quantized_matmul (1 of its test")
    testing._print_blame(written, syllabus, day, FAILING)
    assert "the cause is in" in (out := capsys.readouterr().out)
    assert "quantized_matmul.cpp: test_task_6_groups passes with the reference's compiled kernels" in out
    assert "quantize.py" not in out
    later = Outcome(1, ("tests_refsol/test_week_3_day_1.py::test_task_1_any",))
    assert find_blame(written, syllabus, syllabus.day("3.1"), later).kernels == day.kernels


def test_a_failure_with_the_references_kernels_is_not_blamed_on_the_kernel(
    written: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame.Trials, "_run", lambda self, exchanged: False)
    syllabus = syllabus_of(written)
    assert find_blame(written, syllabus, syllabus.day("2.4"), FAILING).kernels == ()


def test_a_crash_in_a_kernels_test_names_the_kernel(written: Repo) -> None:
    crashed = Outcome(-11, running="tests_refsol/test_week_2_day_4.py::test_task_6_groups")
    lines = signal_report(crashed, syllabus_of(written).day("2.4"))
    assert any("2.4.6 quantized_matmul.cpp" in line and "end of an array" in line for line in lines)


def test_a_build_shows_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [text for done in range(1, 41) for text in cpp._steps(f"[{done}/40] Building CXX object")]
    assert shown[0] == "step 4 of 40\n"
    assert shown[-1] == "step 40 of 40\n"
    assert len(shown) == 10
    assert not list(cpp._steps("-- Configuring done"))
    with pytest.raises(CourseError, match="the build failed\nFAILED: x"):
        cpp._run([sys.executable, "-c", "print('[1/2] a'); print('FAILED: x'); raise SystemExit(1)"])


PLAIN_MATMUL = """
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item % job.tiles(), first = item / job.tiles() * MatmulJob::ROW_BLOCK;
    const int64_t last = first + MatmulJob::ROW_BLOCK < job.M ? first + MatmulJob::ROW_BLOCK : job.M;
    const int64_t groups = job.K / GROUP, outputs = job.N - tile * TILE_OUTPUTS;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t o = 0; o < TILE_OUTPUTS && o < outputs; ++o) {
        float sum = 0;
        for (int64_t g = 0; g < groups; ++g) {
          const uint8_t* record = job.packed + (tile * groups + g) * record_bytes(job.bits, job.wide);
          const auto* narrow = reinterpret_cast<const uint16_t*>(record) + o;
          const auto* wide = reinterpret_cast<const float*>(record) + o;
          const float scale = job.wide ? wide[0] : load_first_as<Float16>(narrow, 1)[0];
          const float bias =
              job.wide ? wide[TILE_OUTPUTS] : load_first_as<Float16>(narrow + TILE_OUTPUTS, 1)[0];
          const uint8_t* quants = record + header_bytes(job.wide);
          int32_t products = 0;
          for (int k = 0; k < GROUP; ++k) {
            const int q = weight_quant(quants, job.bits, o, k);
            products += q * activation_quant(job, row, g, k);
          }
          const GroupScale& x = job.groups[place_of_group(row, g, groups)];
          sum += x.scale * (scale * static_cast<float>(products) + bias * x.sum);
        }
        job.out[row * job.N + tile * TILE_OUTPUTS + o] = sum;
      }
    }
  }"""


@pytest.mark.install
@pytest.mark.skipif(not tiny_llm_kernels.available(), reason="no C++ compiler")
@pytest.mark.deep  # compiles two libraries
def test_a_learners_kernel_replaces_that_of_the_reference(tmp_path: Path) -> None:
    """A plain solution is built into a separate library, and passes its day (about a minute)."""
    assert run(["start", "2.4", "--cpp"], tmp_path).returncode == 0
    replace(
        tmp_path / "quantized_matmul.cpp",
        f'\n#error "{syllabus_of(Repo.here()).exercise("2.4.6").message}"',
        PLAIN_MATMUL,
    )
    built = run(["build-kernels"], tmp_path)
    assert "instead of the reference's kernels" in built.stdout, built.stderr
    passing = run(["test", "2.4"], tmp_path)
    assert passing.returncode == 0, passing.stdout
    assert "compiled kernels: yours" in passing.stdout
    assert "your 2.4.6 quantized_matmul.cpp passes" in passing.stdout
    measured = json.loads(run(["compare", "2.4", "--json"], tmp_path).stdout)["kernel"]
    assert measured["own"]["seconds"] > 5 * measured["reference"]["seconds"]
    replace(tmp_path / "quantized_matmul.cpp", "products += q *", "products += 2 * q *")
    assert run(["test", "2.4"], tmp_path).returncode == 1  # the changed file is not built yet
    assert run(["build-kernels"], tmp_path).returncode == 0
    failing = run(["test", "2.4"], tmp_path)
    assert failing.returncode == 1
    assert "first: 2.4.6 quantized_matmul" in failing.stdout
    assert "quantized_matmul.cpp: test_task_6_the_kernel_is_close" in failing.stdout
