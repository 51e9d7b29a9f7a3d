"""The labs: each runs, sets predictions beside what it measured, and counts what plain arithmetic counts."""

import contextlib
import io
import json
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tiny_llm_kernels

LABS = Path(__file__).parents[1] / "labs"
SMALL = {
    "trap": ["--longest", "16", "--repetitions", "1"],
    "naive": ["--users", "3", "--num-heads", "2", "--head-dim", "8"],
    "dynamic": ["--pool", "160", "--requests", "400", "--seeds", "1"],
    "paged": ["--users", "2", "--seeds", "20"],
}
Run = Callable[[list[str]], int]


class Ran(NamedTuple):
    """What a lab printed as JSON, and its picture; None without matplotlib."""

    found: dict[str, Any]
    picture: Path | None

    def rows(self, table: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.found["tables"][table]["rows"]
        return rows


Labs = Callable[[str], Ran]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """The labs' door; it finds its neighbours by name, as in `python labs/main.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LABS))
        yield runpy.run_path(str(LABS / "main.py"))["run"]


@pytest.fixture(scope="module")
def lab(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Labs:
    """A lab by name, run once with small settings."""
    folder = tmp_path_factory.mktemp("pictures")

    @cache
    def ran(name: str) -> Ran:
        if name == "trap" and not tiny_llm_kernels.available():
            pytest.skip(f"the model would take long: {tiny_llm_kernels.why_unavailable()}")
        picture = folder / f"{name}.svg" if find_spec("matplotlib") else None
        plot = [] if picture is None else ["--plot", str(picture)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run([name, *SMALL[name], "--json", *plot]) == 0
        return Ran(json.loads(printed.getvalue()), picture)

    return ran


# ---- the frame ----


def test_without_a_name_the_labs_are_listed_by_day(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    told = capsys.readouterr().out.partition("belongs to:")[2]
    listed = [line.split() for line in told.splitlines() if line]
    assert [words[0] for words in listed] == list(SMALL)
    assert all(earlier[1] <= later[1] for earlier, later in pairwise(listed))


def test_an_unknown_name_is_refused_with_the_nearest(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trpa"]) == 2
    refused = capsys.readouterr().err
    assert "no lab 'trpa'" in refused
    assert "did you mean trap?" in refused


@pytest.mark.parametrize("name", SMALL)
def test_help_says_what_a_lab_does_and_which_options_it_has(
    run: Run, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    words = capsys.readouterr().out.split()
    assert {"--json", "--plot", *SMALL[name][::2]} <= set(words)
    assert f"pdm run lab {name}" in " ".join(words)


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--users", "0"], 2, "--users"),
        (["--longest", "99"], 2, "--longest 99"),
        (["--plot", "picture.pdf"], 1, "picture.pdf"),
        (["--plot", "/no/such/folder/a.svg"], 1, "/no/such/folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    run: Run, options: list[str], code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["naive", *options]) == code
    [refused] = capsys.readouterr().err.splitlines()
    assert refused.startswith("error: ")
    assert named in refused


@pytest.mark.parametrize("name", SMALL)
def test_a_lab_says_what_it_predicted_measured_and_ran_on(lab: Labs, name: str) -> None:
    found = lab(name).found
    assert found["lab"] == name
    assert {"day", "title", "asks", "conclusion", "settings", "machine", "your_modules"} <= found.keys()
    for option, value in zip(SMALL[name][::2], SMALL[name][1::2], strict=True):
        assert found["settings"][option.strip("-").replace("-", "_")] == int(value)
    for table in found["tables"]:
        pairs = [cell for row in table["rows"] for cell in row.values() if isinstance(cell, dict)]
        assert len(pairs) >= len(table["rows"]) > 0
        assert all(pair.keys() == {"predicted", "measured"} for pair in pairs)


@pytest.mark.parametrize("name", SMALL)
def test_a_lab_draws_its_picture(lab: Labs, name: str) -> None:
    pytest.importorskip("matplotlib")
    picture = lab(name).picture
    assert picture is not None
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")
    assert "<svg" in drawn


def test_the_suffix_chooses_the_format(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(["naive", *SMALL["naive"], "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_has_predictions_beside_measurements(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["naive", *SMALL["naive"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    [row] = [line.split() for line in lines if line.strip().startswith("2,048")]
    assert row[:6] == ["2,048", "384", "KiB", "384", "KiB", "85.4%"]


def test_a_learners_blank_is_one_line_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "naive_cache.py").write_text(
        "def blank():\n    raise NotImplementedError('2.2.1 is blank')\n\n\nblank()\n", encoding="utf-8"
    )
    environment = {**os.environ, "TINY_LLM_OVERLAY": str(tmp_path)}
    command = [sys.executable, str(LABS / "main.py"), "naive"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'naive_cache.py'}, line 2: 2.2.1 is blank"]


# ---- what they count ----


def test_trap_counts_every_key_that_is_computed(lab: Labs) -> None:
    """Oracle: the sum, written out: the prompt, then it and all tokens so far, for each of a hundred."""
    without, kept = (row["keys"] for row in lab("trap").rows(0))
    assert without == {"predicted": 17_978, "measured": 17_978}
    assert 128 + sum(range(129, 229)) == 17_978
    assert kept == {"predicted": 228, "measured": 228}


def test_trap_predicts_times_from_the_keys_of_the_timed_tokens(lab: Labs) -> None:
    [row] = lab("trap").rows(1)
    assert (row["length"], row["ratio"]["predicted"]) == (16, 16)
    assert row["ratio"]["measured"] == pytest.approx(row["recomputing_ms"] / row["cached_ms"])


def test_naive_takes_what_the_shape_says_and_uses_what_the_lengths_say(lab: Labs) -> None:
    """Oracle: two arrays of bfloat16; the lengths are drawn here once more."""
    token, draw = 2 * 2 * 8 * 2, random.Random(0)
    lengths = [draw.randint(100, 500) for _ in range(3)]
    per_token, said, live, used = (row["bytes"] for row in lab("naive").rows(0))
    assert per_token == {"predicted": token, "measured": token}
    assert said == {"predicted": 3 * 2048 * token, "measured": 3 * 2048 * token}
    assert live["measured"] >= 3 * 2048 * token
    assert used == {"predicted": 3 * 300 * token, "measured": sum(lengths) * token}
    for row in lab("naive").rows(1):
        room = row["max_seq_len"]
        assert row["waste"]["predicted"] == pytest.approx(1 - 300 / room)
        assert row["waste"]["measured"] == pytest.approx(1 - sum(lengths) / 3 / room)


def test_dynamic_refuses_for_want_of_a_run_and_never_for_want_of_a_place(lab: Labs) -> None:
    rows = lab("dynamic").rows(1)
    assert all(row["refused_anywhere"] == {"predicted": 0, "measured": 0} for row in rows)
    assert rows[-1]["refused"] > 0.1
    assert all(row["requests"] >= 30 for row in rows)


def test_dynamic_rounds_every_user_up_to_whole_blocks(lab: Labs) -> None:
    [row] = lab("dynamic").rows(0)
    draw = random.Random(0)
    lengths = [draw.randint(100, 500) for _ in range(100)]
    assert row["taken"]["measured"] == sum(length + -length % 16 for length in lengths)
    assert row["waste"]["predicted"] == pytest.approx(7.5 / 307.5)


def test_paged_wastes_about_half_a_block_a_request(lab: Labs) -> None:
    """Two users give a rough mean; a block of one token wastes nothing."""
    rows = {row["block_size"]: row for row in lab("paged").rows(0)}
    assert rows[1]["chat"] == {"predicted": 0, "measured": 0}
    for block_size in (8, 16, 32):
        waste = rows[block_size]["chat"]
        assert waste["measured"] == pytest.approx(waste["predicted"], rel=0.4)
    assert rows[16]["chat"]["measured"] < rows[32]["chat"]["measured"] < 0.05


def test_paged_refuses_exactly_where_too_few_blocks_are_free(lab: Labs) -> None:
    enough, fewer = lab("paged").rows(1)
    assert enough["refused"] == {"predicted": 0, "measured": 0}
    assert fewer["refused"]["measured"] == fewer["pools"]
    assert enough["pools"] + fewer["pools"] == 20
    assert 0 < enough["no_run"] <= enough["pools"]
