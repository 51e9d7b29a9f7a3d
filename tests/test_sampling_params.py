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
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "prompt_logprobs": None,
        "logit_bias": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "cache_salt": "",  # of the prompt there
        "priority": 0,  # of the request there
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
        ("stop", ["a", 7]),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("prompt_logprobs", -1),
        ("logit_bias", [1]),
        ("stop_token_ids", 7),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [-1]),
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


@pytest.mark.parametrize(
    ("bias", "name", "value"),
    [({5: 101}, "logit_bias[5]", 101), ({5: "x"}, "logit_bias[5]", "x"), ({"a": 1}, "logit_bias", "a")],
)
def test_a_bias_out_of_range_is_refused_with_its_token(bias: dict, name: str, value: object) -> None:
    with pytest.raises(SamplingParamsError) as refusal:
        SamplingParams(logit_bias=bias)
    assert name in str(refusal.value)
    assert repr(value) in str(refusal.value)


def test_a_bias_is_a_copy_and_takes_ids_as_json_writes_them() -> None:
    given = {"5": 1, 7: -2.5}
    params = SamplingParams(logit_bias=given)  # type: ignore[arg-type]
    given.clear()
    assert params.logit_bias == {5: 1.0, 7: -2.5}


def test_what_is_not_supported_is_refused_by_name_with_what_is() -> None:
    with pytest.raises(SamplingParamsError, match=r"'best_of'; known: n, temperature, .*logit_bias"):
        SamplingParams.from_options(temperature=0.5, best_of=2)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
    assert SamplingParams.from_options(top_k=3) == SamplingParams(top_k=3)


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
