"""The goldens of the tiny random checkpoints: transformers' float32 logits, written to checkpoints.json.

Called by make.py inside its environment. Each architecture is written to a folder by
tests/tiny_checkpoints.py and read by transformers from there; once as it is, and once with every matrix
replaced by what Q8_0 leaves of it. Of llama and qwen2 transformers reads the GGUF too, and must find the same
logits in it: so the row order and the names that these files are written with are not only our own idea of
GGUF.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT_LENGTH = 64
POSITIONS = (0, 1, 5, 20, 40, 63)
DIGITS = 6
TOLERANCE = 1e-5
READ_FROM_GGUF = ("llama", "qwen2")  # of the others transformers 5.23 drops biases, factors or head sizes


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
    """What Q8_0 leaves of a matrix; vectors, and rows that are no whole blocks, stay as they are."""
    from tiny_checkpoints import dequantized

    return dequantized(array, "Q8_0") if array.ndim > 1 and array.shape[-1] % 32 == 0 else array


def _logits(prompt: list[int], path: Path, **options: Any) -> Any:
    """transformers' logits [L, V] in float32, with the plain attention."""
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
    """Stop unless transformers finds in the GGUF what it found in the folder."""
    file = write_gguf(path / "model.gguf", config, weights)
    difference = (_logits(prompt, path, gguf_file=file.name) - expected).abs().max().item()
    print(f"  {path.name}: transformers' logits from its GGUF differ by at most {difference:.1e}", flush=True)
    if difference > TOLERANCE:
        raise SystemExit(f"{file.name}: GGUF means something else to transformers")
