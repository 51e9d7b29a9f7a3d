"""How long a step of the engine takes, as a linear function of what it computes; fitted to recorded steps."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from operator import mul
from typing import NamedTuple, Self

MIN_PIVOT = (
    1e-9  # of an equation whose largest coefficient is 1; less means that two terms cannot be told apart
)


class StepWork(NamedTuple):
    """What a step computes.

    prefill_rows: tokens in chunks of more than one token. decode_rows: the other tokens. attended: for each
    of these tokens the number of tokens that it attends to, summed.
    """

    prefill_rows: int = 0
    decode_rows: int = 0
    attended: int = 0

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int]]) -> Self:
        """Return the work of a step that computes the positions start .. stop - 1 of each sequence.

        >>> StepWork.of([(0, 4), (9, 10)])
        StepWork(prefill_rows=4, decode_rows=1, attended=20)
        """
        prefill = decode = attended = 0
        for start, stop in spans:
            rows = stop - start
            attended += rows * (start + stop + 1) // 2
            if rows == 1:
                decode += 1
            else:
                prefill += rows
        return cls(prefill, decode, attended)


class StepTime(NamedTuple):
    """The seconds of a step: `base`, and an amount for each row and for each attended token."""

    base: float
    prefill_row: float
    decode_row: float
    attended: float

    def seconds(self, work: StepWork) -> float:
        """Return how long a step takes.

        >>> StepTime(1.0, 0.5, 0.25, 0.0).seconds(StepWork(prefill_rows=4, decode_rows=2))
        3.5
        """
        rows = self.prefill_row * work.prefill_rows + self.decode_row * work.decode_rows
        return self.base + rows + self.attended * work.attended

    @classmethod
    def fit(cls, steps: Sequence[tuple[StepWork, float]]) -> Self:
        """Return the model with the least sum of squared relative errors; no coefficient is below 0.

        steps: the work and the seconds of each step. Tries all choices of coefficients that are not 0, which
        are 15, and solves the normal equations of each. Raises ValueError if no steps are given.

        >>> model = StepTime.fit([(StepWork(n, m), 1.0 + 2.0 * n) for n in range(4) for m in range(2)])
        >>> [round(amount, 6) for amount in model]
        [1.0, 2.0, 0.0, 0.0]
        """
        if not steps:
            raise ValueError("no steps to fit a model to")
        rows = [[term / seconds for term in (1.0, *work)] for work, seconds in steps]
        best, least = cls(0.0, 0.0, 0.0, 0.0), float(len(steps))  # each relative error is 1
        for size in range(1, 5):
            for terms in combinations(range(4), size):
                solution = _least_squares([[row[term] for term in terms] for row in rows])
                if solution is None or min(solution) < 0:
                    continue
                model = [0.0] * 4
                for term, value in zip(terms, solution, strict=True):
                    model[term] = value
                error = sum((sum(map(mul, model, row)) - 1) ** 2 for row in rows)
                if error < least - 1e-12 * len(steps):
                    best, least = cls(*model), error
        return best


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """Return x such that each row times x is as near to 1 as possible; None if x is not unique."""
    size = len(rows[0])
    scale = [max(abs(row[i]) for row in rows) or 1.0 for i in range(size)]
    scaled = [[value / one for value, one in zip(row, scale, strict=True)] for row in rows]
    matrix = [
        [sum(row[i] * row[j] for row in scaled) / len(rows) for j in range(size)]
        + [sum(row[i] for row in scaled) / len(rows)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(matrix[k][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        if abs(matrix[i][i]) < MIN_PIVOT:
            return None
        for k in range(size):
            if k != i:
                factor = matrix[k][i] / matrix[i][i]
                matrix[k] = [a - factor * b for a, b in zip(matrix[k], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] / scale[i] for i in range(size)]


def relative_errors(model: StepTime, steps: Sequence[tuple[StepWork, float]]) -> list[float]:
    """Return |predicted / measured - 1| of each step, smallest first."""
    return sorted(abs(model.seconds(work) / seconds - 1) for work, seconds in steps)
