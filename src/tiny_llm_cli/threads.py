"""`--threads`: how many threads the compiled kernels of this process use."""

import inspect
import warnings
from typing import Annotated

import typer

MAX_THREADS = 1024  # what the kernels allow


def threads_option(panel: str) -> inspect.Parameter:
    """A parameter that gives a command the option, in this section of the help."""
    option = typer.Option(
        "--threads",
        "-t",
        help="Threads of the compiled kernels.",
        min=1,
        max=MAX_THREADS,
        show_default="TINY_LLM_NUM_THREADS, or one for each available processor",
        rich_help_panel=panel,
    )
    annotation = Annotated[int | None, option]
    return inspect.Parameter("threads", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def set_threads(count: int) -> None:
    """Run the compiled kernels on `count` threads from now on; warns if there are no compiled kernels."""
    from tiny_llm.kernels import compiled_kernel

    from tiny_llm import kernel_info

    missing = kernel_info().why_unavailable
    if missing is None:
        compiled_kernel("set_num_threads")(count)
    else:
        warnings.warn(f"--threads has no effect: there are no compiled kernels ({missing})", stacklevel=2)
