"""From rows of logits to tokens and their log-probabilities."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from math import isnan
from typing import NamedTuple, cast

import mlx.core as mx

from .errors import NotANumberError
from .kernels import compiled_kernel, is_reference, use_compiled
from .sampler import adjust_logits, keep_allowed, log_probabilities, sample_token, uniform
from .sampling_params import SamplingParams
from .sequence import Sequence, TokenLogprobs
from .token_mask import TokenMask, stacked_masks

BLOCK = 64  # logits in a block; only the blocks with the largest maxima are searched


class TokenOutput(NamedTuple):
    """One new token of one sequence of a request.

    finish_reason: "stop" or "length" with the last token, otherwise None. stop_token: the token of
    `stop_token_ids` that ended the sequence; None for an end-of-sequence token. prompt_logprobs: if they were
    requested, in the output for the sequence's first token; one entry for each prompt token except the first.
    num_cached_tokens: tokens of the prompt that came from the prefix cache. scheduled: when the sequence
    first ran, in seconds on the monotonic clock. completes_text: True if the token ended the sequence because
    it completes the text that its grammar requires; unlike an end token, it is part of the text.
    """

    request_id: str
    seq_id: str
    token: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    stop_token: int | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    scheduled: float | None = None
    completes_text: bool = False


class Choice(NamedTuple):
    """A sequence's next token, not evaluated yet, and the row [V] that it was chosen from.

    check: NaN if the row has a NaN, so that no token can be chosen from it. place: None; or if the token was
    chosen together with others, its index in `token` and `check`, which hold all of them.
    """

    sequence: Sequence
    row: mx.array
    token: mx.array
    check: mx.array
    place: int | None = None


def choose_token(sequence: Sequence, row: mx.array, eos_token_ids: frozenset[int]) -> Choice | None:
    """Choose the next token of a sequence from its row of logits [V].

    Returns None if the compiled sampler can choose it from the row as it is: then use `choose_together`.
    """
    params, outputs = sequence.params, sequence.outputs
    mask = allowed_tokens(sequence, eos_token_ids)
    ends = end_token_ids(params, eos_token_ids) if mask is None else ()  # a mask has `min_tokens` in it
    adjusted = adjust_logits(row, params, sequence.prompt, outputs, ends)
    compiled = is_reference(sample_token) and use_compiled()
    if compiled and adjusted is row and row.dtype == mx.float32:
        return None
    if mask is not None:
        adjusted = keep_allowed(adjusted, stacked_masks([mask])[0])
    token = sample_token(adjusted, params, sequence.seed, len(outputs))
    # If the row has a NaN, argmax and the compiled sampler choose it, so checking the chosen logit is enough.
    # MLX's own operators may draw any token from such a row, and a mask may hide the NaN, so then the sum of
    # the row is checked.
    shows_nan = mask is None and (params.greedy or compiled)
    return Choice(sequence, row, token, row[token] if shows_nan else mx.sum(row))


def choose_together(
    rows: mx.array, choices: Seq[tuple[Sequence, int]], eos_token_ids: frozenset[int]
) -> list[Choice]:
    """Choose the next tokens of sequences of one group (`group_of`) for which `choose_token` returns None.

    One operator serves all of them: with one for each, Python and MLX would take longer than the kernel.

    rows: [R, V], the logits of a step. choices: each sequence, and the index of its row.
    """
    params = choices[0][0].params
    temperature = 0.0 if params.greedy else params.temperature
    numbers = [0.0 if params.greedy else uniform(one.seed, len(one.outputs)) for one, _ in choices]
    indices, filters = [row for _, row in choices], (params.min_p, params.top_k, params.top_p)
    masks = [mask for one, _ in choices if (mask := allowed_tokens(one, eos_token_ids)) is not None]
    allowed = stacked_masks(masks) if masks else None
    tokens, logits = compiled_kernel("sample")(rows, indices, temperature, *filters, numbers, allowed)
    return [Choice(one, rows[row], tokens, logits, place) for place, (one, row) in enumerate(choices)]


def group_of(sequence: Sequence) -> tuple[float, ...]:
    """What sequences that are chosen together have in common: their filters, and whether they have masks."""
    params, has_grammar = sequence.params, sequence.grammar is not None
    if params.greedy:
        return (has_grammar,)
    return (has_grammar, params.temperature, params.min_p, params.top_k, params.top_p)


def allowed_tokens(sequence: Sequence, eos_token_ids: frozenset[int]) -> TokenMask | None:
    """The tokens that a sequence's grammar allows next; None without a grammar.

    Tokens that end a sequence are left out before it has `min_tokens` outputs, and end-of-sequence tokens
    with `ignore_eos`, unless the grammar allows nothing else. Raises `GrammarError` if none may come next.
    """
    if sequence.grammar is None:
        return None
    params, allowed = sequence.params, sequence.grammar.allowed()
    ends = eos_token_ids if params.ignore_eos else frozenset()
    if len(sequence.outputs) < params.min_tokens:
        ends = eos_token_ids | params.stop_ids
    others = allowed.without(ends) if ends else allowed
    return others or allowed


def make_output(choice: Choice, eos_token_ids: frozenset[int]) -> TokenOutput:
    """Evaluate a choice, and move the sequence's grammar past its token.

    Raises `NotANumberError` if its row has a NaN, and `GrammarError` if the grammar does not allow the token:
    then no token that it allows has a finite logit.
    """
    sequence, row, place = choice.sequence, choice.row, choice.place
    check = float(choice.check) if place is None else _number_at(choice.check, place)
    if isnan(check):
        raise NotANumberError(
            f"sequence {sequence.seq_id!r}: the logits after {sequence.num_tokens} tokens are not numbers"
        )
    token = int(choice.token if place is None else _number_at(choice.token, place))
    params = sequence.params
    with_prompt = params.prompt_logprobs is not None and not sequence.outputs
    full = sequence.num_tokens + 1 >= sequence.max_len
    is_end = token in end_token_ids(params, eos_token_ids)
    is_complete = _completes_text(sequence, token)
    return TokenOutput(
        request_id=sequence.request_id,
        seq_id=sequence.seq_id,
        token=token,
        logprobs=None if params.logprobs is None else _logprobs(row, token, params.logprobs),
        finish_reason="stop" if is_end or is_complete else "length" if full else None,
        stop_token=token if token in params.stop_ids else None,
        prompt_logprobs=tuple(sequence.prompt_logprobs) if with_prompt else None,
        num_cached_tokens=sequence.num_cached_tokens,
        scheduled=sequence.scheduled,
        completes_text=is_complete and not is_end and token not in eos_token_ids,
    )


def _completes_text(sequence: Sequence, token: int) -> bool:
    """Move a sequence's grammar past a token; True if the text is complete and nothing else can follow."""
    if sequence.grammar is None:
        return False
    sequence.grammar.accept(token)
    return sequence.grammar.has_ended


def _number_at(array: mx.array, place: int) -> float:
    """Return a number of an array [n], without an operator that takes it out."""
    return memoryview(array)[place]  # type: ignore[arg-type]  # arrays support the protocol


def end_token_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """The ids of the tokens that end a sequence."""
    return params.stop_ids if params.ignore_eos else params.stop_ids | eos_token_ids


def record_prompt_logprobs(sequence: Sequence, rows: Iterable[mx.array]) -> None:
    """Record the log-probabilities of the next prompt tokens, one row [V] each."""
    for row in rows:
        token = sequence.prompt[len(sequence.prompt_logprobs) + 1]
        sequence.prompt_logprobs.append(_logprobs(row, token, sequence.params.prompt_logprobs or 0))


def likeliest(logprobs: mx.array, num_top: int) -> list[tuple[int, float]]:
    """The `num_top` most likely tokens of a row [V] with their log-probabilities, best first."""
    num_top = min(num_top, logprobs.shape[-1])
    if num_top == 0:
        return []
    among = _candidates(logprobs, num_top)
    values = logprobs[among]
    places = mx.argpartition(-values, num_top - 1)[:num_top]
    best, values = among[places], values[places]
    mx.eval(best, values)
    pairs = zip(cast(Seq[int], best.tolist()), cast(Seq[float], values.tolist()), strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def _candidates(logprobs: mx.array, num_top: int) -> mx.array:
    """Return a subset of a row's token ids that includes the `num_top` most likely; search only this subset.

    Each of the `num_top` largest values is in one of the `num_top` blocks with the largest maxima.
    """
    vocab_size = logprobs.shape[-1]
    num_blocks = vocab_size // BLOCK
    if num_blocks <= num_top:
        return mx.arange(vocab_size, dtype=mx.uint32)
    whole = num_blocks * BLOCK
    maxima = mx.max(logprobs[:whole].reshape(num_blocks, BLOCK), axis=-1)
    blocks = mx.argpartition(-maxima, num_top - 1)[:num_top]
    inside = (blocks[:, None] * BLOCK + mx.arange(BLOCK, dtype=mx.uint32)).reshape(-1)
    return mx.concatenate([inside, mx.arange(whole, vocab_size, dtype=mx.uint32)])


def _logprobs(row: mx.array, token: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of one row [V]: the chosen token's, and the `num_top` most likely, best first."""
    logprobs = log_probabilities(row)
    chosen = logprobs[token]
    rank = mx.sum(logprobs > chosen) + 1
    mx.eval(chosen, rank)
    return TokenLogprobs(float(chosen), int(rank), tuple(likeliest(logprobs, num_top)))
