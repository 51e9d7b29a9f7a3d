"""A small LLM serving engine: continuous batching, paged KV cache, prefix caching, OpenAI-compatible server.

>>> from tiny_llm import LLM, SamplingParams
>>> with LLM() as llm:  # the embedded model, SmolLM2-135M-Instruct
...     [output] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=1))
>>> output.outputs[0].text
' Paris'

`LLM` has `generate`, `chat`, `stream`, `stream_chat` and `beam_search`; `LLM.engine` has `generate` and
`chat` for coroutines. Names and defaults follow vLLM's. `SamplingParams` has the parameters of a request,
`EngineConfig` those of the engine. On the command line: `tiny-llm --help`.
"""

# This package is an overlay. A module is loaded from this folder if it is here (a learner's own version of a
# day's module), and otherwise from tiny_llm_ref, under the name `tiny_llm.X`; its relative imports find the
# learner's modules first. TINY_LLM_OVERLAY names another folder to use instead of this one; with an empty
# folder, everything comes from the reference. A file that does not override a module is an error, because a
# misspelled name would otherwise silently load the reference. The only new files allowed are helper files
# named `my_*.py`.

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn


def _search_path() -> list[str]:
    """Return the overlay folder and the reference's folder, in this order.

    Raises ImportError if one of them is missing, or if the overlay has a file that overrides no module.
    """
    reference = find_spec("tiny_llm_ref")
    if reference is None or reference.submodule_search_locations is None:
        raise ImportError("tiny_llm_ref is not installed: run `pdm install`")
    overlay = Path(os.environ.get("TINY_LLM_OVERLAY") or Path(__file__).parent).resolve()
    if not overlay.is_dir():
        raise ImportError(f"TINY_LLM_OVERLAY names {overlay}, which is not a folder")
    folders = [str(overlay), *reference.submodule_search_locations]
    written, known = ({name for name in os.listdir(folder) if name.endswith(".py")} for folder in folders)
    for name in sorted(written - known):
        if not name.startswith(("my_", ".", "#")):  # editors keep files such as .#attention.py
            _refuse(name, known, overlay)
    return folders


def _refuse(name: str, known: set[str], overlay: Path) -> NoReturn:
    """Raise ImportError for a file whose name is not the name of a module of the reference."""
    from difflib import get_close_matches

    guess = get_close_matches(name, known, n=1)
    raise ImportError(
        f"{name} does not replace any module of the engine"
        f"{f'; did you mean {guess[0]}?' if guess else ''} "
        f"(in {overlay}; name your own helper files my_*.py)"
    )


__path__ = _search_path()

if TYPE_CHECKING:
    from tiny_llm_ref.api import *  # noqa: F403
else:  # hidden from type checkers, which would accept any name because of __getattr__
    from .api import __all__, __dir__, __getattr__  # noqa: F401 (re-exported)
