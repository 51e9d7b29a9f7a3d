"""`tiny-llm generate` with OpenAI's batch files: answers, their format, and lines that fail.

Oracles: the engine's own answers, and the types of OpenAI's client.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from command_line import Run, check_blocks_are_freed, cli, expected_answer, llm, plain_cli
from tiny_llm import LLM, SamplingParams
from tiny_llm_cli.batch import read_batch
from tiny_llm_cli.lines import Line

__all__ = ["check_blocks_are_freed", "cli", "llm", "plain_cli"]

MESSAGES = [{"role": "user", "content": "Name a colour."}]


def request(custom_id: object, body: object, url: str = "/v1/chat/completions", **others: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **others})


def results(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_batch_is_answered_in_openais_format_and_in_order(cli: Run, llm: LLM, tmp_path: Path) -> None:
    completion = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    file, output = tmp_path / "batch.jsonl", tmp_path / "results.jsonl"
    lines = [
        request("chat", {"messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}),
        request("completion", completion, "/v1/completions"),
    ]
    file.write_text("\n".join(lines))
    done = cli("generate", "-f", str(file), "-o", str(output))
    assert (done.code, done.out, done.err) == (0, "", "")
    chat, completed = results(output.read_text())
    assert set(chat) == {"id", "custom_id", "response", "error"}
    assert (chat["custom_id"], completed["custom_id"]) == ("chat", "completion")
    for result in (chat, completed):
        assert (result["response"]["status_code"], result["error"]) == (200, None)
        assert result["response"]["request_id"] == result["response"]["body"]["id"]
        assert result["response"]["body"]["model"] == llm.model_name
    answer = ChatCompletion.model_validate(chat["response"]["body"])
    assert answer.choices[0].message.content == expected_answer(llm, "Name a colour.")
    text = Completion.model_validate(completed["response"]["body"])
    params = SamplingParams(temperature=0.0, max_tokens=6)
    assert text.choices[0].text == llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0].text
    assert text.choices[0].logprobs is not None
    assert text.usage is not None
    assert text.usage.completion_tokens == 6


def test_a_failed_line_gets_an_error_and_the_other_lines_get_answers(cli: Run) -> None:
    short = {"messages": MESSAGES, "max_tokens": 1}
    lines = [
        request("good", short),
        "{",
        request("embeddings", {"input": "a"}, "/v1/embeddings"),
        request("too long", {"prompt": "word " * 2000, "max_tokens": 1}, "/v1/completions"),
        request("misspelled", {**short, "temprature": 1}),
        request("good", short),
        request(3, short),
        request("streamed", {**short, "stream": True}),
        request("get", short, method="GET"),
        request("last", short),
    ]
    done = cli("generate", "--file", "-", stdin="\n".join(lines))
    assert done.code == 1
    assert "8 of 10 requests failed; the first: standard input:2: not JSON" in done.err
    found = results(done.out)
    assert len(found) == len(lines)
    codes = [result["response"] and result["response"]["status_code"] for result in found]
    assert codes == [200, None, None, 400, 400, None, None, None, None, 200]
    for number, message in (
        (3, "/v1/embeddings"),
        (6, "used twice"),
        (7, "custom_id"),
        (8, "stream"),
        (9, "GET"),
    ):
        error = found[number - 1]["error"]
        assert (error["code"], error["line"]) == ("invalid_request", number)
        assert message in error["message"]
    too_long, misspelled = (found[place]["response"]["body"]["error"] for place in (3, 4))
    assert too_long["code"] == "context_length_exceeded"
    assert misspelled["param"] == "temprature"


@pytest.mark.filterwarnings("always")
def test_a_batch_that_names_another_model_gives_a_warning(cli: Run, llm: LLM) -> None:
    line = request("a", {"model": "gpt-4o-mini", "messages": MESSAGES, "max_tokens": 1})
    done = cli("generate", stdin=line)
    assert done.code == 0
    assert f"warning: the batch asks for the model gpt-4o-mini, but {llm.model_name} answers" in done.err
    assert results(done.out)[0]["response"]["body"]["model"] == llm.model_name


def test_options_apply_to_requests_that_leave_them_out(cli: Run) -> None:
    lines = [
        request("long", {"messages": MESSAGES}),
        request("short", {"messages": MESSAGES, "max_tokens": 2}),
        request("new name", {"messages": MESSAGES, "max_completion_tokens": 3}),
    ]
    options = ["--max-tokens", "5", "--ignore-eos", "--logprobs", "1", "--json", "--logit-bias", "253=-100"]
    bodies = [
        one["response"]["body"] for one in results(cli("generate", *options, stdin="\n".join(lines)).out)
    ]
    assert [body["usage"]["completion_tokens"] for body in bodies] == [5, 2, 3]
    assert [len(body["choices"][0]["logprobs"]["content"]) for body in bodies] == [5, 2, 3]


def test_a_form_applies_to_requests_without_one(cli: Run) -> None:
    own = {"type": "json_object"}
    lines = [
        request("option", {"messages": MESSAGES}),
        request("own", {"messages": MESSAGES, "structured_outputs": {"choice": ["mine"]}}),
        request("format", {"messages": MESSAGES, "response_format": own, "max_tokens": 4}),
    ]
    done = cli("generate", "--choice", "yes", stdin="\n".join(lines))
    texts = [one["response"]["body"]["choices"][0]["message"]["content"] for one in results(done.out)]
    assert texts[:2] == ["yes", "mine"]
    assert texts[2].startswith("{")


def test_a_batch_is_reproducible_and_its_lines_get_different_seeds(cli: Run) -> None:
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 1.0}
    lines = "\n".join(request(str(number), body, "/v1/completions") for number in range(3))

    def texts() -> list[str]:
        return [
            one["response"]["body"]["choices"][0]["text"] for one in results(cli("generate", stdin=lines).out)
        ]

    first = texts()
    assert first == texts()
    assert len(set(first)) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a prompt"], "cannot be combined with prompts"),
        (["--json", "--prompt-logprobs", "1"], "--prompt-logprobs"),
    ],
)
def test_options_that_a_batch_does_not_support_are_usage_errors(
    arguments: list[str], words: str, plain_cli: Run, tmp_path: Path
) -> None:
    file = tmp_path / "batch.jsonl"
    file.write_text(request("a", {"messages": MESSAGES}))
    done = plain_cli("generate", "--file", str(file), *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_a_batch_line_has_its_file_and_line_number_and_its_body_or_error() -> None:
    good = Line("b:1", request("a", {"prompt": "x"}, "/v1/completions"), True)
    first, second = read_batch([good, Line("b:9", "[]", True)])
    assert (first.place, first.custom_id, first.body, first.problem) == ("b:1", "a", {"prompt": "x"}, None)
    assert (second.place, second.problem) == ("b:9", "not a JSON object")


def test_odd_values_of_a_line_end_no_other_line(cli: Run) -> None:
    """JSON can spell numbers and characters that cannot be sent or written as they are."""
    short = {"messages": MESSAGES, "max_tokens": 1}
    hot, not_a_number = ({**short, "temperature": value} for value in (12345678.5, 87654321.5))
    lines = [
        request("hot", hot).replace("12345678.5", "1e400"),
        request("not a number", not_a_number).replace("87654321.5", "NaN"),
        request("surrogate", {"prompt": "h\ud800i", "max_tokens": 1}, "/v1/completions"),
        request("\ud800", short),
        request("last", short),
    ]
    done = cli("generate", "--file", "-", stdin="\n".join(lines))
    assert done.code == 1
    found = results(done.out)
    assert [one["custom_id"] for one in found] == ["hot", "not a number", "surrogate", "\ud800", "last"]
    assert [one["response"]["status_code"] for one in found] == [400, 400, 400, 200, 200]


def test_a_request_without_log_probabilities_gets_none_although_the_option_asks_for_them(cli: Run) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1}
    lines = [request("off", {**body, "logprobs": False}), request("on", body)]
    done = cli("generate", "--logprobs", "2", stdin="\n".join(lines))
    off, on = (result["response"]["body"]["choices"][0] for result in results(done.out))
    assert off["logprobs"] is None
    assert len(on["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_the_default_length_of_a_line_is_lowered_to_what_the_context_has_left(plain_cli: Run) -> None:
    lines = [request("a", {"prompt": [5] * 20, "ignore_eos": True}, "/v1/completions")]
    done = plain_cli("generate", "-c", "24", stdin="\n".join(lines))
    [result] = results(done.out)
    assert result["response"]["body"]["usage"]["completion_tokens"] == 4
