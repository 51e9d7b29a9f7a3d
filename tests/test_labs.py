"""The labs: each runs, reports predictions and measurements, and counts what plain arithmetic predicts."""

import contextlib
import importlib
import io
import json
import math
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
    "weights": [],
    "sampling": ["--draws", "400"],
    "trap": ["--longest", "16", "--repetitions", "1"],
    "naive": ["--users", "3", "--num-heads", "2", "--head-dim", "8"],
    "dynamic": ["--pool", "160", "--requests", "400", "--seeds", "1"],
    "roofline": ["--layers", "2", "--longest", "8", "--repetitions", "1"],
    "budget": ["--prompt-len", "150", "--others", "2"],
    "batching": ["--requests", "5", "--slots", "2", "--output-len", "16"],
    "paged": ["--users", "2", "--seeds", "20"],
    "beams": ["--prompt-len", "20", "--output-len", "4"],
    "slots": ["--tokens", "64", "--sequences", "3", "--repetitions", "1"],
    "sparse": ["--longest", "512", "--num-heads", "2", "--head-dim", "8", "--repetitions", "1"],
    "prefix": [
        *("--users", "2", "--prompt-len", "32", "--crowd", "5", "--system-prompt", "100"),
        *("--repetitions", "2"),
    ],
    "summary": ["--caches", "4", "--max-seq-len", "1024", "--common", "40", "--turnover", "200"],
    "window": ["--model", "smollm2", "--longest", "1024", "--repetitions", "1"],
    "pressure": ["--users", "3", "--prompt-len", "24", "--output-len", "8"],
}
RUN_THE_MODEL = (
    "weights",
    "sampling",
    "trap",
    "roofline",
    "budget",
    "batching",
    "beams",
    "prefix",
    "window",
    "pressure",
)
Run = Callable[[list[str]], int]


class Ran(NamedTuple):
    """A lab's JSON output, and its picture; None without matplotlib."""

    found: dict[str, Any]
    picture: Path | None

    def rows(self, table: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.found["tables"][table]["rows"]
        return rows


Labs = Callable[[str], Ran]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """The function `run` of labs/main.py, with labs/ on the path as in `python labs/main.py`."""
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
            pytest.skip(f"the model would be slow: {tiny_llm_kernels.why_unavailable()}")
        picture = folder / f"{name}.svg" if find_spec("matplotlib") else None
        plot = [] if picture is None else ["--plot", str(picture)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run([name, *SMALL[name], "--json", *plot]) == 0
        return Ran(json.loads(printed.getvalue()), picture)

    return ran


# ---- the command ----


def test_without_a_name_the_labs_are_listed_by_day(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    shown = capsys.readouterr().out.partition("each with its course day:")[2]
    listed = [line.split() for line in shown.splitlines() if line]
    assert [words[0] for words in listed] == list(SMALL)
    assert all(earlier[1] <= later[1] for earlier, later in pairwise(listed))


def test_an_unknown_name_is_an_error_with_a_suggestion(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trpa"]) == 2
    error = capsys.readouterr().err
    assert "no lab 'trpa'" in error
    assert "did you mean trap?" in error


@pytest.mark.parametrize("name", SMALL)
def test_help_describes_a_lab_and_its_options(
    run: Run, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    out = capsys.readouterr().out
    words = out.split()
    assert "range>" not in out
    assert "x>=" not in out
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
def test_an_invalid_option_is_an_error_of_one_line(
    run: Run, options: list[str], code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["naive", *options]) == code
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert named in error


@pytest.mark.parametrize("name", SMALL)
def test_a_lab_reports_predictions_measurements_and_its_setup(lab: Labs, name: str) -> None:
    found = lab(name).found
    assert found["lab"] == name
    assert {"day", "title", "question", "conclusion", "settings", "machine", "your_modules"} <= found.keys()
    for option, value in zip(SMALL[name][::2], SMALL[name][1::2], strict=True):
        assert str(found["settings"][option.strip("-").replace("-", "_")]) == value
    for table in found["tables"]:
        pairs = [cell for row in table["rows"] for cell in row.values() if isinstance(cell, dict)]
        assert len(pairs) >= len(table["rows"]) > 0
        assert all(pair.keys() == {"predicted", "measured"} for pair in pairs)


@pytest.mark.parametrize("name", SMALL)
def test_a_lab_draws_a_picture(lab: Labs, name: str) -> None:
    pytest.importorskip("matplotlib")
    picture = lab(name).picture
    assert picture is not None
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")
    assert "<svg" in drawn


def test_the_file_suffix_selects_the_picture_format(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(["naive", *SMALL["naive"], "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_show_predictions_next_to_measurements(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["naive", *SMALL["naive"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    [row] = [line.split() for line in lines if line.strip().startswith("2,048")]
    assert row[:6] == ["2,048", "384", "KiB", "384", "KiB", "85.4%"]


def test_an_unwritten_exercise_is_an_error_of_one_line_with_its_place(tmp_path: Path) -> None:
    message = "2.2.1 NaiveKVCache.append: pdm run hint 2.2.1"
    (tmp_path / "naive_cache.py").write_text(
        f"def blank():\n    raise NotImplementedError('{message}')\n\n\nblank()\n", encoding="utf-8"
    )
    environment = {**os.environ, "TINY_LLM_OVERLAY": str(tmp_path)}
    command = [sys.executable, str(LABS / "main.py"), "naive"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'naive_cache.py'}, line 2: still blank: {message}"
    ]


# ---- the counts ----


def test_the_weights_lab_accounts_for_every_byte_of_the_embedded_model(lab: Labs) -> None:
    """Oracle: by hand. Of 32 numbers, Q4_1 makes 20 bytes; Q8_0 makes 34 in the file and 36 in memory.

    SmolLM2-135M has 49,152 tokens, vectors of 576, 30 layers, and rotary frequencies for 32 pairs.
    """
    attention, mlp = 576 * (576 + 192 + 192 + 576), 3 * 576 * 1536
    rows = {row["kind"]: row for row in lab("weights").rows(0)}
    assert sum(row["count"] for row in rows.values()) == 30 * 9 + 2
    assert rows["mlp.up_proj"]["bytes"] == {"predicted": 30 * 1536 * 18 * 20, "measured": 30 * 1536 * 18 * 20}
    for row in (*rows.values(), lab("weights").rows(1)[1], *lab("weights").rows(2)):
        assert row["bytes"]["predicted"] == row["bytes"]["measured"]
    header, tensors = lab("weights").rows(1)
    assert tensors["bytes"]["measured"] == 49152 * 18 * 34 + 30 * (attention + mlp) // 32 * 20 + 61 * 576 * 4
    assert 0.95 < header["bytes"]["predicted"] / header["bytes"]["measured"] < 1
    parts = {row["part"]: row for row in lab("weights").rows(2)}
    assert parts["embedding, also the output"]["bytes"]["measured"] == 49152 * 18 * 36
    assert parts["rotary frequencies"]["bytes"]["measured"] == 128
    assert parts["all"]["parameters"] == 49152 * 576 + 30 * (attention + mlp) + 61 * 576


def test_the_sampling_lab_counts_what_the_filters_keep(lab: Labs) -> None:
    """Oracle: NumPy in float64. In float32 a sum of thousands of probabilities can be off by a few tokens."""
    filters, temperatures, draws = (lab("sampling").rows(place) for place in range(3))
    peaked, open_ = filters[0]["top_p"], filters[-1]["top_p"]
    assert peaked["measured"] < 40 < open_["measured"]
    for pair in [row[key] for row in filters for key in ("top_p", "min_p")]:
        assert pair["measured"] == pytest.approx(pair["predicted"], rel=0.02)
    for row in temperatures:
        counts = [row[key]["measured"] for key in ("0.5", "0.7", "1.3")]
        assert counts == sorted(counts)
    assert sum(row["share"]["predicted"] for row in draws) == pytest.approx(1)
    assert sum(row["share"]["measured"] for row in draws) == pytest.approx(1)
    assert all(abs(row["share"]["measured"] - row["share"]["predicted"]) < 0.1 for row in draws)


def test_the_sampling_lab_lists_the_likeliest_tokens_and_groups_the_others(lab: Labs) -> None:
    """Oracle: at temperature 1 the listed tokens and the groups have the shares of the first table."""
    for row, prompt in zip(lab("sampling").rows(0), lab("sampling").found["data"]["prompts"], strict=True):
        weights = [math.exp(logit) for _, _, logit in prompt["likeliest"]]
        others = [count * math.exp(logit) for logit, count in prompt["tail"]]
        assert weights == sorted(weights, reverse=True)
        assert weights[0] / (sum(weights) + sum(others)) == pytest.approx(row["largest"], rel=1e-3)
        assert sum(weights) / (sum(weights) + sum(others)) == pytest.approx(row["forty"], rel=1e-3)
        assert len(weights) + sum(count for _, count in prompt["tail"]) == prompt["vocabulary"] == 49_152


def test_the_trap_lab_counts_every_key_that_is_computed(lab: Labs) -> None:
    """Oracle: the sum of the text's length over all passes: 128 tokens, then 129, ... for 100 tokens."""
    without, cached = (row["keys"] for row in lab("trap").rows(0))
    assert without == {"predicted": 17_978, "measured": 17_978}
    assert 128 + sum(range(129, 229)) == 17_978
    assert cached == {"predicted": 228, "measured": 228}


def test_the_trap_lab_predicts_the_ratio_of_times_from_the_number_of_computed_keys(lab: Labs) -> None:
    [row] = lab("trap").rows(1)
    assert (row["length"], row["ratio"]["predicted"]) == (16, 16)
    assert row["ratio"]["measured"] == pytest.approx(row["recomputing_ms"] / row["cached_ms"])


def test_the_naive_lab_allocates_memory_by_shape_and_uses_it_by_length(lab: Labs) -> None:
    """Oracle: two arrays of bfloat16; the lengths are drawn again here."""
    token, draw = 2 * 2 * 8 * 2, random.Random(0)
    lengths = [draw.randint(100, 500) for _ in range(3)]
    per_token, reported, active, used = (row["bytes"] for row in lab("naive").rows(0))
    assert per_token == {"predicted": token, "measured": token}
    assert reported == {"predicted": 3 * 2048 * token, "measured": 3 * 2048 * token}
    assert active["measured"] >= 3 * 2048 * token
    assert used == {"predicted": 3 * 300 * token, "measured": sum(lengths) * token}
    for row in lab("naive").rows(1):
        capacity = row["max_seq_len"]
        assert row["waste"]["predicted"] == pytest.approx(1 - 300 / capacity)
        assert row["waste"]["measured"] == pytest.approx(1 - sum(lengths) / 3 / capacity)


def test_the_dynamic_lab_refuses_requests_only_if_blocks_must_be_contiguous(lab: Labs) -> None:
    rows = lab("dynamic").rows(1)
    assert all(row["refused_anywhere"] == {"predicted": 0, "measured": 0} for row in rows)
    assert rows[-1]["refused"] > 0.1
    assert all(row["requests"] >= 30 for row in rows)


def test_the_dynamic_lab_rounds_the_memory_of_every_user_up_to_whole_blocks(lab: Labs) -> None:
    [row] = lab("dynamic").rows(0)
    draw = random.Random(0)
    lengths = [draw.randint(100, 500) for _ in range(100)]
    assert row["allocated"]["measured"] == sum(length + -length % 16 for length in lengths)
    assert row["waste"]["predicted"] == pytest.approx(7.5 / 307.5)


def test_the_roofline_lab_predicts_the_longer_of_reading_and_arithmetic(lab: Labs) -> None:
    """Oracle: two layers of SmolLM2's four matrices; a group of 32 has 32 bits of scale and bias."""
    weights = 2 * (576 * 960 + 576 * 576 + 576 * 3072 + 1536 * 576)
    limits, passes = lab("roofline").rows(0), lab("roofline").rows(1)
    assert [(row["weights"], row["bits"]) for row in limits] == [("8 bits", 9), ("4 bits", 5)]
    assert [row["tokens"] for row in passes] == [1, 2, 4, 8]
    for limit, key in zip(limits, ("eight_ms", "four_ms"), strict=True):
        assert limit["bytes"] == limit["bits"] * weights / 8
        reading = limit["bytes"] / limit["bandwidth"] / 1e6
        arithmetic = 2 * weights / limit["peak"] / 1e6
        assert limit["tokens"]["predicted"] == pytest.approx(reading / arithmetic)
        for row in passes:
            assert row[key]["predicted"] == pytest.approx(max(reading, row["tokens"] * arithmetic))
    for row in passes:
        ratio = row["eight_ms"]["measured"] / row["four_ms"]["measured"]
        assert row["ratio"]["measured"] == pytest.approx(ratio)


def test_the_budget_lab_computes_a_long_prompt_in_as_few_steps_as_the_budget_allows(lab: Labs) -> None:
    """Two others take a token of each step: 150 tokens at 62 per step are 3 steps, at 126 per step 2."""
    rows = lab("budget").rows(0)
    assert [row["budget"] for row in rows] == [64, 128, 256]
    assert [row["steps"] for row in rows] == [{"predicted": n, "measured": n} for n in (3, 2, 1)]
    assert all(row["mean_wait_ms"] <= row["longest_wait_ms"]["measured"] for row in rows)


def test_the_batching_lab_predicts_the_steps_of_each_way_from_the_lengths_of_the_answers(lab: Labs) -> None:
    """Oracle: the answers, drawn again here, and a loop that serves them step by step."""
    draw = random.Random(0)
    lengths = [draw.randint(8, 32) for _ in range(5)]
    for _ in range(sum(lengths)):
        draw.randrange(1000, 40_000)
    answers = [round(16 * (1 / 16) ** draw.random()) for _ in range(5)]
    alone, fixed, continuous = (row["steps"] for row in lab("batching").rows(0))
    pairs = [answers[0:2], answers[2:4], answers[4:5]]
    waiting, running, steps = list(answers), list[int](), 0
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(waiting.pop(0))
        steps += 1
        running = [left - 1 for left in running if left > 1]
    assert alone == {"predicted": sum(answers), "measured": sum(answers)}
    assert fixed == {"predicted": sum(map(max, pairs)), "measured": sum(map(max, pairs))}
    assert continuous == {"predicted": steps, "measured": steps}
    assert all(
        row["used"]["predicted"] == pytest.approx(row["used"]["measured"]) for row in lab("batching").rows(0)
    )


def test_the_batching_lab_says_why_a_speed_is_far_lower_than_predicted(run: Run) -> None:
    """Oracle: by hand: 120 tokens/s instead of 240 is a factor of 2; 200 is 1.2, less than 1.5.

    The cause is the one in the lab's help; a busy machine comes second.
    """
    lab_batching = importlib.import_module("lab_batching")
    pair, cause = lab_batching.Pair, "does not include what the attention of each further sequence costs"
    missed = lab_batching._missed([pair(60, 60), pair(240, 120)])
    assert f"2.0 times lower than predicted: the line {cause}" in missed
    assert missed.index(cause) < missed.index("busy machine")
    assert cause in " ".join(lab_batching.__doc__.replace("\nfurther", " further").split())
    assert not lab_batching._missed([pair(60, 60), pair(240, 200)])


def test_the_paged_lab_wastes_about_half_a_block_per_request(lab: Labs) -> None:
    """Two users give a rough mean; blocks of one token waste nothing."""
    rows = {row["block_size"]: row for row in lab("paged").rows(0)}
    assert rows[1]["chat"] == {"predicted": 0, "measured": 0}
    for block_size in (8, 16, 32):
        waste = rows[block_size]["chat"]
        assert waste["measured"] == pytest.approx(waste["predicted"], rel=0.4)
    assert rows[16]["chat"]["measured"] < rows[32]["chat"]["measured"] < 0.05


def test_the_paged_lab_refuses_a_request_only_if_too_few_blocks_are_free(lab: Labs) -> None:
    enough, fewer = lab("paged").rows(1)
    assert enough["refused"] == {"predicted": 0, "measured": 0}
    assert fewer["refused"]["measured"] == fewer["pools"]
    assert enough["pools"] + fewer["pools"] == 20
    assert 0 < enough["no_run"] <= enough["pools"]


def test_beams_share_the_prompts_full_blocks_and_copy_where_they_diverge(lab: Labs) -> None:
    """20 tokens fill one block of 16, and 3 more do not fill the second, so exactly one block is shared.

    In the prefill step one beam is in 2 blocks; in each of the 3 later steps every beam is in 2 blocks.
    """
    for row in lab("beams").rows(0):
        width = row["width"]
        saved = 3 * (width - 1) / (2 + 3 * width * 2)
        assert row["least"] == row["most"] == pytest.approx(saved)
        assert row["saved"] == {"predicted": pytest.approx(saved), "measured": pytest.approx(saved)}
        assert row["copies"]["predicted"] == row["copies"]["measured"]
        assert width - 1 <= row["copies"]["measured"] <= 3 * (width - 1)


def test_beams_without_sharing_give_equal_results_and_compute_every_token_again(lab: Labs) -> None:
    """Four beams, 20 tokens in, 4 out: each step computes one, the last block's or all tokens of a beam."""
    inside, cached, plain = lab("beams").rows(1)
    assert [row["equal"] for row in (inside, cached, plain)] == [{"predicted": 4, "measured": 4}] * 3
    tokens = (20 + 4 * 3, 20 + 4 * (5 + 6 + 7), 20 + 4 * (21 + 22 + 23))
    for row, count in zip((inside, cached, plain), tokens, strict=True):
        assert row["computed"] == {"predicted": count, "measured": count}


def test_the_slots_in_the_lab_equal_the_positions_in_the_arrays(lab: Labs) -> None:
    """Token 25 in blocks 23, 64, 87: the tenth token of block 64, after 64 blocks of 16 keys or 16 pairs."""
    slots = [row["slot"] for row in lab("slots").rows(0)]
    expected = [64 * 16 + 9, (64 * 16 + 9) * 2, (64 * 16 + 9) * 2 + 1, 64 * 16 + 9]
    assert expected[1] == 2066
    assert slots == [{"predicted": slot, "measured": slot} for slot in expected]


def test_gathering_by_slots_reads_the_same_as_reading_token_by_token(lab: Labs) -> None:
    rows = lab("slots").rows(1)
    assert [row["tokens"] for row in rows] == [8, 16, 32, 64]
    assert all(row["equal"] == {"predicted": row["tokens"], "measured": row["tokens"]} for row in rows)


def test_the_sparse_lab_reads_only_the_tokens_of_the_last_blocks(lab: Labs) -> None:
    """Oracle: the positions up to the token that are in the last four blocks, with 64 bytes each."""
    rows = lab("sparse").rows(0)
    assert [row["position"] for row in rows] == [63, 127, 255, 500, 511]
    for row in rows:
        at = row["position"]
        read = sum(at // 16 - 4 < position // 16 for position in range(at + 1))
        assert row["full"] == {"predicted": at + 1, "measured": at + 1}
        assert row["window"] == {"predicted": read, "measured": read}
        assert row["bytes"] == {"predicted": 64 * read, "measured": 64 * read}
    assert rows[3]["window"]["measured"] == 53


def test_the_sparse_lab_counts_only_causal_pairs(lab: Labs) -> None:
    """Oracle: all pairs of 8 blocks, without later blocks and without blocks before the window of 3."""
    full, window = lab("sparse").rows(1)
    pairs = [(query, read) for query in range(8) for read in range(8) if read <= query]
    near = [(query, read) for query, read in pairs if query - read < 3]
    assert (len(pairs), len(near)) == (36, 21)
    assert full["pairs"] == {"predicted": len(pairs), "measured": len(pairs)}
    assert window["pairs"] == {"predicted": len(near), "measured": len(near)}
    assert window["saved"]["measured"] == pytest.approx(1 - 21 / 36)


def test_the_prefix_lab_computes_and_stores_a_shared_prefix_once(lab: Labs) -> None:
    """Two prompts of 32 tokens with 0, 16 and 31 in common: 16 of the 31 are a block, and 15 are copied."""
    rows = lab("prefix").rows(0)
    assert [(row["share"], row["cache"]) for row in rows] == [
        (share, cache) for share in (0, 50, 99) for cache in ("off", "on")
    ]
    assert [row["computed"]["measured"] for row in rows] == [64, 64, 64, 64 - 16, 64, 64 - 31]
    assert [row["blocks"]["measured"] for row in rows] == [4, 4, 4, 3, 4, 3]
    for row in rows:
        assert row["computed"]["predicted"] == row["computed"]["measured"]
        assert row["blocks"]["predicted"] == row["blocks"]["measured"]


def test_the_prefix_lab_counts_the_blocks_of_many_users(lab: Labs) -> None:
    """Oracle: the lengths, drawn again here; 100 tokens fill 6 blocks of 16, 12 tokens fill 3 blocks of 4."""
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


def test_the_prefix_lab_runs_as_many_users_as_the_pool_has_blocks_for(lab: Labs) -> None:
    """Oracle: 2,048 blocks allocated user by user, for a prompt and one token; 6 blocks are common."""
    draw = random.Random(0)
    needed = [-(-(draw.randint(101, 500) + 1) // 16) for _ in range(327)]

    def fitting(blocks: list[int], free: int) -> int:
        users = 0
        while blocks[users] <= free:
            free -= blocks[users]
            users += 1
        return users

    counts = [16, fitting(needed, 2048), fitting([blocks - 6 for blocks in needed], 2048 - 6)]
    assert counts[1] > 64
    found = [row["users"] for row in lab("prefix").rows(2)]
    assert found == [{"predicted": count, "measured": count} for count in counts]


def test_the_summary_lab_agrees_with_its_predictions_and_pages_hold_more_users(lab: Labs) -> None:
    """Memory for 4,096 tokens. Lengths of 100 to 500 need 19.3 blocks on average, 17.3 with 2 in common."""
    contiguous, runs, anywhere, pages, shared = lab("summary").rows(0)
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
    assert contiguous["users"]["measured"] < runs["users"] < pages["users"]["measured"]
    assert pages["users"]["measured"] < shared["users"]["measured"]


def test_the_window_lab_reads_and_holds_only_the_tokens_that_each_layer_sees(lab: Labs) -> None:
    """Oracle: of SmolLM2's 30 layers, 5 see all tokens and 25 see 512; 768 bytes per token and layer.

    There are six groups of five layers. 512 tokens are 32 blocks in each; after 1,024 tokens a group with a
    window still holds 32.
    """
    layers = {512: 30 * 512, 1024: 5 * 1024 + 25 * 512}
    for row, (context, tokens) in zip(lab("window").rows(0), layers.items(), strict=True):
        assert row["context"] == context
        assert row["all_bytes"] == 30 * context * 768
        assert row["window_bytes"] == {"predicted": tokens * 768, "measured": tokens * 768}
    short, long = lab("window").rows(1)
    assert (short["all_blocks"], long["all_blocks"]) == (32, 64)
    assert short["window_blocks"] == short["peak_blocks"] == {"predicted": 6 * 32, "measured": 6 * 32}
    assert long["window_blocks"] == {"predicted": 64 + 5 * 32, "measured": 64 + 5 * 32}
    assert long["peak_blocks"] == {"predicted": 6 * 64, "measured": 6 * 64}
    assert (short["all_held"], long["all_held"]) == (32 * 16 * 30 * 768, 64 * 16 * 30 * 768)
    assert long["window_held"] == 224 * 16 * 5 * 768
    assert long["saved"] == pytest.approx(1 - 224 / 384)


def test_the_window_lab_counts_causal_pairs_and_explains_the_rectangles(lab: Labs) -> None:
    """Oracle: all pairs of 8 blocks, without later blocks and without blocks before the window of 3."""
    full, window = lab("window").rows(2)
    pairs = [(query, read) for query in range(8) for read in range(query + 1)]
    near = [(query, read) for query, read in pairs if query - read < 3]
    assert full["pairs"] == {"predicted": len(pairs), "measured": len(pairs)}
    assert window["pairs"] == {"predicted": len(near), "measured": len(near)}
    assert window["saved"]["measured"] == pytest.approx(1 - 21 / 36)
    assert (full["rectangle"], window["rectangle"], window["rectangle_saved"]) == (64, 24, 0.625)
