"""Worker for this project's engine, in the current environment."""

import sys

from protocol import Job, serve

import tiny_llm_kernels
from tiny_llm import LLM, SamplingParams

model, threads, activation_bits = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tiny_llm_kernels.set_num_threads(threads)
llm = LLM(model, max_num_seqs=16, activation_bits=activation_bits)


def run(job: Job) -> int:
    """Submit all requests at once; the engine runs 16 at a time. Returns output tokens."""
    params = SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True)
    return sum(len(output.outputs[0].token_ids) for output in llm.generate(job.prompts, params))


serve(f"here, {tiny_llm_kernels.instruction_set()} kernels", run)
