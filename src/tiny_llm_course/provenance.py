"""A pytest plugin: the header of a course run says whose modules it is about."""

import os
from pathlib import Path

import pytest


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which modules are the learner's, and which engine answers for the others."""
    import tiny_llm
    import tiny_llm_kernels

    overlay, reference = (Path(folder) for folder in tiny_llm.__path__)
    own = sorted(file.stem for file in overlay.glob("*.py") if file.stem != "__init__")
    number = len([file for file in reference.glob("*.py") if file.stem not in {*own, "__init__"}])
    whose = os.environ.get("TINY_LLM_COURSE_RUN", "")
    yours = ", ".join(f"{name}.py" for name in own) or "none"
    library = tiny_llm_kernels.library()
    kernels = "none" if library is None else "yours" if library.parent == overlay else "the reference's"
    about = f"course: {whose}" if whose else "course:"
    return [about, f"yours: {yours}; the reference's: {number} modules; compiled kernels: {kernels}"]
