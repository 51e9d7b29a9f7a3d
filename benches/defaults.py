"""Which sampling defaults suit a small chat model? Answers that loop, never end, or are wrong.

Asks the same questions with every set of sampling parameters, several times with different seeds, at most
`--max-tokens` tokens an answer. Answers are the same on every machine with the same kernels and on every run,
because scheduling never changes them. Reported for each set:

  cut      answers that were still going at the token limit
  loop     answers in which at least a third of the 8-token sequences came before in the same answer
  right    of the questions with a known answer, how many answers name it in their first 80 characters
  nats     mean negative log-probability of a token under the model itself, before any parameter applies:
           fluent text is low, noise is high
  tokens   mean length of an answer
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import harness
from tiny_llm import LLM, RequestOutput, SamplingParams

NGRAM = 8  # tokens
OPENING = 80  # characters, in which a right answer names what was asked for
LOOP_SHARE = 1 / 3  # of an answer's n-grams that came before in it

MODEST = {"temperature": 0.2, "top_p": 0.9}

WAYS: dict[str, dict[str, float]] = {
    "neutral": {},
    "greedy": {"temperature": 0.0},
    "greedy, frequency 0.1": {"temperature": 0.0, "frequency_penalty": 0.1},
    "greedy, frequency 0.2": {"temperature": 0.0, "frequency_penalty": 0.2},
    "greedy, frequency 0.3": {"temperature": 0.0, "frequency_penalty": 0.3},
    "0.2, top_p 0.9": MODEST,
    "the same, repetition 1.05": {**MODEST, "repetition_penalty": 1.05},
    "the same, repetition 1.1": {**MODEST, "repetition_penalty": 1.1},
    "the same, repetition 1.2": {**MODEST, "repetition_penalty": 1.2},
    "the same, presence 0.3": {**MODEST, "presence_penalty": 0.3},
    "the same, presence 0.6": {**MODEST, "presence_penalty": 0.6},
    "the same, presence 1": {**MODEST, "presence_penalty": 1.0},
    "the same, frequency 0.05": {**MODEST, "frequency_penalty": 0.05},
    "the same, frequency 0.1": {**MODEST, "frequency_penalty": 0.1},
    "the same, frequency 0.2": {**MODEST, "frequency_penalty": 0.2},
    "the same, frequency 0.3": {**MODEST, "frequency_penalty": 0.3},
}


class Question(NamedTuple):
    """A question, and a word that a right answer has; None: there is no single right answer."""

    text: str
    answer: str | None = None


QUESTIONS = (
    Question("What is the capital of France?", "Paris"),
    Question("What is the capital of Italy?", "Rome"),
    Question("What is the capital of Japan?", "Tokyo"),
    Question("Which planet is closest to the sun?", "Mercury"),
    Question("What is the largest ocean on Earth?", "Pacific"),
    Question("Who wrote Romeo and Juliet?", "Shakespeare"),
    Question("What gas do plants take in from the air for photosynthesis?", "carbon dioxide"),
    Question("How many days are in a week?", "7"),
    Question("What is 2 + 2?", "4"),
    Question("What is the chemical symbol of gold?", "Au"),
    Question("In which country is the city of Cairo?", "Egypt"),
    Question("What is the opposite of hot?", "cold"),
    Question("What is gravity?"),
    Question("What is photosynthesis?"),
    Question("Why is the sky blue?"),
    Question("How does a rainbow form?"),
    Question("What causes the seasons?"),
    Question("How do vaccines work?"),
    Question("What is the difference between weather and climate?"),
    Question("Explain what a prime number is."),
    Question("What is machine learning?"),
    Question("Explain recursion to a beginner."),
    Question("What does itertools.combinations() do in Python?"),
    Question("Write a Python function that reverses a string."),
    Question("Write a Python function that checks whether a number is prime."),
    Question("Write a SQL query that counts the orders of each customer."),
    Question("Write a bash command that finds all files larger than 100 MB."),
    Question("List five healthy breakfast ideas."),
    Question("List the planets of the solar system."),
    Question("Give me a recipe for pancakes."),
    Question("Give me three tips for a job interview."),
    Question("Write a haiku about the sea."),
    Question("Write a short story about a robot that learns to paint."),
    Question("Write a polite email to ask a colleague for a meeting."),
    Question("Translate 'good morning, my friend' into French."),
    Question("Summarize the plot of Cinderella in two sentences."),
)


def repeated_share(tokens: Sequence[int], length: int = NGRAM) -> float:
    """The share of a text's n-grams of `length` tokens that came before in it; 0 for a text without any."""
    ngrams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def answers(
    llm: LLM, way: dict[str, float], seeds: int, max_tokens: int
) -> list[tuple[Question, RequestOutput]]:
    """Each question's answers, one for each seed; only one if greedy, because all seeds give the same."""
    times = 1 if way.get("temperature") == 0 else seeds
    asked = [(question, seed) for question in QUESTIONS for seed in range(times)]
    params = [
        SamplingParams(max_tokens=max_tokens, seed=seed, logprobs=0, **way)  # type: ignore[arg-type]
        for _, seed in asked
    ]
    conversations = [[{"role": "user", "content": question.text}] for question, _ in asked]
    outputs = llm.chat(conversations, params, use_tqdm=False)
    return [(question, output) for (question, _), output in zip(asked, outputs, strict=True)]


def figures(answered: Sequence[tuple[Question, RequestOutput]]) -> dict[str, float]:
    """What the answers to all questions look like, in shares of the answers."""
    completions = [output.outputs[0] for _, output in answered]
    checked = [
        question.answer.lower() in output.outputs[0].text[:OPENING].lower()
        for question, output in answered
        if question.answer is not None
    ]
    num_tokens = sum(len(one.token_ids) for one in completions)
    return {
        "answers": len(completions),
        "cut": mean(one.finish_reason == "length" for one in completions),
        "loop": mean(repeated_share(one.token_ids) >= LOOP_SHARE for one in completions),
        "right": mean(checked),
        "nats": -sum(one.cumulative_logprob or 0.0 for one in completions) / num_tokens,
        "tokens": num_tokens / len(completions),
    }


def as_table(rows: dict[str, dict[str, float]]) -> str:
    """A line for each way."""
    lines = [f"{'':30}{'answers':>8}{'cut':>8}{'loop':>8}{'right':>8}{'nats':>8}{'tokens':>8}"]
    lines += [
        f"{way:30}{row['answers']:>8}{row['cut']:>8.1%}{row['loop']:>8.1%}{row['right']:>8.1%}"
        f"{row['nats']:>8.2f}{row['tokens']:>8.0f}"
        for way, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Ask all questions in all ways, and print a line for each way."""
    options = harness.parser(__doc__ or "")
    options.set_defaults(repetitions=3)
    options.add_argument(
        "--max-tokens", type=harness.positive, default=512, help="of an answer (default: 512)"
    )
    options.add_argument("--model", help="instead of the embedded one")
    options.add_argument("--way", choices=WAYS, action="append", help="only this one; may be repeated")
    args = options.parse_args()
    llm = LLM(args.model, max_num_seqs=24)
    rows: dict[str, dict[str, Any]] = {}
    for way in args.way or WAYS:
        rows[way] = figures(answers(llm, WAYS[way], args.repetitions, args.max_tokens))
    result = {"benchmark": "defaults", "model": llm.model_name, "max_tokens": args.max_tokens, "ways": rows}
    harness.show(result, as_json=args.json, text=as_table(rows))


if __name__ == "__main__":
    main()
