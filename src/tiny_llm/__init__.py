"""tiny_llm: the learner's modules where there are any, and the reference's everywhere else.

A module that is not written here falls through to the reference's file, loaded as `tiny_llm.X`, and
its relative imports find the learner's modules first. `TINY_LLM_OVERLAY` names another folder to
look in instead of this one; an empty folder is the plain reference. A file that overrides nothing
is an error: without it, a misspelled module would be the reference's, silently. Only `my_*.py` may be new:
helper files of the learner's own.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn


def _search_path() -> list[str]:
    """The overlay folder first, the reference's folder behind it."""
    reference = find_spec("tiny_llm_ref")
    if reference is None or reference.submodule_search_locations is None:
        raise ImportError("tiny_llm_ref is not installed: run `pdm install`")
    overlay = Path(os.environ.get("TINY_LLM_OVERLAY") or Path(__file__).parent).resolve()
    if not overlay.is_dir():
        raise ImportError(f"TINY_LLM_OVERLAY names {overlay}, which is not a folder")
    folders = [str(overlay), *reference.submodule_search_locations]
    written, known = ({name for name in os.listdir(folder) if name.endswith(".py")} for folder in folders)
    for name in sorted(written - known):
        if not name.startswith("my_"):
            _refuse(name, known, overlay)
    return folders


def _refuse(name: str, known: set[str], overlay: Path) -> NoReturn:
    """Raise the error for a file that no module of the reference is named like."""
    from difflib import get_close_matches

    guess = get_close_matches(name, known, n=1)
    raise ImportError(
        f"{name} overrides nothing{f'; did you mean {guess[0]}?' if guess else ''} (in {overlay})"
    )


__path__ = _search_path()

if TYPE_CHECKING:
    from tiny_llm_ref.api import *  # noqa: F403
else:  # hidden from type checkers, which would take every name for the Any of __getattr__
    from .api import __all__, __getattr__  # noqa: F401 (re-exported)
