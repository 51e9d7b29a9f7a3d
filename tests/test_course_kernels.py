"""Kernels in C++: their starters are blank, and they are built into a library that the engine then uses."""

import os
from pathlib import Path

import pytest

import tiny_llm_kernels
from tiny_llm_course import cpp
from tiny_llm_course.doctor import examine
from tiny_llm_course.errors import CourseError
from tiny_llm_course.overview import map_text
from tiny_llm_course.repo import Repo
from tiny_llm_course.starter import set_aside
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
    assert [file.name for file in tmp_path.iterdir()] == ["flash_attention.cpp.1.bak"]
    assert run(["skip", "2.5.3"], tmp_path).stderr.startswith("error: flash_attention.cpp is not started: ")


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
def test_a_learners_kernel_replaces_the_references(tmp_path: Path) -> None:
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
    replace(tmp_path / "quantized_matmul.cpp", "products += q *", "products += 2 * q *")
    assert run(["test", "2.4"], tmp_path).returncode == 1  # the changed file is not built yet
    assert run(["build-kernels"], tmp_path).returncode == 0
    failing = run(["test", "2.4"], tmp_path)
    assert failing.returncode == 1
    assert "first: 2.4.6 quantized_matmul" in failing.stdout
