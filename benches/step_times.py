"""How well does a linear function of its work predict the time of an engine's step?

Runs requests of 16 to 1,200 prompt tokens and 16 to 96 output tokens on the embedded model, 1 to 32 at a
time, a third with a shared prefix, and records each step: its prefill rows, decode rows, attended tokens and
seconds. Half of the steps fit the function (`tiny_llm_routing.step_time`), the other half tests it.
`pdm run bench routing` uses the result.

Expected: 6 ms for any step (reading the weights), 2 ms for each row, 2 us for each attended token; a median
error of 10%, because a few rows cost little while reading the weights takes longer.
"""

import random
from itertools import count
from time import perf_counter
from typing import Any

from tiny_llm.loader import load_model
from tiny_llm.managers import make_manager
from tiny_llm.paged_batch import PagedBatchManager

import harness
from tiny_llm import EngineConfig, EngineCore, SamplingParams
from tiny_llm_routing.served import percentile
from tiny_llm_routing.step_time import StepTime, StepWork, relative_errors

RUNNING = (1, 2, 4, 8, 16, 32)  # requests at a time
SHARED = 400  # tokens of the prefix that a third of the prompts begin with
Steps = list[tuple[StepWork, float]]


def record(core: EngineCore, numbers: random.Random, running: int, seconds: float) -> Steps:
    """Keep `running` requests in the engine for some time; return the work and the seconds of each step."""
    prefix, names, steps = numbers.choices(range(100, 40_000), k=SHARED), count(), []
    started = perf_counter()
    active: set[str] = set()
    while perf_counter() - started < seconds:
        while len(active) < running:
            name = f"{running}-{next(names)}"
            own = numbers.choices(range(100, 40_000), k=round(16 * 50 ** numbers.random()))
            prompt = prefix + own if numbers.random() < 1 / 3 else own
            params = SamplingParams(temperature=0, max_tokens=numbers.randint(16, 96), ignore_eos=True)
            core.add_request(name, prompt, params)
            active.add(name)
        before = perf_counter()
        outputs = core.step()
        taken = perf_counter() - before
        assert isinstance(core.manager, PagedBatchManager)
        spans = [(chunk.start, chunk.stop) for chunk in core.manager.last_plan.chunks]
        if spans:
            steps.append((StepWork.of(spans), taken))
        active -= {output.request_id for output in outputs if output.finish_reason is not None}
    for name in active:
        core.cancel(name)
    return steps


def main() -> None:
    """Record steps, fit the model to every other one, and print its errors on the rest."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--seconds", type=harness.positive, default=10, help="for each number of requests (default: 10)"
    )
    args = options.parse_args()
    manager = make_manager(EngineConfig(max_num_seqs=max(RUNNING)), load_model(None).model)
    core, numbers = EngineCore(manager, ()), random.Random(0)
    record(core, numbers, 4, 1.0)  # warms up
    by_running = {running: record(core, numbers, running, args.seconds) for running in RUNNING}
    steps = [step for one in by_running.values() for step in one]
    model = StepTime.fit(steps[::2])
    rows: dict[str, Any] = {}
    tests = {**{str(running): recorded for running, recorded in by_running.items()}, "all": steps}
    for name, tested in tests.items():
        errors = relative_errors(model, tested[1::2])
        total = sum(map(model.seconds, (work for work, _ in tested))) / sum(taken for _, taken in tested)
        rows[name] = {
            "steps": len(tested),
            "error_p50": percentile(errors, 50),
            "error_p90": percentile(errors, 90),
            "predicted_over_measured": total,
        }
    lines = [
        f"seconds = {model.base:.4g} + {model.prefill_row:.4g} x prefill rows + {model.decode_row:.4g} x "
        f"decode rows + {model.attended:.4g} x attended tokens",
        f"{'running':>8}{'steps':>7}{'median error':>14}{'90%':>7}{'predicted / measured time':>27}",
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:>8}{row['steps']:>7}{row['error_p50']:>14.1%}{row['error_p90']:>7.1%}"
            f"{row['predicted_over_measured']:>27.3f}"
        )
    result = {"benchmark": "step_times", "model": model._asdict(), "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
