"""From tokens to text: stop strings, text held back, streams. The oracle decodes all ids at once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.output_processor import CompletionText, RequestState
from tiny_llm.outputs import Logprob, RequestUsage, TextDelta
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import TokenLogprobs
from tiny_llm.stop_string import StopString
from tiny_llm.token_output import TokenOutput

from tiny_llm_checkpoints.gguf_tokenizer import byte_level_bpe
from tiny_llm_checkpoints.tokenizer import Tokenizer


def byte_alphabet() -> list[str]:
    """GPT-2's visible character for each byte, in the order of the bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


BYTES = byte_alphabet()
PIECES = ["ab", "abc", "ca", "bb", "Ġa", "END"]
END = 256 + len(PIECES)  # a control token, which is not text
BPE = byte_level_bpe([*BYTES, *PIECES], [], "smollm")
BPE.add_special_tokens(["<end>"])
TOKENIZER = Tokenizer(BPE)


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def token_output(
    token: int, reason: str | None = None, stop_token: int | None = None, seq_id: str = "r"
) -> TokenOutput:
    return TokenOutput("r", seq_id, token, None, reason, stop_token)


def with_logprob(output: TokenOutput) -> TokenOutput:
    """The same token, with a log-probability that tells it from others."""
    return output._replace(logprobs=TokenLogprobs(-float(output.token), 1, ()))


def run(
    ids: list[int], params: SamplingParams, reason: str = "length"
) -> tuple[CompletionText, list[TextDelta]]:
    """Push ids until the completion ends; the last one ends it for `reason`."""
    text, deltas = CompletionText(0, TOKENIZER, params), []
    for i, token in enumerate(ids):
        deltas.append(text.push(token_output(token, reason if i == len(ids) - 1 else None)))
        if text.finish_reason is not None:
            break
    return text, deltas


abc_ids = st.lists(
    st.sampled_from([*ids_of("abcé"), *range(256, 256 + len(PIECES)), END]), min_size=1, max_size=25
)
stops = st.lists(st.text("abcé ", min_size=1, max_size=4), max_size=3)


@given(abc_ids, stops)
def test_the_text_ends_before_the_first_stop_string_and_the_stream_adds_up_to_it(
    ids: list[int], stop: list[str]
) -> None:
    completion, deltas = run(ids, SamplingParams(stop=stop))
    pushed = len(completion.token_ids)
    whole = TOKENIZER.decode(ids[:pushed])
    found = [whole.find(s) for s in stop if s in whole]
    assert completion.output.text == (whole[: min(found)] if found else whole)
    assert "".join(delta.text for delta in deltas) == completion.output.text
    assert completion.finish_reason == ("stop" if found else "length")
    if found:
        assert completion.stop_reason in stop
        assert whole[min(found) :].startswith(str(completion.stop_reason))
    if pushed > 1:
        assert not any(s in TOKENIZER.decode(ids[: pushed - 1]).rstrip("\ufffd") for s in stop), (
            "it ended too late"
        )


@given(st.lists(st.sampled_from(ids_of("abc")), min_size=2, max_size=25), stops)
def test_no_more_is_held_back_than_could_begin_a_stop_string(ids: list[int], stop: list[str]) -> None:
    completion, streamed = CompletionText(0, TOKENIZER, SamplingParams(stop=stop)), ""
    for i, token in enumerate(ids):
        streamed += completion.push(token_output(token)).text
        if completion.finish_reason is not None:
            return
        so_far = TOKENIZER.decode(ids[: i + 1])
        begins = [length for s in stop for length in range(1, len(s)) if so_far.endswith(s[:length])]
        assert streamed == so_far[: len(so_far) - max(begins, default=0)]


@given(st.text("ab", min_size=1, max_size=6), st.lists(st.text("ab", max_size=5), max_size=12))
def test_a_stop_string_knows_what_the_text_ends_with(text: str, pieces: list[str]) -> None:
    """Oracle: every beginning of it, tried. It is found wherever it ends, also where it overlaps itself."""
    stop, so_far = StopString(text), ""
    for piece in pieces:
        ends = [n for n in range(1, len(piece) + 1) if (so_far + piece[:n]).endswith(text)]
        assert stop.push(piece) == (ends[0] if ends else None)
        so_far += piece
        assert stop.matched == max(n for n in range(len(text)) if so_far.endswith(text[:n]))


def test_a_long_stop_string_costs_no_more_than_a_short_one() -> None:
    looks = 0

    class Counted(str):
        def __getitem__(self, place: Any) -> str:
            nonlocal looks
            looks += 1
            return super().__getitem__(place)

    stop = StopString(Counted("a" * 20_000 + "b"))
    for _ in range(30_000):
        assert stop.push("a") is None
    assert stop.matched == 20_000
    assert looks < 8 * 30_000, "of a character, so many"


def test_a_stop_string_that_is_split_over_tokens_is_found() -> None:
    completion, deltas = run(ids_of("hello STOP it"), SamplingParams(stop=" STOP"))
    assert completion.output.text == "hello"
    assert (completion.finish_reason, completion.stop_reason) == ("stop", " STOP")
    assert [delta.text for delta in deltas] == [*"hello", "", "", "", "", ""]


def test_what_looked_like_a_stop_string_and_was_none_is_streamed() -> None:
    _, deltas = run(ids_of("a STO a"), SamplingParams(stop=" STOP"))
    assert [delta.text for delta in deltas] == ["a", "", "", "", "", " STO", " a"], (
        "the second space is held back too"
    )


def test_the_earliest_of_several_stop_strings_wins() -> None:
    piece = 256 + PIECES.index("END")
    completion, _ = run([*ids_of("x"), piece, *ids_of("y")], SamplingParams(stop=["D", "ND", "zzz"]))
    assert (completion.output.text, completion.stop_reason) == ("xE", "ND")


def test_text_held_back_is_given_when_the_completion_ends() -> None:
    _, deltas = run(ids_of("a ST"), SamplingParams(stop=" STOP"))
    assert [delta.text for delta in deltas] == ["a", "", "", " ST"]


def test_a_character_that_is_split_over_tokens_comes_whole() -> None:
    _, deltas = run(ids_of("é€"), SamplingParams())
    assert [delta.text for delta in deltas] == ["", "é", "", "", "€"]


def test_a_character_that_never_became_whole_shows_as_such_at_the_end() -> None:
    completion, deltas = run(ids_of("a€")[:3], SamplingParams())
    assert completion.output.text == "a\ufffd"
    assert "".join(delta.text for delta in deltas) == "a\ufffd"


def test_an_end_of_sequence_token_is_a_token_and_no_text() -> None:
    completion, _ = run([*ids_of("hi"), END], SamplingParams(), reason="stop")
    output = completion.output
    assert (output.text, output.token_ids[-1], output.finish_reason, output.stop_reason) == (
        "hi",
        END,
        "stop",
        None,
    )


def test_a_stop_token_is_a_token_and_no_text_and_the_reason() -> None:
    completion = CompletionText(0, TOKENIZER, SamplingParams(stop_token_ids=(ord("!"),)))
    completion.push(token_output(ord("a")))
    completion.push(token_output(ord("!"), "stop", ord("!")))
    output = completion.output
    assert (output.text, output.token_ids, output.stop_reason) == ("a", (ord("a"), ord("!")), ord("!"))


def test_log_probabilities_come_by_token_with_rank_and_text() -> None:
    completion = CompletionText(0, TOKENIZER, SamplingParams(logprobs=2))
    tops = ((ord("a"), -0.25), (ord("b"), -2.0))
    completion.push(TokenOutput("r", "r", ord("c"), TokenLogprobs(-3.0, 3, tops), None, None))
    completion.push(TokenOutput("r", "r", ord("a"), TokenLogprobs(-0.25, 1, tops), "length", None))
    first, second = completion.output.logprobs or ()
    assert first[ord("c")] == (-3.0, 3, "c")
    assert first[ord("a")] == (-0.25, 1, "a")
    assert set(second) == {ord("a"), ord("b")}
    assert completion.output.cumulative_logprob == -3.25


def test_without_logprobs_there_are_none() -> None:
    completion, _ = run(ids_of("a"), SamplingParams())
    assert completion.output.logprobs is None
    assert completion.output.cumulative_logprob is None


def test_a_request_is_finished_when_all_its_completions_are() -> None:
    request = RequestState("r", "p", [1, 2], TOKENIZER, SamplingParams(n=2))
    request.push(token_output(ord("a"), "length", seq_id="r/1"))
    assert not request.finished
    assert [c.text for c in request.output.outputs] == ["", "a"]
    request.push(token_output(ord("b"), "length", seq_id="r/0"))
    output = request.output
    assert (request.finished, output.finished, output.prompt, output.prompt_token_ids) == (
        True,
        True,
        "p",
        (1, 2),
    )
    assert [c.index for c in output.outputs] == [0, 1]


def test_events_add_up_to_the_output_and_the_last_has_the_usage() -> None:
    request = RequestState("r", None, [1, 2], TOKENIZER, SamplingParams(n=2, logprobs=0, stop="X"))
    first = with_logprob(token_output(ord("a"), seq_id="r/1"))._replace(num_cached_tokens=1)
    events = [request.push(first)]
    events += [request.push(with_logprob(token_output(token, seq_id="r/1"))) for token in ids_of("bX")]
    events += [request.push(with_logprob(token_output(ord("c"), "length", seq_id="r/0")))]
    output = request.output
    for index, completion in enumerate(output.outputs):
        own = [event for event in events if event.index == index]
        assert "".join(event.text for event in own) == completion.text
        assert tuple(token for event in own for token in event.token_ids) == completion.token_ids
        assert tuple(entry for event in own for entry in event.logprobs or ()) == completion.logprobs
        assert [event.finish_reason for event in own[:-1]] == [None] * (len(own) - 1)
        assert (own[-1].finish_reason, own[-1].stop_reason) == (
            completion.finish_reason,
            completion.stop_reason,
        )
    assert [event.usage for event in events[:-1]] == [None] * 3
    usage = events[-1].usage
    assert usage == RequestUsage(2, 4, 1, output.metrics)  # type: ignore[arg-type]
    assert usage.metrics == output.metrics


def test_an_aborted_request_says_so_and_keeps_what_had_ended() -> None:
    request = RequestState("r", None, [1], TOKENIZER, SamplingParams(n=2))
    request.push(token_output(ord("a"), "length", seq_id="r/0"))
    [event] = request.abort()
    assert [c.finish_reason for c in request.output.outputs] == ["length", "abort"]
    assert (event.index, event.token_ids, event.finish_reason) == (1, (), "abort")
    assert event.usage is not None
    assert event.usage.completion_tokens == 1
    assert request.abort() == []


def test_aborting_gives_the_text_that_was_held_back() -> None:
    request = RequestState("r", None, [1], TOKENIZER, SamplingParams(stop="END"))
    events = [request.push(token_output(token)) for token in ids_of("xEN")]
    events += request.abort()
    assert [event.text for event in events] == ["x", "", "", "EN"]
    assert request.output.outputs[0].text == "xEN"


def test_times_are_taken_from_arrival_to_the_end() -> None:
    request = RequestState("r", None, [1], TOKENIZER, SamplingParams())
    before = request.output.metrics
    assert before is not None
    assert (before.first_token, before.ttft, before.finished) == (None, None, None)
    request.push(token_output(ord("a"), "length"))
    after = request.output.metrics
    assert after is not None
    assert after.first_token is not None
    assert after.finished is not None
    assert after.arrival <= after.first_token <= after.finished
    assert after.ttft == pytest.approx(after.first_token - after.arrival)


# Stopping later, and what the text keeps.


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 5])
def test_a_stop_string_counts_only_after_min_tokens(min_tokens: int) -> None:
    """As in vLLM: what was complete with the first min_tokens tokens does not stop."""
    params = SamplingParams(stop="xy", min_tokens=min_tokens)
    text, _ = run(ids_of("axybcxyd"), params)
    complete_after = {0: 3, 2: 3, 3: 7, 5: 7}[min_tokens]
    assert len(text.token_ids) == complete_after
    assert text.output.text == "axybcxyd"[: complete_after - 2]
    assert (text.finish_reason, text.stop_reason) == ("stop", "xy")


def test_a_short_stop_string_in_old_text_is_not_found_because_of_a_long_one() -> None:
    params = SamplingParams(stop=["b", "a very long stop string"], min_tokens=3)
    text, _ = run(ids_of("abcdef"), params)
    assert text.output.text == "abcdef"


def test_the_stop_string_is_part_of_the_text_when_asked_for() -> None:
    text, deltas = run(ids_of("one. two. "), SamplingParams(stop=". ", include_stop_str_in_output=True))
    assert text.output.text == "one. "
    assert "".join(delta.text for delta in deltas) == "one. "


@pytest.mark.parametrize("shown", [False, True])
def test_a_stop_tokens_text_is_kept_only_when_asked_for(shown: bool) -> None:
    params = SamplingParams(stop_token_ids=[ord("!")], include_stop_str_in_output=shown)
    completion = CompletionText(0, TOKENIZER, params)
    completion.push(token_output(ord("a")))
    completion.push(token_output(ord("!"), "stop", ord("!")))
    assert completion.output.text == ("a!" if shown else "a")
    assert completion.output.token_ids == (ord("a"), ord("!"))
    assert completion.output.stop_reason == ord("!")


@pytest.mark.parametrize(
    ("skip", "shown", "expected"),
    [(True, False, "ab"), (False, False, "a<end>b"), (True, True, "ab"), (False, True, "a<end>b<end>")],
)
def test_control_tokens_are_text_when_asked_for_and_the_last_one_is_a_stop(
    skip: bool, shown: bool, expected: str
) -> None:
    """The last one, which ends the text, shows only where stops do."""
    params = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=shown)
    completion = CompletionText(0, TOKENIZER, params)
    for token, reason in ((ord("a"), None), (END, None), (ord("b"), None), (END, "stop")):
        completion.push(token_output(token, reason))
    assert completion.output.text == expected


def test_prompt_logprobs_have_an_entry_for_each_token_but_the_first() -> None:
    request = RequestState("r", None, [97, 98, 99], TOKENIZER, SamplingParams(n=2))
    found = (TokenLogprobs(-0.5, 1, ((98, -0.5),)), TokenLogprobs(-2.0, 2, ((100, -0.1),)))
    events = [
        request.push(token_output(ord("x"), "length", seq_id=seq_id)._replace(prompt_logprobs=found))
        for seq_id in ("r/0", "r/1")
    ]
    assert [event.prompt_logprobs for event in events] == [request.output.prompt_logprobs, None]
    assert request.output.prompt_logprobs == (
        None,
        {98: Logprob(-0.5, 1, "b")},
        {99: Logprob(-2.0, 2, "c"), 100: Logprob(-0.1, 1, "d")},
    )


OTHER = TOKENIZER.vocab_size  # "<next>", which the tokenizer below has besides "<end>"
SPELLING_BPE = byte_level_bpe([*BYTES, *PIECES], [], "smollm")
SPELLING_BPE.add_special_tokens(["<end>", "<next>"])
SPELLING = Tokenizer(SPELLING_BPE)


def streamed(ids: list[int], last: str | None = None, **params: Any) -> tuple[CompletionText, list[str]]:
    """Push ids until the text ends; the completion and what it streamed."""
    completion, pieces = CompletionText(0, SPELLING, SamplingParams(max_tokens=99, **params)), []
    for place, token in enumerate(ids):
        reason = last if place == len(ids) - 1 else None
        pieces.append(completion.push(token_output(token, reason)).text)
        if completion.finish_reason is not None:
            break
    return completion, pieces


@pytest.mark.parametrize(
    ("ids", "stop", "text", "num_tokens"),
    [
        ([*ids_of("ab"), END, *ids_of("cd")], "<end>", "ab", 3),
        ([*ids_of("ab"), END, *ids_of("cd")], "b<end>c", "a", 4),
        ([*ids_of("ab"), END, OTHER, *ids_of("cd")], "<end><next>", "ab", 4),
        ([*ids_of("ab"), END, *ids_of("c"), OTHER, *ids_of("d")], "ab<end>c<next>d", "", 6),
        ([*ids_of("a"), END, *ids_of("a"), END, *ids_of("x")], "a<end>x", "a", 5),
        ([*ids_of("é")[:1], END, *ids_of("cd")], "<end>", "\ufffd", 2),
        (ids_of("a<end>b"), "<end>", "a", 6),  # spelled by ordinary tokens
    ],
)
@pytest.mark.parametrize("shown", [False, True])
def test_a_stop_string_matches_the_control_tokens_that_it_spells(
    ids: list[int], stop: str, text: str, num_tokens: int, shown: bool
) -> None:
    completion, pieces = streamed(ids, stop=stop, include_stop_str_in_output=shown)
    assert completion.output.text == text + (stop if shown else "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) == num_tokens
    assert "".join(pieces) == completion.output.text


@pytest.mark.parametrize("stop", ["<end>x", "y<end>", "<next>", "<end><next>", "d<end>"])
def test_a_control_token_that_is_only_a_part_of_the_stop_string_ends_nothing(stop: str) -> None:
    ids = [*ids_of("ab"), END, *ids_of("cd")]
    completion, pieces = streamed(ids, "length", stop=stop)
    assert (completion.output.text, completion.finish_reason) == ("abcd", "length")
    assert "".join(pieces) == "abcd"


def test_text_that_may_begin_such_a_stop_string_is_held_back() -> None:
    _, pieces = streamed([*ids_of("abc"), END, *ids_of("dx")], "length", stop="bc<end>de")
    assert pieces == ["a", "", "", "", "", "bcdx"]


def test_such_a_stop_string_counts_only_after_min_tokens() -> None:
    ids = [*ids_of("a"), END, *ids_of("b"), END, *ids_of("c")]
    completion, _ = streamed(ids, stop="<end>", min_tokens=2)
    assert (completion.output.text, len(completion.token_ids)) == ("ab", 4)


def test_an_end_of_sequence_token_that_the_stop_string_spells_is_its_reason() -> None:
    completion, _ = streamed([*ids_of("ab"), END], "stop", stop="b<end>")
    assert (completion.output.text, completion.stop_reason) == ("a", "b<end>")


spelled = st.lists(st.sampled_from([*ids_of("ab"), END, OTHER]), min_size=1, max_size=14)
parts_of_stops = st.lists(st.sampled_from(["a", "b", "<end>", "<next>"]), min_size=1, max_size=4)
spelling_stops = parts_of_stops.map("".join).filter(lambda text: "<" in text)


@given(spelled, st.lists(spelling_stops, min_size=1, max_size=3))
def test_with_control_tokens_left_out_the_text_ends_where_it_does_with_them(
    ids: list[int], stop: list[str]
) -> None:
    """Oracle: the same strings in the text that writes control tokens out, less these tokens."""
    hidden, pieces = streamed(ids, "length", stop=stop)
    written, _ = streamed(ids, "length", stop=stop, skip_special_tokens=False)
    assert hidden.output.text == written.output.text.replace("<end>", "").replace("<next>", "")
    assert hidden.token_ids == written.token_ids
    assert "".join(pieces) == hidden.output.text


def test_aborting_gives_what_the_detokenizer_holds() -> None:
    completion = CompletionText(0, TOKENIZER, SamplingParams())
    completion.push(token_output(ids_of("é")[0]))
    assert completion.abort().text == completion.output.text == "\ufffd"
