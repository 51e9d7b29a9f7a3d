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
    "beams": ["--prompt-len", "20", "--output-len", "4"],
    "slots": ["--tokens", "64", "--sequences", "3", "--repetitions", "1"],
    "sparse": ["--longest", "512", "--num-heads", "2", "--head-dim", "8", "--repetitions", "1"],
    "prefix": ["--users", "2", "--prompt-len", "32", "--crowd", "5", "--system-prompt", "100"],
    "summary": ["--caches", "4", "--max-seq-len", "1024", "--common", "40", "--turnover", "200"],
    "window": ["--model", "smollm2", "--longest", "1024", "--repetitions", "1"],
    "pressure": ["--users", "3", "--prompt-len", "24", "--output-len", "8"],
}
RUN_THE_MODEL = ("trap", "beams", "prefix", "window", "pressure")
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
        if name in RUN_THE_MODEL and not tiny_llm_kernels.available():
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
        assert str(found["settings"][option.strip("-").replace("-", "_")]) == value
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
    message = "2.2.1 NaiveKVCache.append: pdm run hint 2.2.1"
    (tmp_path / "naive_cache.py").write_text(
        f"def blank():\n    raise NotImplementedError('{message}')\n\n\nblank()\n", encoding="utf-8"
    )
    environment = {**os.environ, "TINY_LLM_OVERLAY": str(tmp_path)}
    command = [sys.executable, str(LABS / "main.py"), "naive"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'naive_cache.py'}, line 2: {message}"]


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


def test_beams_share_at_least_the_prompt_and_copy_where_they_part(lab: Labs) -> None:
    """20 tokens fill one block of 16, and 3 more never fill the second: nobody can share more or less.

    While the first of the 4 tokens is found one beam is in 2 blocks; then three times each beam is.
    """
    for row in lab("beams").rows(0):
        width = row["width"]
        saved = 3 * (width - 1) / (2 + 3 * width * 2)
        assert row["least"] == row["most"] == pytest.approx(saved)
        assert row["saved"] == {"predicted": pytest.approx(saved), "measured": pytest.approx(saved)}
        assert row["copies"]["predicted"] == row["copies"]["measured"]
        assert width - 1 <= row["copies"]["measured"] <= 3 * (width - 1)


def test_beams_are_the_same_without_sharing_and_cost_every_token_again(lab: Labs) -> None:
    """Four beams after 20 tokens, 4 more: all of them again each time, or those of the last block."""
    inside, cached, plain = lab("beams").rows(1)
    assert [row["equal"] for row in (inside, cached, plain)] == [{"predicted": 4, "measured": 4}] * 3
    tokens = (20 + 4 * 3, 20 + 4 * (5 + 6 + 7), 20 + 4 * (21 + 22 + 23))
    for row, count in zip((inside, cached, plain), tokens, strict=True):
        assert row["computed"] == {"predicted": count, "measured": count}


def test_slots_are_worked_out_as_arrays_have_them(lab: Labs) -> None:
    """Token 25 of blocks 23, 64, 87: the tenth of block 64, behind 64 blocks of 16, or of 16 pairs."""
    slots = [row["slot"] for row in lab("slots").rows(0)]
    expected = [64 * 16 + 9, (64 * 16 + 9) * 2, (64 * 16 + 9) * 2 + 1, 64 * 16 + 9]
    assert expected[1] == 2066
    assert slots == [{"predicted": slot, "measured": slot} for slot in expected]


def test_slots_gather_what_reading_token_by_token_does(lab: Labs) -> None:
    rows = lab("slots").rows(1)
    assert [row["tokens"] for row in rows] == [8, 16, 32, 64]
    assert all(row["equal"] == {"predicted": row["tokens"], "measured": row["tokens"]} for row in rows)


def test_sparse_reads_the_tokens_of_the_last_blocks_and_none_behind(lab: Labs) -> None:
    """Oracle: the positions up to the token whose block is one of the last four, with 64 bytes each."""
    rows = lab("sparse").rows(0)
    assert [row["position"] for row in rows] == [63, 127, 255, 500, 511]
    for row in rows:
        at = row["position"]
        read = sum(at // 16 - 4 < position // 16 for position in range(at + 1))
        assert row["full"] == {"predicted": at + 1, "measured": at + 1}
        assert row["window"] == {"predicted": read, "measured": read}
        assert row["bytes"] == {"predicted": 64 * read, "measured": 64 * read}
    assert rows[3]["window"]["measured"] == 53


def test_sparse_counts_causal_pairs_alone(lab: Labs) -> None:
    """Oracle: all pairs of 8 blocks, those kept that do not look ahead, nor further back than 3."""
    full, window = lab("sparse").rows(1)
    pairs = [(query, read) for query in range(8) for read in range(8) if read <= query]
    near = [(query, read) for query, read in pairs if query - read < 3]
    assert (len(pairs), len(near)) == (36, 21)
    assert full["pairs"] == {"predicted": len(pairs), "measured": len(pairs)}
    assert window["pairs"] == {"predicted": len(near), "measured": len(near)}
    assert window["saved"]["measured"] == pytest.approx(1 - 21 / 36)


def test_prefix_computes_and_stores_what_is_shared_once(lab: Labs) -> None:
    """Two prompts of 32 tokens with 0, 16 and 31 in common: of 31, 16 are a block, and 15 are copied."""
    rows = lab("prefix").rows(0)
    assert [(row["share"], row["cache"]) for row in rows] == [
        (share, cache) for share in (0, 50, 99) for cache in ("off", "on")
    ]
    assert [row["computed"]["measured"] for row in rows] == [64, 64, 64, 64 - 16, 64, 64 - 31]
    assert [row["blocks"]["measured"] for row in rows] == [4, 4, 4, 3, 4, 3]
    for row in rows:
        assert row["computed"]["predicted"] == row["computed"]["measured"]
        assert row["blocks"]["predicted"] == row["blocks"]["measured"]


def test_prefix_counts_the_pages_of_a_crowd(lab: Labs) -> None:
    """Oracle: the lengths drawn here once more; 100 tokens fill 6 blocks, 12 fill 3 of 4."""
    three, three_shared, five, five_shared = lab("prefix").rows(1)
    assert three["blocks"] == {"predicted": 4 + 5 + 5, "measured": 4 + 5 + 5}
    assert three_shared["blocks"] == {"predicted": 3 + 1 + 2 + 2, "measured": 3 + 1 + 2 + 2}
    assert three_shared["saved"]["measured"] == pytest.approx(1 - 8 / 14)
    draw = random.Random(0)
    blocks = [(draw.randint(101, 200) + 15) // 16 for _ in range(5)]
    assert five["prefix"]["measured"] == 5 * 6
    assert five["blocks"]["measured"] == sum(blocks)
    assert five_shared["prefix"]["measured"] == 6
    assert five_shared["blocks"]["measured"] == sum(blocks) - 4 * 6


def test_prefix_lets_in_as_many_users_as_have_pages(lab: Labs) -> None:
    """Oracle: pages handed out user by user, of 2,048; a prompt and one token more, 6 blocks in common."""
    draw = random.Random(0)
    needed = [-(-(draw.randint(101, 500) + 1) // 16) for _ in range(327)]

    def fitting(blocks: list[int], room: int) -> int:
        users = 0
        while blocks[users] <= room:
            room -= blocks[users]
            users += 1
        return users

    counts = [16, fitting(needed, 2048), fitting([blocks - 6 for blocks in needed], 2048 - 6)]
    assert counts[1] > 64
    found = [row["users"] for row in lab("prefix").rows(2)]
    assert found == [{"predicted": count, "measured": count} for count in counts]


def test_summary_holds_what_each_design_says_and_pages_hold_more_users(lab: Labs) -> None:
    """4,096 tokens of room. The lengths 100 to 500 need 19.3 blocks on average, 17.3 with 2 in common."""
    contiguous, side_by_side, anywhere, pages, shared = lab("summary").rows(0)
    assert contiguous["users"] == {"predicted": 4, "measured": 4}
    assert contiguous["waste"]["predicted"] == pytest.approx(1 - 300 / 1024)
    assert contiguous["waste"]["measured"] == pytest.approx(1 - 300 / 1024, abs=0.05)
    for key in ("waste", "in_use", "users"):
        assert anywhere[key] == pages[key]
    blocks = [-(-length // 16) for length in range(100, 501)]
    mean, square = sum(blocks) / 401, sum(size * size for size in blocks) / 401
    assert pages["waste"]["predicted"] == pytest.approx(1 - 300 / (16 * mean))
    assert pages["users"]["predicted"] == pytest.approx((256 - square / mean / 2 + 0.5) / mean)
    for row in (pages, shared):
        assert row["waste"]["measured"] == pytest.approx(row["waste"]["predicted"], abs=0.01)
        assert row["users"]["measured"] == pytest.approx(row["users"]["predicted"], rel=0.15)
    assert contiguous["users"]["measured"] < side_by_side["users"] < pages["users"]["measured"]
    assert pages["users"]["measured"] < shared["users"]["measured"]


def test_window_reads_and_holds_what_each_layer_sees(lab: Labs) -> None:
    """Oracle: by hand: of SmolLM2's 30 layers five see all, 25 see 512 tokens; 768 bytes a token and layer.

    Six groups of five layers: 512 tokens are 32 blocks in each; of 1,024 a window needs as many.
    """
    layers = {512: 30 * 512, 1024: 5 * 1024 + 25 * 512}
    for row, (context, tokens) in zip(lab("window").rows(0), layers.items(), strict=True):
        assert row["context"] == context
        assert row["all_bytes"] == 30 * context * 768
        assert row["window_bytes"] == {"predicted": tokens * 768, "measured": tokens * 768}
    short, long = lab("window").rows(1)
    assert (short["all_blocks"], long["all_blocks"]) == (32, 64)
    assert short["window_blocks"] == short["most_blocks"] == {"predicted": 6 * 32, "measured": 6 * 32}
    assert long["window_blocks"] == {"predicted": 64 + 5 * 32, "measured": 64 + 5 * 32}
    assert long["most_blocks"] == {"predicted": 6 * 64, "measured": 6 * 64}
    assert (short["all_held"], long["all_held"]) == (32 * 16 * 30 * 768, 64 * 16 * 30 * 768)
    assert long["window_held"] == 224 * 16 * 5 * 768
    assert long["saved"] == pytest.approx(1 - 224 / 384)


def test_window_counts_causal_pairs_and_says_where_other_counts_come_from(lab: Labs) -> None:
    """Oracle: all pairs of 8 blocks, those kept that do not look ahead, nor further back than 3."""
    full, window = lab("window").rows(2)
    pairs = [(query, read) for query in range(8) for read in range(query + 1)]
    near = [(query, read) for query, read in pairs if query - read < 3]
    assert full["pairs"] == {"predicted": len(pairs), "measured": len(pairs)}
    assert window["pairs"] == {"predicted": len(near), "measured": len(near)}
    assert window["saved"]["measured"] == pytest.approx(1 - 21 / 36)
    assert (full["rectangle"], window["rectangle"], window["rectangle_saved"]) == (64, 24, 0.625)
