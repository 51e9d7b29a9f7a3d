"""tiny_llm: the learner's modules where there are any, and the reference's everywhere else.

A module that is not written here falls through to the reference's file, loaded as `tiny_llm.X`, and
its relative imports find the learner's modules first. `TINY_LLM_OVERLAY` names another folder to
look in instead of this one; an empty folder is the plain reference.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING


def _search_path() -> list[str]:
    """The overlay folder first, the reference's folder behind it."""
    reference = find_spec("tiny_llm_ref")
    if reference is None or reference.submodule_search_locations is None:
        raise ImportError("tiny_llm_ref is not installed: run `pdm install`")
    overlay = Path(os.environ.get("TINY_LLM_OVERLAY") or Path(__file__).parent).resolve()
    if not overlay.is_dir():
        raise ImportError(f"TINY_LLM_OVERLAY names {overlay}, which is not a folder")
    return [str(overlay), *reference.submodule_search_locations]


__path__ = _search_path()

if TYPE_CHECKING:
    from tiny_llm_ref.api import *  # noqa: F403
else:  # hidden from type checkers, which would take every name for the Any of __getattr__
    from .api import __all__, __getattr__  # noqa: F401 (re-exported)
