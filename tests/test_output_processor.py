"""From tokens to text: stop strings, held-back text, streams. Oracle: decoding all ids at once."""

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
END = 256 + len(PIECES)  # a control token: it has no text
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
    """Return the same output with a log-probability that is different for each token."""
    return output._replace(logprobs=TokenLogprobs(-float(output.token), 1, ()))


def run(
    ids: list[int], params: SamplingParams, reason: str = "length"
) -> tuple[CompletionText, list[TextDelta]]:
    """Push ids until the completion finishes; the last id finishes it for `reason`."""
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
def test_the_text_ends_before_the_first_stop_string_and_equals_its_joined_deltas(
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
            "it should have stopped earlier"
        )


@given(st.lists(st.sampled_from(ids_of("abc")), min_size=2, max_size=25), stops)
def test_only_text_that_could_be_the_start_of_a_stop_string_is_held_back(
    ids: list[int], stop: list[str]
) -> None:
    completion, streamed = CompletionText(0, TOKENIZER, SamplingParams(stop=stop)), ""
    for i, token in enumerate(ids):
        streamed += completion.push(token_output(token)).text
        if completion.finish_reason is not None:
            return
        text = TOKENIZER.decode(ids[: i + 1])
        prefixes = [length for s in stop for length in range(1, len(s)) if text.endswith(s[:length])]
        assert streamed == text[: len(text) - max(prefixes, default=0)]


@given(st.text("ab", min_size=1, max_size=6), st.lists(st.text("ab", max_size=5), max_size=12))
def test_a_stop_string_tracks_how_much_of_it_the_text_ends_with(text: str, pieces: list[str]) -> None:
    """Oracle: trying every prefix of the stop string. A match that overlaps a failed match is found too."""
    stop, pushed = StopString(text), ""
    for piece in pieces:
        ends = [n for n in range(1, len(piece) + 1) if (pushed + piece[:n]).endswith(text)]
        assert stop.push(piece) == (ends[0] if ends else None)
        pushed += piece
        assert stop.matched == max(n for n in range(len(text)) if pushed.endswith(text[:n]))


def test_matching_a_long_stop_string_takes_linear_time() -> None:
    num_reads = 0

    class CountingString(str):
        def __getitem__(self, place: Any) -> str:
            nonlocal num_reads
            num_reads += 1
            return super().__getitem__(place)

    stop = StopString(CountingString("a" * 20_000 + "b"))
    for _ in range(30_000):
        assert stop.push("a") is None
    assert stop.matched == 20_000
    assert num_reads < 8 * 30_000, "too many reads of the stop string's characters"


def test_a_stop_string_split_over_several_tokens_is_found() -> None:
    completion, deltas = run(ids_of("hello STOP it"), SamplingParams(stop=" STOP"))
    assert completion.output.text == "hello"
    assert (completion.finish_reason, completion.stop_reason) == ("stop", " STOP")
    assert [delta.text for delta in deltas] == [*"hello", "", "", "", "", ""]


def test_held_back_text_that_does_not_become_a_stop_string_is_streamed() -> None:
    _, deltas = run(ids_of("a STO a"), SamplingParams(stop=" STOP"))
    assert [delta.text for delta in deltas] == ["a", "", "", "", "", " STO", " a"], (
        "the second space is held back too"
    )


def test_the_earliest_of_several_stop_strings_wins() -> None:
    piece = 256 + PIECES.index("END")
    completion, _ = run([*ids_of("x"), piece, *ids_of("y")], SamplingParams(stop=["D", "ND", "zzz"]))
    assert (completion.output.text, completion.stop_reason) == ("xE", "ND")


def test_held_back_text_is_streamed_when_the_completion_finishes() -> None:
    _, deltas = run(ids_of("a ST"), SamplingParams(stop=" STOP"))
    assert [delta.text for delta in deltas] == ["a", "", "", " ST"]


def test_a_character_split_over_several_tokens_is_streamed_whole() -> None:
    _, deltas = run(ids_of("é€"), SamplingParams())
    assert [delta.text for delta in deltas] == ["", "é", "", "", "€"]


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character() -> None:
    completion, deltas = run(ids_of("a€")[:3], SamplingParams())
    assert completion.output.text == "a\ufffd"
    assert "".join(delta.text for delta in deltas) == "a\ufffd"


def test_an_end_of_sequence_token_is_in_the_token_ids_but_not_in_the_text() -> None:
    completion, _ = run([*ids_of("hi"), END], SamplingParams(), reason="stop")
    output = completion.output
    assert (output.text, output.token_ids[-1], output.finish_reason, output.stop_reason) == (
        "hi",
        END,
        "stop",
        None,
    )


def test_a_stop_token_is_in_the_token_ids_and_the_stop_reason_but_not_in_the_text() -> None:
    completion = CompletionText(0, TOKENIZER, SamplingParams(stop_token_ids=(ord("!"),)))
    completion.push(token_output(ord("a")))
    completion.push(token_output(ord("!"), "stop", ord("!")))
    output = completion.output
    assert (output.text, output.token_ids, output.stop_reason) == ("a", (ord("a"), ord("!")), ord("!"))


def test_logprobs_map_each_token_id_to_its_logprob_rank_and_text() -> None:
    completion = CompletionText(0, TOKENIZER, SamplingParams(logprobs=2))
    tops = ((ord("a"), -0.25), (ord("b"), -2.0))
    completion.push(TokenOutput("r", "r", ord("c"), TokenLogprobs(-3.0, 3, tops), None, None))
    completion.push(TokenOutput("r", "r", ord("a"), TokenLogprobs(-0.25, 1, tops), "length", None))
    first, second = completion.output.logprobs or ()
    assert first[ord("c")] == (-3.0, 3, "c")
    assert first[ord("a")] == (-0.25, 1, "a")
    assert set(second) == {ord("a"), ord("b")}
    assert completion.output.cumulative_logprob == -3.25


def test_logprobs_are_none_unless_requested() -> None:
    completion, _ = run(ids_of("a"), SamplingParams())
    assert completion.output.logprobs is None
    assert completion.output.cumulative_logprob is None


def test_a_request_is_finished_when_all_its_completions_are_finished() -> None:
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


def test_events_concatenate_to_the_output_and_the_last_one_has_the_usage() -> None:
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


def test_aborting_a_request_finishes_only_its_unfinished_completions_with_abort() -> None:
    request = RequestState("r", None, [1], TOKENIZER, SamplingParams(n=2))
    request.push(token_output(ord("a"), "length", seq_id="r/0"))
    [event] = request.abort()
    assert [c.finish_reason for c in request.output.outputs] == ["length", "abort"]
    assert (event.index, event.token_ids, event.finish_reason) == (1, (), "abort")
    assert event.usage is not None
    assert event.usage.completion_tokens == 1
    assert request.abort() == []


def test_an_abort_returns_the_held_back_text() -> None:
    request = RequestState("r", None, [1], TOKENIZER, SamplingParams(stop="END"))
    events = [request.push(token_output(token)) for token in ids_of("xEN")]
    events += request.abort()
    assert [event.text for event in events] == ["x", "", "", "EN"]
    assert request.output.outputs[0].text == "xEN"


def test_metrics_have_the_times_of_arrival_first_token_and_finish() -> None:
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


# min_tokens, and which stops and control tokens the text contains.


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 5])
def test_a_stop_string_stops_only_after_min_tokens(min_tokens: int) -> None:
    """As in vLLM: a stop string that is complete within the first min_tokens tokens does not stop."""
    params = SamplingParams(stop="xy", min_tokens=min_tokens)
    text, _ = run(ids_of("axybcxyd"), params)
    complete_after = {0: 3, 2: 3, 3: 7, 5: 7}[min_tokens]
    assert len(text.token_ids) == complete_after
    assert text.output.text == "axybcxyd"[: complete_after - 2]
    assert (text.finish_reason, text.stop_reason) == ("stop", "xy")


def test_a_longer_stop_string_does_not_make_a_short_one_match_before_min_tokens() -> None:
    params = SamplingParams(stop=["b", "a very long stop string"], min_tokens=3)
    text, _ = run(ids_of("abcdef"), params)
    assert text.output.text == "abcdef"


def test_include_stop_str_in_output_keeps_the_stop_string() -> None:
    text, deltas = run(ids_of("one. two. "), SamplingParams(stop=". ", include_stop_str_in_output=True))
    assert text.output.text == "one. "
    assert "".join(delta.text for delta in deltas) == "one. "


@pytest.mark.parametrize("shown", [False, True])
def test_a_stop_tokens_text_is_kept_only_with_include_stop_str_in_output(shown: bool) -> None:
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
def test_control_tokens_are_shown_unless_skip_special_tokens_hides_them(
    skip: bool, shown: bool, expected: str
) -> None:
    """The last control token finishes the text: it is shown only with include_stop_str_in_output."""
    params = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=shown)
    completion = CompletionText(0, TOKENIZER, params)
    for token, reason in ((ord("a"), None), (END, None), (ord("b"), None), (END, "stop")):
        completion.push(token_output(token, reason))
    assert completion.output.text == expected


def test_prompt_logprobs_have_an_entry_for_each_token_and_none_for_the_first() -> None:
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


OTHER = TOKENIZER.vocab_size  # "<next>", a second control token of the tokenizer below
SPELLING_BPE = byte_level_bpe([*BYTES, *PIECES], [], "smollm")
SPELLING_BPE.add_special_tokens(["<end>", "<next>"])
SPELLING = Tokenizer(SPELLING_BPE)


def push_all(ids: list[int], last: str | None = None, **params: Any) -> tuple[CompletionText, list[str]]:
    """Push ids until the completion finishes; return it and the texts that it streamed."""
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
        (ids_of("a<end>b"), "<end>", "a", 6),  # the stop string made of ordinary tokens
    ],
)
@pytest.mark.parametrize("shown", [False, True])
def test_a_stop_string_can_contain_the_text_of_control_tokens(
    ids: list[int], stop: str, text: str, num_tokens: int, shown: bool
) -> None:
    completion, pieces = push_all(ids, stop=stop, include_stop_str_in_output=shown)
    assert completion.output.text == text + (stop if shown else "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) == num_tokens
    assert "".join(pieces) == completion.output.text


@pytest.mark.parametrize("stop", ["<end>x", "y<end>", "<next>", "<end><next>", "d<end>"])
def test_a_control_token_that_is_only_a_part_of_a_stop_string_does_not_stop(stop: str) -> None:
    ids = [*ids_of("ab"), END, *ids_of("cd")]
    completion, pieces = push_all(ids, "length", stop=stop)
    assert (completion.output.text, completion.finish_reason) == ("abcd", "length")
    assert "".join(pieces) == "abcd"


def test_text_that_may_start_a_stop_string_with_control_tokens_is_held_back() -> None:
    _, pieces = push_all([*ids_of("abc"), END, *ids_of("dx")], "length", stop="bc<end>de")
    assert pieces == ["a", "", "", "", "", "bcdx"]


def test_a_stop_string_with_control_tokens_stops_only_after_min_tokens() -> None:
    ids = [*ids_of("a"), END, *ids_of("b"), END, *ids_of("c")]
    completion, _ = push_all(ids, stop="<end>", min_tokens=2)
    assert (completion.output.text, len(completion.token_ids)) == ("ab", 4)


def test_an_end_of_sequence_token_that_completes_a_stop_string_makes_it_the_stop_reason() -> None:
    completion, _ = push_all([*ids_of("ab"), END], "stop", stop="b<end>")
    assert (completion.output.text, completion.stop_reason) == ("a", "b<end>")


ids_with_control_tokens = st.lists(st.sampled_from([*ids_of("ab"), END, OTHER]), min_size=1, max_size=14)
parts_of_stops = st.lists(st.sampled_from(["a", "b", "<end>", "<next>"]), min_size=1, max_size=4)
spelling_stops = parts_of_stops.map("".join).filter(lambda text: "<" in text)


@given(ids_with_control_tokens, st.lists(spelling_stops, min_size=1, max_size=3))
def test_skip_special_tokens_does_not_change_where_a_stop_string_stops(
    ids: list[int], stop: list[str]
) -> None:
    """Oracle: the text with skip_special_tokens=False, with the control tokens removed from it."""
    hidden, pieces = push_all(ids, "length", stop=stop)
    written, _ = push_all(ids, "length", stop=stop, skip_special_tokens=False)
    assert hidden.output.text == written.output.text.replace("<end>", "").replace("<next>", "")
    assert hidden.token_ids == written.token_ids
    assert "".join(pieces) == hidden.output.text


def test_an_abort_returns_an_incomplete_character() -> None:
    completion = CompletionText(0, TOKENIZER, SamplingParams())
    completion.push(token_output(ids_of("é")[0]))
    assert completion.abort().text == completion.output.text == "\ufffd"
