"""`tiny-llm generate`: sources of prompts, the output, and parameters that reach the engine.

Oracle: the engine's own `generate` with the same parameters.
"""

import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_llm.output_processor import CompletionText
from tiny_llm.outputs import TextDelta
from tiny_llm.token_output import TokenOutput

from command_line import CommandResult, Run, check_blocks_are_freed, cli, expected_answer, llm, plain_cli
from tiny_llm import LLM, SamplingParams
from tiny_llm_cli.engine import asked_sampling
from tiny_llm_cli.options import SamplingOptions

__all__ = ["check_blocks_are_freed", "cli", "llm", "plain_cli"]


def test_one_prompt_prints_only_its_text(cli: Run, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6)
    text = llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0].text
    done = cli("generate", "Once upon a time", "--max-tokens", "6", "--temperature", "0")
    assert done == CommandResult(0, text + "\n", "")


def test_several_completions_have_headings(cli: Run) -> None:
    out = cli("generate", "Once upon", "The sky", "--n", "2", "--max-tokens", "3").out
    headings = [line for line in out.splitlines() if line.startswith("==>")]
    assert headings == [f"==> {prompt} ({i} of 2) <==" for prompt in ("Once upon", "The sky") for i in (1, 2)]


def test_a_completion_that_fails_is_reported_after_the_others_are_written(
    cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, num_pushed = CompletionText.push, Counter[int]()

    def raising(self: CompletionText, output: TokenOutput) -> TextDelta:
        num_pushed[self.index] += 1
        if (self.index, num_pushed[self.index]) == (1, 2):
            raise ArithmeticError("no text")
        return push(self, output)

    monkeypatch.setattr(CompletionText, "push", raising)
    done = cli("generate", "--json", "Once", "--n", "2", "--max-tokens", "3", "--ignore-eos")
    assert done.code == 1
    assert done.err.endswith("1 of 2 completions failed; the first: no text\n")
    [line] = [json.loads(line) for line in done.out.splitlines()]
    assert [found["finish_reason"] for found in line["outputs"]] == ["length", "error"]


def test_prompts_come_from_standard_input_line_by_line(cli: Run) -> None:
    done = cli("generate", "--json", "--max-tokens", "1", stdin="one\n\ntwo\r\nthree")
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["one", "two", "three"]


def test_json_output_has_all_fields_of_the_completions(cli: Run, llm: LLM) -> None:
    arguments = ["Once upon a time", "--n", "2", "--seed", "3", "--max-tokens", "4", "--logprobs", "2"]
    done = cli("generate", "--json", *arguments, "--temperature", "1", "--top-p", "1")
    [line] = [json.loads(line) for line in done.out.splitlines()]
    params = SamplingParams(n=2, seed=3, max_tokens=4, logprobs=2)
    expected = llm.generate("Once upon a time", params, use_tqdm=False)[0]
    assert line["prompt"] == "Once upon a time"
    assert tuple(line["prompt_token_ids"]) == expected.prompt_token_ids
    for found, output in zip(line["outputs"], expected.outputs, strict=True):
        assert set(found) == {field.name for field in fields(output)}
        assert tuple(found["token_ids"]) == output.token_ids
        assert output.logprobs is not None
        for position, logprobs in zip(found["logprobs"], output.logprobs, strict=True):
            assert position == {str(token): logprob._asdict() for token, logprob in logprobs.items()}
        for name in ("index", "text", "finish_reason", "stop_reason", "cumulative_logprob"):
            assert found[name] == getattr(output, name)


def test_lines_of_jsonl_have_their_own_parameters(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Once", "max_tokens": 1}\n\n{"prompt": [19556, 17], "n": 2, "seed": 1}\n')
    output = tmp_path / "answers.jsonl"
    done = cli("generate", "--file", str(file), "--json", "--max-tokens", "2", "--output", str(output))
    assert done == CommandResult(0, "", "")
    first, second = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(completion["token_ids"]) for completion in first["outputs"]] == [1]
    assert (second["prompt"], second["prompt_token_ids"]) == (None, [19556, 17])
    assert len(second["outputs"]) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", 'has neither "prompt" nor "messages"'),
        ('{"prompt": "a", "messages": []}', 'has both "prompt" and "messages"'),
        ('{"messages": "hi"}', '"messages" must be a non-empty list of objects'),
        ('{"messages": []}', '"messages" must be a non-empty list of objects'),
        ('{"prompt": ""}', "must be a non-empty string"),
        ('{"prompt": 3}', "not 3"),
        ('{"prompt": "a", "temprature": 1}', "unknown field 'temprature'"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be at least 1, not 0"),
    ],
)
def test_an_error_in_a_jsonl_line_names_the_file_and_line(
    line: str, words: str, tmp_path: Path, plain_cli: Run
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    done = plain_cli("generate", "--file", str(file))
    assert done.code == 1
    assert f"{file}:2: " in done.err
    assert words in done.err


def test_json_lines_on_standard_input_are_recognized(cli: Run) -> None:
    lines = '{"prompt": "Once", "max_tokens": 1}\n{"prompt": "The", "max_tokens": 2}\n'
    for arguments in (["--file", "-"], []):
        found = [
            json.loads(line) for line in cli("generate", "--json", *arguments, stdin=lines).out.splitlines()
        ]
        assert [line["prompt"] for line in found] == ["Once", "The"]
        assert [len(line["outputs"][0]["token_ids"]) for line in found] == [1, 2]


def test_text_that_only_looks_like_json_is_a_plain_prompt(cli: Run) -> None:
    lines = ['{"name": "tiny"}', "{ not JSON", "{}"]
    for line in lines:
        found = json.loads(cli("generate", "--json", "--max-tokens", "1", stdin=line).out)
        assert found["prompt"] == line


def test_a_line_may_be_a_conversation_and_its_id_is_returned(cli: Run, llm: LLM, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
    lines = [{"id": 7, "messages": messages}, {"custom_id": "x", "prompt": "The sky"}]
    file = tmp_path / "conversations.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ["--temperature", "0", "--max-tokens", "8"]
    done = cli("generate", "--file", str(file), "--json", *options)
    chat, prompt = [json.loads(line) for line in done.out.splitlines()]
    params = SamplingParams(temperature=0.0, max_tokens=8)
    assert chat["outputs"][0]["text"] == llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
    assert (chat["id"], chat["prompt"], chat["messages"]) == (7, None, messages)
    assert (prompt["custom_id"], prompt["prompt"]) == ("x", "The sky")
    assert "messages" not in prompt
    titles = [
        line for line in cli("generate", "--file", str(file), *options).out.splitlines() if "==>" in line
    ]
    assert titles == ["==> Name a colour. <==", "==> The sky <=="]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "word " * 2000}, "the context of 1024"),
        ({"messages": [{"role": "wizard"}]}, "messages[0]"),
        ({"prompt": [99999999]}, "99999999"),
    ],
)
def test_a_line_that_can_never_run_is_rejected_before_any_line_runs(
    line: dict[str, object], words: str, cli: Run, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + json.dumps(line))
    done = cli("generate", "--file", str(file), "--json")
    assert (done.code, done.out) == (1, "")
    assert f"{file}:2: " in done.err
    assert words in done.err


def test_the_chat_option_applies_the_chat_template(cli: Run, llm: LLM) -> None:
    done = cli("generate", "--chat", "--json", "--max-tokens", "8", "--temperature", "0", "Name a colour.")
    line = json.loads(done.out)
    assert line["prompt"] == "Name a colour."
    assert line["outputs"][0]["text"] == expected_answer(llm, "Name a colour.")


def test_the_same_command_gives_the_same_text(cli: Run, tmp_path: Path) -> None:
    arguments = ["generate", "Once upon a time", "--n", "2", "--max-tokens", "4", "--seed", "1"]
    assert cli(*arguments).out == cli(*arguments).out


def test_a_prompt_that_never_fits_is_rejected_before_any_prompt_runs(cli: Run) -> None:
    done = cli("generate", "short", "word " * 2000, "--json")
    assert (done.code, done.out) == (1, "")
    assert "the context of 1024" in done.err, "64 blocks hold 1024 tokens"


def test_every_sampling_parameter_reaches_the_engine(cli: Run, llm: LLM) -> None:
    """Oracle: the same parameters through the Python interface."""
    options = {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "prompt_logprobs": 1,
        "logit_bias": {338: -100.0, 253: 2.0},
        "stop_token_ids": [30],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    arguments = ["--presence-penalty", "0.5", "--frequency-penalty", "0.25", "--repetition-penalty", "1.2"]
    arguments += ["--min-tokens", "3", "--prompt-logprobs", "1", "--stop-token-id", "30", "--include-stop"]
    arguments += ["--logit-bias", "338=-100", "--logit-bias", "253=2", "--show-special-tokens"]
    params = SamplingParams(temperature=0.0, max_tokens=12, **options)  # type: ignore[arg-type]
    [expected] = llm.generate(["The sky is"], params, use_tqdm=False)
    arguments += ["--temperature", "0", "--max-tokens", "12"]
    found = json.loads(cli("generate", "The sky is", "--json", *arguments).out)
    assert tuple(found["outputs"][0]["token_ids"]) == expected.outputs[0].token_ids
    assert found["outputs"][0]["text"] == expected.outputs[0].text
    assert len(found["prompt_logprobs"]) == len(expected.prompt_token_ids)
    assert found["prompt_logprobs"][0] is None


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--logit-bias", "a=1", "'a=1' is not ID=BIAS"),
        ("--logit-bias", "5=101", "--logit-bias[5] must be from -100 to 100, not 101.0"),
        ("--logit-bias", "99999999=1", "--logit-bias has token id 99999999, which is outside the vocabulary"),
        ("--stop-token-id", "49152", "--stop-token-id has token id 49152, which is outside the vocabulary"),
        ("--min-tokens", "500", "--min-tokens must be from 0 to --max-tokens (128), not 500"),
        ("--presence-penalty", "3", "--presence-penalty must be from -2 to 2, not 3"),
        ("--prompt-logprobs", "1", "add --json"),
    ],
)
def test_an_error_names_the_option_of_an_invalid_sampling_parameter(
    plain_cli: Run, option: str, value: str, message: str
) -> None:
    done = plain_cli("generate", "hello", option, value)
    assert message in " ".join(done.err.split())


def test_several_completions_are_sampled_even_if_the_model_recommends_greedy_decoding() -> None:
    """One completion follows the recommendation; for several the command's own temperature is used."""
    recommended = {"temperature": 0.0, "frequency_penalty": 0.3}
    several = asked_sampling(SamplingOptions(), max_tokens=8, n=3).params(recommended)
    assert (several.temperature, several.frequency_penalty) == (1.0, 0.3)
    assert asked_sampling(SamplingOptions(), max_tokens=8, n=1).params(recommended).temperature == 0.0
    asked = asked_sampling(SamplingOptions(temperature=0.0), max_tokens=8, n=3)
    assert asked.params(recommended).temperature == 0.0


# ---- the form of the answers ----

CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
    "additionalProperties": False,
}


def test_answers_satisfy_the_schema_in_a_file(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "city.json"
    file.write_text(json.dumps(CITY))
    arguments = ["--json-schema", str(file), "--n", "3", "--temperature", "1", "--json"]
    found = json.loads(cli("generate", "--chat", "Describe Paris.", *arguments).out)
    for output in found["outputs"]:
        assert output["finish_reason"] == "stop"
        assert list(json.loads(output["text"])) == ["name", "big"]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--json-object", "--max-tokens", "200"], r"\{.*\}"),
        (["--regex", "[a-c]{4}"], "[a-c]{4}"),
        (["--choice", "yes", "--choice", "no"], "yes|no"),
    ],
)
def test_each_form_has_an_option(cli: Run, arguments: list[str], pattern: str) -> None:
    done = cli("generate", "Answer in JSON:", *arguments, "--temperature", "0")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(pattern, done.out.rstrip("\n"), re.DOTALL)


def test_a_grammar_comes_from_a_file(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "sum.lark"
    file.write_text('start: NUMBER "+" NUMBER\nNUMBER: /[0-9]{1,3}/\n')
    assert re.fullmatch(r"\d+\+\d+\n", cli("generate", "A sum:", "--grammar", str(file)).out)


def test_a_line_has_its_own_form(cli: Run) -> None:
    lines = [
        {"prompt": "A", "structured_outputs": {"choice": ["red"]}},
        {"prompt": "A", "structured_outputs": {"json": CITY}},
        {"prompt": "A"},
        {"prompt": "A", "structured_outputs": None, "max_tokens": 3},
    ]
    done = cli("generate", "--json", "--choice", "other", stdin="\n".join(map(json.dumps, lines)))
    texts = [json.loads(line)["outputs"][0]["text"] for line in done.out.splitlines()]
    assert (texts[0], texts[2]) == ("red", "other")
    assert list(json.loads(texts[1])) == ["name", "big"]
    assert texts[3] != "other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--choice", "a", "--regex", "b"], "an answer has only one form, not --regex and --choice"),
        (["--choice", ""], "--choice must be a list of strings that are not empty"),
        (["--regex", "("], "--regex: the regular expression '(' is wrong at character 1: unclosed group"),
        (["--json-schema", "{missing}"], "missing: No such file"),
        (["--json-schema", "{file}"], "--json-schema at #/items: Invalid type: strin"),
        (["--grammar", "{file}"], "--grammar must be a grammar in Lark's syntax"),
        (["--json-schema", "{latin}"], "--json-schema: {latin} is not UTF-8 text"),
    ],
)
def test_an_error_names_the_option_of_a_wrong_form(
    cli: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    files = {name: str(tmp_path / name) for name in ("file", "latin", "missing")}
    (tmp_path / "file").write_text('{"items": {"type": "strin"}}')
    (tmp_path / "latin").write_bytes(b"\xe9")
    done = cli("generate", "hello", *(argument.format(**files) for argument in arguments))
    assert (done.code != 0, done.out) == (True, "")
    assert message.format(**files) in " ".join(done.err.split())


def test_the_default_length_is_lowered_to_what_the_context_has_left(plain_cli: Run) -> None:
    done = plain_cli("generate", "-c", "60", "The sky is", "--json", "--ignore-eos")
    result = json.loads(done.out)
    assert len(result["prompt_token_ids"]) + len(result["outputs"][0]["token_ids"]) == 60
    asked = plain_cli("generate", "-c", "60", "The sky is", "--max-tokens", "128")
    assert asked.code == 1
    assert "exceed the context of 60" in asked.err


def test_a_results_file_keeps_its_content_until_there_are_results(cli: Run, tmp_path: Path) -> None:
    results = tmp_path / "results.txt"
    results.write_text("valuable\n")
    assert cli("generate", "Once", "--max-tokens", "9999", "-o", str(results)).code == 1
    assert results.read_text() == "valuable\n"
    assert cli("generate", "Once", "--max-tokens", "2", "-o", str(results)).code == 0
    assert "valuable" not in results.read_text()


def test_a_lone_carriage_return_does_not_end_a_line_of_a_file(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"one\rtwo\r\nthree\n")
    for source in ({}, {"stdin": file.read_bytes().decode()}):
        arguments = [] if source else ["-f", str(file)]
        done = cli("generate", "--json", "--max-tokens", "1", *arguments, **source)
        assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["one\rtwo", "three"]


@pytest.mark.parametrize(
    ("option", "content"), [("--grammar", 'start: "yes"'), ("--json-schema", '{"const": "yes"}')]
)
def test_the_file_of_a_form_may_start_with_a_byte_order_mark(
    cli: Run, tmp_path: Path, option: str, content: str
) -> None:
    file = tmp_path / "form"
    file.write_text(content, encoding="utf-8-sig")
    done = cli("generate", "Say it.", option, str(file))
    assert (done.code, done.out.strip().strip('"')) == (0, "yes")


@pytest.mark.parametrize("value", ["NaN", "[1e400]", '{"a": -Infinity}'])
def test_an_id_that_json_cannot_express_is_refused(cli: Run, value: str) -> None:
    done = cli("generate", "--json", stdin=f'{{"id": {value}, "prompt": "Once"}}')
    assert (done.code, done.out) == (1, "")
    assert 'standard input:1: "id" has a number that JSON cannot express' in done.err
