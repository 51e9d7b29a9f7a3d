"""Facts about this process as plain dictionaries: versions, device, kernels, model, pool, memory, overlay.

`info` shows them all. A benchmark adds those that its figures depend on. Sizes are in bytes.
"""

import platform
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import mlx.core as mx

    from tiny_llm import LLM


def version() -> str:
    """The installed version of tiny-llm."""
    try:
        return metadata.version("tiny-llm")
    except metadata.PackageNotFoundError:
        return "unknown (run from its sources, not installed)"


def machine() -> dict[str, object]:
    """Versions, device, processor and kernels."""
    import mlx.core as mx

    from tiny_llm import kernel_info

    kernels = kernel_info()
    return {
        "version": version(),
        "python": platform.python_version(),
        "mlx": metadata.version("mlx"),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": mx.default_device().type.name,
        "kernels": "compiled" if kernels.available else "MLX's own operators",
        "instruction_set": kernels.instruction_set,
        "threads": kernels.num_threads,
        "why_no_kernels": kernels.why_unavailable,
    }


def model(llm: "LLM") -> dict[str, object]:
    """The model of an engine. `bytes`: the size of its parameters in memory."""
    config = llm.model_config
    return {
        "path": str(llm.model_path),
        "name": llm.model_name,
        "architecture": config.architecture,
        "parameters": config.num_parameters,
        "bytes": weight_bytes(llm),
        "quantization": _quantization(llm),
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "sampling_defaults": llm.sampling_defaults,
        "sampling_source": llm.sampling_source,
    }


def pool(llm: "LLM") -> dict[str, object]:
    """The KV pool of an engine."""
    capacity = llm.core.manager.capacity
    tokens = capacity.num_blocks * capacity.block_size
    return {
        "blocks": capacity.num_blocks,
        "block_size": capacity.block_size,
        "kv_cache_dtype": llm.engine_config.kv_cache_dtype,
        "bytes_per_token": capacity.nbytes // tokens,
        "tokens": tokens,
        "bytes": capacity.nbytes,
    }


def memory(llm: "LLM") -> dict[str, object]:
    """Memory of this process in bytes: its peak so far, and its peak after serving one full step.

    `beyond` is the rest of the peak in service, without the weights and the pool: Python, libraries, the
    vocabulary, and the temporary arrays of a step.
    """
    import mlx.core as mx

    weights, kv_pool = weight_bytes(llm), pool(llm)["bytes"]
    at_load = peak_resident_bytes()
    _serve_a_full_step(llm)
    in_service = peak_resident_bytes()
    return {
        "weights": weights,
        "pool": kv_pool,
        "peak_at_load": at_load,
        "peak_in_service": in_service,
        "beyond": in_service - weights - cast(int, kv_pool),
        "live_in_mlx": mx.get_active_memory(),
    }


def weight_bytes(llm: "LLM") -> int:
    """Bytes of the model's parameters in memory."""
    return bytes_of(llm.model)


def bytes_of(*parts: object) -> int:
    """Bytes of the arrays in parts of a model; an array that several of them hold counts once."""
    return sum(array.nbytes for array in {id(a): a for part in parts for a in _arrays(part)}.values())


def peak_resident_bytes() -> int:
    """The largest amount of memory that this process has held at any time, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve_a_full_step(llm: "LLM") -> None:
    """Generate a few tokens after a prompt that fills one step; without kernels, after a single token."""
    from tiny_llm import SamplingParams, kernel_info

    slow = kernel_info().why_unavailable is not None
    length = 1 if slow else llm.engine_config.max_num_batched_tokens
    prompt = [0] * max(1, min(length, llm.max_model_len - 4))
    llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)


def overlay() -> dict[str, object]:
    """Which modules of the engine are the learner's. All others are the reference's."""
    import tiny_llm

    own, reference = Path(tiny_llm.__path__[0]), Path(tiny_llm.__path__[1])
    names = {file.stem for file in own.glob("*.py")} - {"__init__"}
    known = {file.stem for file in reference.glob("*.py")}
    return {"path": str(own), "modules": sorted(names & known), "unknown_modules": sorted(names - known)}


@cache
def _processor() -> str:
    """The name and number of the processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _quantization(llm: "LLM") -> str:
    """How the matrices are stored, the most common way first: `4-bit x 210, float16 x 1`."""
    matrices = {id(matrix): matrix for matrix in _matrices(llm.model)}.values()
    kinds = Counter(map(_storage, matrices))
    return ", ".join(f"{kind} x {count}" for kind, count in kinds.most_common())


def _storage(matrix: object) -> str:
    bits = getattr(matrix, "bits", None)
    return f"{bits}-bit" if bits else str(next(_arrays(matrix)).dtype).removeprefix("mlx.core.")


def _matrices(node: object) -> Iterator[object]:
    """The matrices of a model, however they are stored: its innermost parts that have `rows`."""
    inner = [matrix for child in _children(node) for matrix in _matrices(child)]
    if inner or not hasattr(node, "rows"):
        yield from inner
    else:
        yield node


def _arrays(node: object) -> Iterator["mx.array"]:
    """Every array in a model."""
    import mlx.core as mx

    if isinstance(node, mx.array):
        yield node
    else:
        for child in _children(node):
            yield from _arrays(child)


def _children(node: object) -> Iterator[object]:
    if isinstance(node, tuple):
        yield from node
    elif is_dataclass(node):
        yield from (getattr(node, field.name) for field in fields(node))
    elif hasattr(node, "__dict__"):
        yield from vars(node).values()
