"""The goldens of beam search: transformers' results for two tiny random checkpoints, written to beams.json.

Called by make.py in its environment. transformers' `early_stopping="never"` stops only when no hypothesis can
improve; a score is the sum of log-probabilities, divided by the number of new tokens to the power of the
length penalty.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKPOINTS = ("llama", "qwen3")
PROMPTS = ((5, 17, 99, 3, 42), tuple(range(60, 90)))
WIDTHS = (2, 4, 6)
PENALTIES = (1.0, 0.0, -1.0, 2.0)
NEW_TOKENS = 12
DIGITS = 6


def make(write: Any) -> None:
    """Run all searches; `write(name, payload)` stores them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tiny_checkpoints import CONFIGS, random_weights, write_folder

    records = []
    for name in CHECKPOINTS:
        with tempfile.TemporaryDirectory() as folder:
            model = _load(write_folder(Path(folder) / name, CONFIGS[name], random_weights(CONFIGS[name])))
            for prompt in PROMPTS:
                likely = _likely_tokens(model, prompt)
                for width in WIDTHS:
                    for penalty in PENALTIES:
                        for eos in (None, likely):
                            found = _search(model, prompt, width, penalty, eos)
                            asked = {"prompt": prompt, "width": width, "penalty": penalty, "eos": eos}
                            records.append({"checkpoint": name, **asked, "found": found})
    write("beams.json", {"new_tokens": NEW_TOKENS, "searches": records})


def _load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def _likely_tokens(model: Any, prompt: tuple[int, ...]) -> int:
    """An end token that hypotheses actually reach: the likeliest one after three greedy tokens."""
    import torch

    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(4):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-1]


def _search(model: Any, prompt: tuple[int, ...], width: int, penalty: float, eos: int | None) -> list[dict]:
    """Hypotheses, best first: score, and new tokens up to the one that ends them."""
    import torch

    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        length_penalty=penalty,
        early_stopping="never",
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = result.sequences_scores.tolist()
    found = []
    for tokens, score in zip(result.sequences[:, len(prompt) :].tolist(), scores, strict=True):
        cut = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        found.append({"tokens": cut, "score": round(score, DIGITS)})
    return found
