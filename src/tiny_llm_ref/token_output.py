"""From rows of logits to tokens and their log-probabilities."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import zip_longest
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
    first ran, in seconds on the monotonic clock. earlier: with speculation, the outputs of the same step that
    come before this one, in order. completes_text: True if the token ended the sequence because it completes
    the text that its grammar requires; unlike an end token, it is part of the text.
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
    earlier: "tuple[TokenOutput, ...]" = ()
    completes_text: bool = False


class Place(NamedTuple):
    """A place in a sequence whose token is chosen: after the known tokens and the first `ahead` of its draft.

    row: the index of its row in a step's logits.
    """

    sequence: Sequence
    row: int
    ahead: int = 0

    @property
    def outputs(self) -> Seq[int]:
        """The outputs before this place, if the draft is right so far."""
        outputs = self.sequence.outputs
        return [*outputs, *self.sequence.draft[: self.ahead]] if self.ahead else outputs

    @property
    def uniform(self) -> float:
        """The random number of this place; 0 if the request is greedy."""
        sequence = self.sequence
        if sequence.params.greedy:
            return 0.0
        return uniform(sequence.seed, len(sequence.outputs) + self.ahead)


class Choice(NamedTuple):
    """The token of a place, not evaluated yet, and the row [V] that it was chosen from.

    check: NaN if the row has a NaN, so that no token can be chosen from it. number: None; or if the token was
    chosen together with others, its index in `token` and `check`, which hold all of them.
    """

    place: Place
    row: mx.array
    token: mx.array
    check: mx.array
    number: int | None = None

    @property
    def sequence(self) -> Sequence:
        """The sequence that gets the token."""
        return self.place.sequence


def choose_token(place: Place, row: mx.array, eos_token_ids: frozenset[int]) -> Choice | None:
    """Choose the token of a place from its row of logits [V].

    Returns None if the compiled sampler can choose it from the row as it is: then use `choose_together`.
    """
    sequence, outputs = place.sequence, place.outputs
    params = sequence.params
    # A mask has `min_tokens` in it.
    ends = end_token_ids(params, eos_token_ids) if sequence.grammar is None else ()
    adjusted = adjust_logits(row, params, sequence.prompt, outputs, ends)
    compiled = is_reference(sample_token) and use_compiled()
    if compiled and adjusted is row and row.dtype == mx.float32:
        return None
    mask = allowed_tokens(place, eos_token_ids)
    if mask is not None:
        adjusted = keep_allowed(adjusted, stacked_masks([mask])[0])
    token = sample_token(adjusted, params, sequence.seed, len(outputs))
    # If the row has a NaN, argmax and the compiled sampler choose it, so checking the chosen logit is enough.
    # MLX's own operators may draw any token from such a row, and a mask may hide the NaN, so then the sum of
    # the row is checked.
    shows_nan = mask is None and (params.greedy or compiled)
    return Choice(place, row, token, row[token] if shows_nan else mx.sum(row))


def choose_together(rows: mx.array, places: Seq[Place], eos_token_ids: frozenset[int]) -> list[Choice]:
    """Choose the tokens of places of one group (`group_of`), those for which `choose_token` returns None.

    One operator serves all of them: with one for each, Python and MLX would take longer than the kernel.

    rows: [R, V], the logits of a step.
    """
    params = places[0].sequence.params
    temperature = 0.0 if params.greedy else params.temperature
    indices, numbers = [one.row for one in places], [one.uniform for one in places]
    filters = (params.min_p, params.top_k, params.top_p)
    masks = [mask for one in places if (mask := allowed_tokens(one, eos_token_ids)) is not None]
    allowed = stacked_masks(masks) if masks else None
    tokens, logits = compiled_kernel("sample")(rows, indices, temperature, *filters, numbers, allowed)
    return [Choice(one, rows[one.row], tokens, logits, number) for number, one in enumerate(places)]


def group_of(sequence: Sequence) -> tuple[float, ...]:
    """What sequences that are chosen together have in common: their filters, and whether they have masks."""
    params, has_grammar = sequence.params, sequence.grammar is not None
    if params.greedy:
        return (has_grammar,)
    return (has_grammar, params.temperature, params.min_p, params.top_k, params.top_p)


def allowed_tokens(place: Place, eos_token_ids: frozenset[int]) -> TokenMask | None:
    """The tokens that its sequence's grammar allows at a place; None without a grammar.

    Tokens that end a sequence are left out before it has `min_tokens` outputs, and end-of-sequence tokens
    with `ignore_eos`, unless the grammar allows nothing else. Raises `GrammarError` if none may come next.
    """
    sequence = place.sequence
    if sequence.grammar is None:
        return None
    params, allowed = sequence.params, sequence.grammar.allowed(sequence.draft[: place.ahead])
    ends = eos_token_ids if params.ignore_eos else frozenset()
    if len(place.outputs) < params.min_tokens:
        ends = eos_token_ids | params.stop_ids
    others = allowed.without(ends) if ends else allowed
    return others or allowed


def make_output(choice: Choice, eos_token_ids: frozenset[int]) -> TokenOutput:
    """Evaluate a choice, and move the sequence's grammar past its token.

    Raises `NotANumberError` if its row has a NaN, and `GrammarError` if the grammar does not allow the token:
    then no token that it allows has a finite logit.
    """
    sequence, row, number = choice.sequence, choice.row, choice.number
    num_tokens = sequence.num_tokens + choice.place.ahead
    check = float(choice.check) if number is None else _number_at(choice.check, number)
    if isnan(check):
        raise NotANumberError(
            f"sequence {sequence.seq_id!r}: the logits after {num_tokens} tokens are not numbers"
        )
    token = int(choice.token if number is None else _number_at(choice.token, number))
    params = sequence.params
    with_prompt = params.prompt_logprobs is not None and not sequence.outputs
    full = num_tokens + 1 >= sequence.max_len
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


def make_outputs(choices: Seq[Choice], eos_token_ids: frozenset[int]) -> TokenOutput:
    """Evaluate the choices of one sequence, in the order of their places, and return its output.

    With a draft there is a choice for each of its places; those after the first wrong guess, or after the
    end of the sequence, are dropped.
    """
    outputs: list[TokenOutput] = []
    for choice, guess in zip_longest(choices, choices[0].sequence.draft):
        outputs.append(make_output(choice, eos_token_ids))
        if outputs[-1].finish_reason is not None or outputs[-1].token != guess:
            break
    *earlier, last = outputs
    return last._replace(earlier=tuple(earlier)) if earlier else last


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
