"""Convert a GGUF file into a checkpoint that vLLM reads: `gguf_checkpoint.py MODEL FOLDER`.

transformers reads the file, and its weights are written unquantized: in bfloat16 if the processor supports
it, else in float32, which is several times faster on such a processor.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
DTYPE = "bfloat16" if FLAGS & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write weights in DTYPE, configuration and tokenizer; the output projection is tied to the embedding."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, DTYPE)
    )
    weights = {
        name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
