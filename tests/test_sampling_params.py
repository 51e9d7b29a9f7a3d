"""SamplingParams: vLLM's names and defaults, and a refusal that names the parameter and its value."""

import dataclasses

import pytest
from tiny_llm.sampling_params import SamplingParamsError

from tiny_llm import SamplingParams


def test_the_defaults_are_vllms() -> None:
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
    }
    assert {
        name: value for name, value in dataclasses.asdict(SamplingParams()).items() if name in expected
    } == expected


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
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SamplingParamsError, match=name) as refusal:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(refusal.value)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", -1), ("top_k", 0), ("top_p", 1.0), ("min_p", 1.0), ("max_tokens", None), ("seed", 0)],
)
def test_the_ends_of_each_range_are_allowed(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


def test_parameters_cannot_be_written_later() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("x", ("x",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_strings_come_as_a_tuple(stop: object, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings  # type: ignore[arg-type]


def test_temperature_zero_and_what_rounds_to_it_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-30).greedy, "dividing by so little gives no probabilities"
    assert not SamplingParams(temperature=0.01).greedy
