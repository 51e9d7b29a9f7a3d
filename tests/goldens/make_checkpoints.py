"""The goldens of the tiny random checkpoints: transformers' float32 logits, written to checkpoints.json.

Called by make.py in its environment. tests/tiny_checkpoints.py writes each architecture to a folder, which
transformers reads: once with the original weights, and once with every matrix rounded to Q8_0 and back. For
llama and qwen2 transformers reads the GGUF file too and must get the same logits, which checks the row order
and names in these GGUF files independently.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT_LENGTH = 64
POSITIONS = (0, 1, 5, 20, 40, 63)
DIGITS = 6
TOLERANCE = 1e-5
READ_FROM_GGUF = ("llama", "qwen2")  # for others, transformers 5.23 ignores biases, factors or head sizes


def make(write: Any) -> None:
    """Compute all logits; `write(name, payload)` stores them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import numpy as np

    from tiny_checkpoints import CONFIGS, random_weights, write_folder, write_gguf

    prompt = np.random.RandomState(0).randint(0, 256, PROMPT_LENGTH).tolist()
    records = []
    for name, config in CONFIGS.items():
        plain = random_weights(config)
        for kind, weights in (
            ("F32", plain),
            ("Q8_0", {key: _rounded(array) for key, array in plain.items()}),
        ):
            with tempfile.TemporaryDirectory() as folder:
                path = write_folder(Path(folder) / name, config, weights)
                logits = _logits(prompt, path)
                if kind == "F32" and name in READ_FROM_GGUF:
                    _check_gguf(path, config, plain, prompt, logits, write_gguf)
            rows = [[round(value, DIGITS) for value in logits[p].tolist()] for p in POSITIONS]
            records.append({"checkpoint": name, "weights": kind, "logits": rows})
    write("checkpoints.json", {"prompt": prompt, "positions": POSITIONS, "logits": records})


def _rounded(array: Any) -> Any:
    """A matrix rounded to Q8_0 and back. Vectors, and rows that are not whole blocks, are unchanged."""
    from tiny_checkpoints import dequantized

    return dequantized(array, "Q8_0") if array.ndim > 1 and array.shape[-1] % 32 == 0 else array


def _logits(prompt: list[int], path: Path, **options: Any) -> Any:
    """transformers' logits [L, V] in float32, with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


def _check_gguf(
    path: Path, config: Any, weights: Any, prompt: list[int], expected: Any, write_gguf: Any
) -> None:
    """Exit with an error unless transformers gets the same logits from the GGUF and from the folder."""
    file = write_gguf(path / "model.gguf", config, weights)
    difference = (_logits(prompt, path, gguf_file=file.name) - expected).abs().max().item()
    print(f"  {path.name}: transformers' logits from its GGUF differ by at most {difference:.1e}", flush=True)
    if difference > TOLERANCE:
        raise SystemExit(f"{file.name}: transformers' logits from the GGUF and from the folder differ")
