"""A progress bar for requests that end one by one, with their tokens and tokens per second."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


@contextmanager
def request_progress(total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error if that is a terminal.

    Yields a function to call after each request, with the number of its tokens.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Processed requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    speed = TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f} tokens/s")
    console = Console(stderr=True)
    with Progress(*columns, speed, console=console, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task("requests", total=total, tokens=0, speed=0.0)
        tokens, start = 0, perf_counter()

        def report(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            bar.update(task, advance=1, tokens=tokens, speed=tokens / (perf_counter() - start))

        yield report
