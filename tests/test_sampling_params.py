"""SamplingParams: vLLM's names and defaults; an error names the parameter and its value."""

import dataclasses
import inspect
import tracemalloc
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from queue import SimpleQueue
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.delivery import Item
from tiny_llm.errors import SamplingParamsError
from tiny_llm.output_processor import RequestState

from tiny_llm import Engine, RequestEvent, RequestTooLargeError, SamplingParams
from tiny_model import examples, random_prompt
from toy_engine import SECONDS, make_engine

TOO_LONG = (["a"] * 65, [1] * 129, dict.fromkeys(range(1025), 1.0))


def test_the_defaults_are_those_of_vllm() -> None:
    expected = {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "max_tokens": 16,
        "logprobs": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "prompt_logprobs": None,
        "logit_bias": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "cache_salt": "",  # in vLLM a field of the prompt
        "priority": 0,  # in vLLM a field of the request
        "structured_outputs": None,
    }
    assert dataclasses.asdict(SamplingParams()) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("seed", -1),
        ("stop", ""),
        ("stop", ("a", "")),
        ("stop", 7),
        ("stop", b"a"),
        ("stop", {"a": 1}),
        ("stop", {"a"}),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", 0.009),
        ("repetition_penalty", 100.5),
        ("temperature", 1e31),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("prompt_logprobs", -1),
        ("logit_bias", [1]),
        ("stop_token_ids", 7),
        ("stop_token_ids", {3}),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("top_k", 2**31),
        ("max_tokens", 2**63),
        ("priority", -(2**31)),
        ("seed", 2**64),
        ("cache_salt", 5),
        ("cache_salt", None),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", None),
        ("n", 1.0),
        ("n", None),
        ("min_tokens", None),
        ("max_tokens", "many"),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
        ("include_stop_str_in_output", None),
    ],
)
def test_an_invalid_value_is_rejected_with_the_parameters_name_and_the_value(
    name: str, value: object
) -> None:
    with pytest.raises(SamplingParamsError, match=name) as refusal:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(refusal.value)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_k", -1), ("top_k", 0), ("top_k", 2**31 - 1), ("top_p", 1.0), ("min_p", 1.0), ("min_p", -0.0)),
        *(("max_tokens", None), ("seed", 0), ("seed", 2**64 - 1), ("n", 2**31 - 1), ("priority", 1 - 2**31)),
        *(("repetition_penalty", 0.01), ("repetition_penalty", 100), ("temperature", 1e30), ("logprobs", 20)),
        *(("stop", ("a" * 1024,) * 64), ("stop_token_ids", (1,) * 128), ("cache_salt", "é" * 1024)),
        ("logit_bias", dict.fromkeys(range(1024), 1.0)),
    ],
)
def test_the_limits_of_each_range_are_allowed(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bias", "name", "value"),
    [({5: 101}, "logit_bias[5]", 101), ({5: "x"}, "logit_bias[5]", "x"), ({"a": 1}, "logit_bias", "a")],
)
def test_an_invalid_bias_is_rejected_with_its_token(bias: dict, name: str, value: object) -> None:
    with pytest.raises(SamplingParamsError) as refusal:
        SamplingParams(logit_bias=bias)
    assert name in str(refusal.value)
    assert repr(value) in str(refusal.value)


def test_logit_bias_is_copied_and_accepts_token_ids_as_strings() -> None:
    given = {"5": 1, 7: -2.5}
    params = SamplingParams(logit_bias=given)  # type: ignore[arg-type]
    given.clear()
    assert params.logit_bias == {5: 1.0, 7: -2.5}


def test_an_unknown_parameter_is_rejected_with_the_list_of_known_ones() -> None:
    with pytest.raises(SamplingParamsError, match=r"'best_of'; known: n, temperature, .*logit_bias"):
        SamplingParams.from_options(temperature=0.5, best_of=2)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
    assert SamplingParams.from_options(top_k=3) == SamplingParams(top_k=3)


@pytest.mark.parametrize(
    ("misspelled", "meant"), [("temprature", "temperature"), ("topP", "top_p"), ("max_token", "max_tokens")]
)
def test_a_misspelled_parameter_is_rejected_with_the_one_that_was_meant(misspelled: str, meant: str) -> None:
    with pytest.raises(SamplingParamsError, match=rf"'{misspelled}'; did you mean {meant}\?"):
        SamplingParams.from_options(**{misspelled: 1})
    with pytest.raises(TypeError, match=rf"'{misspelled}'; did you mean {meant}\?"):
        SamplingParams(**{misspelled: 1})  # type: ignore[arg-type]


def test_the_signature_of_sampling_params_lists_every_parameter() -> None:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    assert list(inspect.signature(SamplingParams).parameters) == names


def test_sampling_params_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("x", ("x",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_strings_are_always_a_tuple(stop: object, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings  # type: ignore[arg-type]


def test_temperatures_that_are_zero_or_nearly_zero_are_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-30).greedy, "dividing by so little gives no probabilities"
    assert not SamplingParams(temperature=0.01).greedy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stop_token_ids", ["a"], "stop_token_ids[0] must be a whole number, not 'a'"),
        ("stop_token_ids", [3, -1], "stop_token_ids[1] must be at least 0, not -1"),
        ("stop", ["a", 7], "stop[1] must be a string, not 7"),
        ("stop", ["a", "\ud800"], "stop[1] must be valid Unicode, not '\\ud800'"),
        ("stop", "x" * 1025, "stop[0] must have at most 1024 characters, not 1025"),
        ("stop", ["a"] * 65, "stop must have at most 64 strings, not 65"),
        ("stop_token_ids", [1] * 129, "stop_token_ids must have at most 128 token ids, not 129"),
        ("logit_bias", dict.fromkeys(range(1025), 1), "logit_bias must have at most 1024 tokens, not 1025"),
        ("logit_bias", {5: 1, "5": 2}, "logit_bias must be a mapping that has each token once, not '5'"),
        ("logit_bias", {"\u0665": 1}, "logit_bias keys must be token ids, not '\u0665'"),
        ("logit_bias", {True: 1}, "logit_bias must be a whole number, not True"),
        ("logit_bias", {5: float("nan")}, "logit_bias[5] must be from -100 to 100, not nan"),
        ("logit_bias", {10**9000: 1}, "logit_bias must be at most 2147483647, not a number of 29898 bits"),
        ("temperature", 10**400, "temperature must be from 0 to 1e+30, not a number of 1329 bits"),
        (
            "repetition_penalty",
            10**9000,
            "repetition_penalty must be from 0.01 to 100, not a number of 29898",
        ),
        ("n", 10**9000, "n must be at most 2147483647, not a number of 29898 bits"),
        ("temperature", [10**9000], "temperature must be a number, not a list"),
        ("temperature", Decimal("0.5"), "temperature must be a number, not Decimal('0.5')"),
        ("cache_salt", "x" * 1025, "cache_salt must have at most 1024 characters, not 1025"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_an_error_names_the_field_its_range_and_the_shortened_value(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(SamplingParamsError) as refusal:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert str(refusal.value).startswith(message)
    assert len(str(refusal.value)) < 200


class UnreadableList(list):  # type: ignore[type-arg]
    """A list whose elements must not be read."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("a list that is too long must be rejected by its length")

    __getitem__ = __iter__  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
def test_a_list_that_is_too_long_is_rejected_without_reading_its_elements(name: str) -> None:
    with pytest.raises(SamplingParamsError, match=f"^{name} must have at most .*, not 1000000$"):
        SamplingParams(**{name: UnreadableList([1] * 1_000_000)})  # type: ignore[arg-type]


def test_numpy_numbers_and_fractions_become_python_numbers() -> None:
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=Fraction(1, 2),  # type: ignore[arg-type]
        stop_token_ids=[np.int32(7)],  # type: ignore[list-item]
        logit_bias={np.int64(3): np.float64(1.5)},
    )
    assert params == SamplingParams(n=2, temperature=0.5, top_p=0.5, stop_token_ids=(7,), logit_bias={3: 1.5})
    assert [type(value) for value in (params.n, params.temperature, *params.stop_ids)] == [int, float, int]


def test_lists_are_copied() -> None:
    stop, ids = ["a"], [3]
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    stop.clear()
    ids.clear()
    assert (params.stop_strings, params.stop_ids) == (("a",), {3})


# Every accepted value runs.

odd_numbers = st.sampled_from(
    [
        *(0, -0.0, 1, -1, 2, 20, 127, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 10**5000),
        *(0.5, 1e-5, 9e-6, 1e-300, 5e-324, 1e30, 1e38, 1e300, float("inf"), float("-inf"), float("nan")),
        *(np.int64(3), np.float32(0.25), np.float64(1e-40), Fraction(1, 3), Decimal("0.5"), True, None, "1"),
    ]
)
odd_values = st.one_of(
    odd_numbers,
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=3),
    st.lists(st.one_of(odd_numbers, st.text(max_size=3), st.integers(0, 200)), max_size=4),
    st.dictionaries(
        st.one_of(st.integers(0, 200), st.sampled_from(["7", "x"])), st.floats(-200, 200), max_size=4
    ),
    st.sampled_from([{"a"}, (), (1, 2), object(), b"x", np.array([1, 2]), np.array(3), range(3)]),
    st.sampled_from(TOO_LONG),
)
FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    engine.stop()


def answers(engine: Engine, *requests: RequestState) -> list[list[tuple[int, ...]]]:
    """Serve the requests together; return the tokens of each completion of each request."""
    items: SimpleQueue[list[Item]] = SimpleQueue()
    engine.submit(requests, items.put).result(SECONDS)
    while not all(request.finished for request in requests):
        assert all(isinstance(item, RequestEvent) for item in items.get(timeout=SECONDS)), "a request failed"
    return [[one.token_ids for one in request.output.outputs] for request in requests]


def params_or_message(values: dict[str, object]) -> SamplingParams | str:
    """Return the parameters, or the message with which they are rejected."""
    try:
        return SamplingParams(**values)  # type: ignore[arg-type]
    except SamplingParamsError as error:
        return str(error)


@settings(max_examples=examples(400), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), odd_values, min_size=1, max_size=2))
def test_any_value_is_either_rejected_by_name_or_runs_without_affecting_other_requests(
    engine: Engine, values: dict[str, object]
) -> None:
    """No accepted value makes a step fail, or changes the tokens of a request in the same batch."""
    params = params_or_message({"max_tokens": 4, **values})
    if isinstance(params, str):
        assert params.split(" ")[0].split("[")[0] in {*values, "min_tokens"}
        assert len(params) < 300
        return
    neighbour = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)
    alone = answers(engine, engine.request(random_prompt(5, 1), neighbour))[0]
    try:
        together = answers(
            engine,
            engine.request(random_prompt(7, 2), params),
            engine.request(random_prompt(5, 1), neighbour),
        )
    except (
        SamplingParamsError,
        RequestTooLargeError,
    ):  # an id outside the vocabulary, the context, max_num_seqs
        return
    assert together[1] == alone


def test_too_many_completions_or_beams_are_rejected_before_memory_is_allocated_for_them(
    engine: Engine,
) -> None:
    """Measured as memory: making the ids of all completions would take half a gigabyte."""
    tracemalloc.start()
    try:
        core = engine.core
        with pytest.raises(RequestTooLargeError, match="n = 2000000 exceeds the 8"):
            engine.call(lambda: core.add_request("a", [1], SamplingParams(n=2_000_000)))
        with pytest.raises(RequestTooLargeError, match="n = 2000000 exceeds the 8"):
            engine.request("a" * 1000, SamplingParams(n=2_000_000))
        wide = BeamSearchParams(beam_width=50_000_000, max_tokens=4)
        with pytest.raises(RequestTooLargeError, match="beam_width = 50000000 exceeds the 8"):
            engine.search([1], wide)
        with pytest.raises(RequestTooLargeError, match="n = 50000000 exceeds the 8"):
            engine.call(lambda: core.add_beam_search("a", [1], wide))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


class HostileString(str):
    """A string that cannot be compared or hashed, and has no length."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        raise RuntimeError

    __len__ = __hash__


def test_strings_of_a_subclass_become_plain_strings() -> None:
    """A caller's class must not run its methods in the engine's thread."""
    params = SamplingParams(stop=[HostileString("a")], cache_salt=HostileString("b"))
    assert (params.stop, params.cache_salt) == (("a",), "b")
    assert type(params.stop_strings[0]) is type(params.cache_salt) is str


class BrokenFloat(float):
    """A float that cannot be converted to a plain float."""

    def __float__(self) -> float:
        raise RuntimeError

    __repr__ = __float__  # type: ignore[assignment]


@pytest.mark.parametrize("value", [np.timedelta64(5, "s"), BrokenFloat(5)], ids=["span", "broken"])
def test_a_number_that_cannot_be_converted_is_rejected(value: object) -> None:
    for name in ("n", "seed", "temperature", "repetition_penalty"):
        with pytest.raises(SamplingParamsError, match=f"^{name} must be a (whole )?number, not "):
            SamplingParams(**{name: value})  # type: ignore[arg-type]
