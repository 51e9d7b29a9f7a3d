"""Inputs to the engine: which forms are accepted, and that all others are rejected by value and position.

Oracle: vLLM's forms of a prompt (`TextPrompt`, `TokensPrompt`), and the same prompt as a plain list of ids.
"""

import array
import random
import time
import tracemalloc
from collections import UserList, deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.prompts import parse_prompt, parse_prompts

from promises import check_all_returned
from tiny_llm import (
    LLM,
    ConfigError,
    Engine,
    EngineConfig,
    RequestTooLargeError,
    SamplingParams,
)
from tiny_llm_checkpoints.errors import shown
from tiny_model import tiny_config

GREEDY = SamplingParams(temperature=0.0, max_tokens=2)


class Frame:
    """Like a pandas DataFrame: columns by name, no truth value, no order."""

    def __bool__(self) -> bool:
        raise ValueError("The truth value of a Frame is ambiguous")

    def __getitem__(self, name: str) -> object:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(["prompt"])

    def __len__(self) -> int:
        return 1


class Unprintable:
    """A value whose every conversion to text raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __str__ = __repr__

    def __index__(self) -> int:
        raise RuntimeError("no number")


@pytest.fixture(scope="module")
def loaded() -> LLM:
    return LLM(block_size=8, num_blocks=60, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=200)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    """The one engine of this module; every test leaves it without requests and without pages in use."""
    yield loaded
    check_all_returned(loaded.core.manager)


class Endless(UserList[int]):
    """Three ids according to its length, but iteration never ends."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return count(5)


# ---- prompts ----

IDS = [5, 6, 7]


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        UserList(IDS),
        deque(IDS),
        array.array("i", IDS),
        np.array(IDS),
        np.array(IDS, np.uint8),
        np.array([5, 0, 6, 0, 7])[::2],
        [np.int64(5), np.int32(6), 7],
        mx.array(IDS),
        {"prompt_token_ids": IDS},
        {"prompt_token_ids": np.array(IDS), "prompt": None},
    ],
)
def test_a_list_of_token_ids_of_any_type_is_one_prompt(prompt: Any) -> None:
    [parsed] = parse_prompts(prompt)
    assert (parsed.text, parsed.token_ids) == (None, IDS)
    assert set(map(type, parsed.token_ids or ())) == {int}
    assert parse_prompts([prompt, prompt]) == [parsed, parsed]


def test_no_more_ids_are_read_than_the_length_says() -> None:
    assert parse_prompt(Endless()).token_ids == IDS


def test_prompts_can_be_texts_or_dicts() -> None:
    assert parse_prompts("ab") == parse_prompts({"prompt": "ab"}) == [("ab", None, None)]
    assert parse_prompts([]) == []
    both = {"prompt": "ab", "prompt_token_ids": IDS, "cache_salt": "mine"}
    assert parse_prompt(both) == ("ab", IDS, "mine")
    mixed = parse_prompts(["ab", IDS, {"prompt": "c"}])
    assert [one.content for one in mixed] == ["ab", IDS, "c"]


def test_a_two_dimensional_array_is_a_list_of_prompts() -> None:
    for rows in (np.array([IDS, IDS]), mx.array([IDS, IDS])):
        assert [one.token_ids for one in parse_prompts(rows)] == [IDS, IDS]
    assert [one.token_ids for one in parse_prompts([np.array(IDS), np.array([1])])] == [IDS, [1]]


NO_PROMPTS = [
    None,
    b"bytes",
    bytearray(b"bytes"),
    memoryview(b"bytes"),
    1.5,
    float("nan"),
    7,
    True,
    {1, 2},
    frozenset([1]),
    Frame(),
    Unprintable(),
    object(),
    (token for token in IDS),
    iter(IDS),
    {5: 6}.keys(),
    np.array([1.5, 2.0]),
    np.array(["a", "b"]),
    np.array([1, 2], object),
    np.array([True, False]),
    np.zeros((2, 2, 2), int),
    mx.array([1.0]),
]


@pytest.mark.parametrize("value", NO_PROMPTS, ids=[type(value).__name__ for value in NO_PROMPTS])
def test_an_invalid_prompt_is_rejected_with_its_value_and_position(value: Any) -> None:
    with pytest.raises(ValueError, match="prompt") as alone:
        parse_prompts(value)
    assert shown(value) in str(alone.value)
    with pytest.raises(ValueError, match=r"^prompts\[1\]") as in_a_list:
        parse_prompts(["fine", value])
    assert shown(value) in str(in_a_list.value)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, "a"], r"prompt\[1\]: a token id must be a whole number, not 'a'"),
        ([1, None], r"prompt\[1\].*None"),
        ([1, 1.0], r"prompt\[1\].*1\.0"),
        ([1, float("nan")], r"prompt\[1\].*nan"),
        ([1, True], r"prompt\[1\].*True"),
        ([True, False], r"prompt\[0\].*True"),
        ([1, np.True_], r"prompt\[1\].*True"),
        ([1, Fraction(3)], r"prompt\[1\].*Fraction"),
        ([1, [2]], r"prompt\[1\].*\[2\]"),
        ([1, Unprintable()], r"prompt\[1\].*Unprintable"),
        ([[1], [2, [3]]], r"prompts\[1\]\[1\].*\[3\]"),
        ([[1], []], r"prompts\[1\] has no tokens"),
        ([["a"]], r"prompts\[0\]\[0\].*'a'"),
        ([None], r"prompts\[0\].*None"),
        ([1.5], r"prompts\[0\].*1\.5"),
        ({"prompt": None}, "must have 'prompt' or 'prompt_token_ids'"),
        ({}, "must have 'prompt' or 'prompt_token_ids'"),
        ({"prompt": 5}, r"prompt\['prompt'\] must be a string, not 5"),
        ({"prompt": "a", "cache_salt": 5}, r"\['cache_salt'\] must be a string, not 5"),
        ({"prompt": "a", "multi_modal_data": {}}, "'multi_modal_data' is not supported; known: prompt,"),
        ([{"prompt": "a", 3: 4}], r"prompts\[0\]: 3 is not supported"),
        ({"prompt_token_ids": "abc"}, "must be a list of token ids, not 'abc'"),
        ({"prompt_token_ids": []}, "no tokens"),
        ("a\ud800b", r"character 1 is a lone surrogate, '\\ud800'"),
        ([{"prompt": "\udfff"}], r"prompts\[0\]: character 0 is a lone surrogate"),
        (range(10**12), "1000000000000 token ids are more than 10000000"),
    ],
)
def test_the_error_names_the_invalid_part_of_a_prompt(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompts(prompts)


def test_an_error_message_is_short_even_if_the_value_is_long() -> None:
    for value in (b"x" * 10**7, [["x" * 10**6] * 1000], {"prompt": ["x" * 10**6] * 1000}):
        with pytest.raises(ValueError, match="prompt") as refused:
            parse_prompts(value)
        assert len(str(refused.value)) < 1000


def test_every_form_of_a_prompt_gives_the_same_answer_as_the_plain_list(llm: LLM) -> None:
    [plain] = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
    forms: list[Any] = [np.array(IDS), {"prompt_token_ids": IDS}, tuple(IDS), {"prompt": "The"}, "The"]
    *same, first, second = llm.generate(forms, GREEDY, use_tqdm=False)
    assert [one.outputs for one in same] == [plain.outputs] * 3
    assert (first.prompt, first.outputs) == ("The", second.outputs)
    [found] = llm.beam_search(np.array(IDS), BeamSearchParams(beam_width=2, max_tokens=2))
    assert found.sequences[0].tokens[:3] == tuple(IDS)
    assert "".join(piece.text for piece in llm.stream({"prompt": "The"}, GREEDY)) == first.outputs[0].text


def test_prompts_with_different_cache_salts_share_no_pages(llm: LLM) -> None:
    """Oracle: `num_cached_tokens`: a prompt shares pages only with prompts of the same salt."""
    ids = list(range(50, 74))
    for salt, shares in (("a", False), ("b", False), ("a", True)):
        [output] = llm.generate({"prompt_token_ids": ids, "cache_salt": salt}, GREEDY, use_tqdm=False)
        assert (output.num_cached_tokens > 0) == shares


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 5}, "must be SamplingParams, or a list of them, not {'max_tokens': 5}"),
        ([GREEDY, None], r"sampling_params\[1\] must be SamplingParams, not None"),
        ([GREEDY], "1 sampling_params for 2 prompts"),
        (BeamSearchParams(beam_width=2, max_tokens=2), "must be SamplingParams"),
        (5, "not 5"),
        (iter([GREEDY, GREEDY]), "must be SamplingParams"),
    ],
)
def test_invalid_sampling_params_are_rejected(llm: LLM, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["a", "b"], params, use_tqdm=False)


def test_other_arguments_of_a_wrong_type_are_rejected(llm: LLM) -> None:
    with pytest.raises(ValueError, match="use_tqdm must be True or False, not 'no'"):
        llm.generate("a", GREEDY, use_tqdm="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="params must be BeamSearchParams, not SamplingParams"):
        llm.beam_search("a", GREEDY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="params must be SamplingParams, not 5"):
        llm.stream("a", 5)  # type: ignore[arg-type]
    for ids in ("abc", [1.5], [None], [True], {1}, None, b"a", np.array([0.5])):
        with pytest.raises(ValueError, match="token id"):
            llm.logits(ids)  # type: ignore[arg-type]
    assert llm.logits(np.array([1, 2])).shape[0] == 2  # type: ignore[arg-type]


# ---- requests ----


@pytest.mark.parametrize("request_id", ["", 5, b"a", ["a"], "x" * 257, True, Unprintable()])
def test_a_request_id_must_be_a_short_text(llm: LLM, request_id: Any) -> None:
    with pytest.raises(ValueError, match="request_id must be a string of 1 to 256 characters"):
        llm.engine.request("a", GREEDY, request_id)


def test_a_beam_width_above_the_engines_limit_is_rejected_before_it_takes_memory(llm: LLM) -> None:
    """Measured without this check: 3.4 GB for this width."""
    params = BeamSearchParams(beam_width=50_000_000, max_tokens=2)
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLargeError, match="beam_width = 50000000 exceeds the 8 sequences"):
            llm.beam_search("a", params)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
    with pytest.raises(RequestTooLargeError, match="n = 9 exceeds the 8 sequences"):
        llm.engine.request("a", SamplingParams(n=9))


def _submit_invalid_requests(engine: Engine, requests: Any, deliver: Any = print) -> None:
    engine.submit(requests, deliver).result(60)


def test_an_invalid_request_or_listener_is_rejected_immediately(llm: LLM) -> None:
    engine, good = llm.engine, llm.engine.request("a", GREEDY)
    for requests in (5, None, good, iter([good]), {good}, "a"):
        with pytest.raises(TypeError, match="requests"):
            _submit_invalid_requests(engine, requests)
    with pytest.raises(TypeError, match=r"requests\[1\] must be made by `request` or `search`, not 'a'"):
        _submit_invalid_requests(engine, [good, "a"])
    with pytest.raises(TypeError, match="deliver must be callable, not None"):
        _submit_invalid_requests(engine, [good], None)
    for call, value in (
        (engine.cancel, ["a"]),
        (engine.cancel, None),
        (engine.call, 5),
        (engine.watch_blocks, "a"),
        (engine.start_draining, "soon"),
        (engine.start_draining, True),
    ):
        with pytest.raises(TypeError, match=r"must be"):
            call(value)  # type: ignore[operator]


# ---- engine options ----

COUNTS = [name for name in EngineConfig.__dataclass_fields__ if name.startswith(("max_", "num_"))]
COUNTS += ["block_size", "min_num_blocks", "kv_cache_memory", "swap_space"]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(
    "value", ["16", "1GiB", 16.0, 1.5, True, float("nan"), float("inf"), b"16", [16], -1, 0, 10**30]
)
def test_an_invalid_count_is_rejected_with_its_name_value_and_limit(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be (a whole number|at least 1|at most)") as refused:
        EngineConfig.from_options(**{name: value})
    assert shown(value) in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"block_size": None}, "block_size must be a whole number, not None"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False, not 1"),
        ({"enable_prefix_caching": "false"}, "enable_prefix_caching must be True or False, not 'false'"),
        ({"activation_bits": "8"}, "activation_bits must be a whole number, not '8'"),
        ({"activation_bits": 8.0}, "activation_bits must be a whole number, not 8.0"),
        ({"dtype": None}, "dtype must be a string, not None"),
        ({"kv_cache_dtype": mx.float16}, "kv_cache_dtype must be a string"),
        ({"batching": ["paged"]}, "batching must be a string"),
        ({"preemption_mode": 1}, "preemption_mode must be a string, not 1"),
        ({"max_num_seqs": Unprintable()}, "max_num_seqs must be a whole number, not"),
    ],
)
def test_an_option_of_a_wrong_type_is_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_options(**options)


def test_numpy_integers_are_accepted_as_options_and_become_ints() -> None:
    config = EngineConfig.from_options(num_blocks=np.int64(7), activation_bits=np.uint8(8))
    assert (type(config.num_blocks), config.num_blocks, config.activation_bits) == (int, 7, 8)


@pytest.mark.parametrize("model", [123, b"x.gguf", 1.5, ["a"], object(), "", "a\0b", True])
def test_a_value_that_cannot_name_a_model_is_rejected(model: Any) -> None:
    with pytest.raises(ConfigError, match="model must be a path, a hub id or None, not"):
        LLM(model)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 10**12},
        {"kv_cache_memory": 2**60},
        {"num_blocks": 2**62, "block_size": 2**62},
        {"num_blocks": 10**12, "batching": "dense"},
        {"swap_space": 2**60, "preemption_mode": "swap"},
    ],
)
def test_more_memory_than_the_machine_has_is_rejected_before_allocation(options: dict[str, int]) -> None:
    config, began = EngineConfig.from_options(**options), time.monotonic()
    sized = config.swap_blocks if config.swap_space else config.pool_blocks
    with pytest.raises(ConfigError, match="this machine"):
        sized(tiny_config(), 2)
    assert time.monotonic() - began < 5


def test_random_option_values_are_accepted_or_raise_config_error() -> None:
    """Whatever the value, the only error that may come is `ConfigError`."""
    draw = random.Random(1)
    values = [
        None,
        0,
        1,
        -1,
        7,
        2**63,
        10**400,
        1e400,
        -0.5,
        "",
        "x",
        b"",
        (),
        {},
        True,
        Path("a"),
        mx.array(1),
    ]
    names = list(EngineConfig.__dataclass_fields__)
    for _ in range(2000):
        options = {name: draw.choice(values) for name in draw.sample(names, draw.randint(1, 3))}
        try:
            config = EngineConfig.from_options(**options)
            config.model_len(tiny_config(), 2)
            config.swap_blocks(tiny_config(), 2)
        except ConfigError:
            continue
