"""Worker for OpenVINO GenAI: continuous batching of a GGUF model, in an environment with `openvino-genai`."""

import sys
from importlib.metadata import version

import numpy as np
import openvino_genai as genai
from openvino import Tensor
from protocol import Job, serve

model, threads = sys.argv[1], int(sys.argv[2])
scheduler = genai.SchedulerConfig()
scheduler.max_num_seqs = 16
scheduler.enable_prefix_caching = True
scheduler.cache_size = 1  # GiB
pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})


def run(job: Job) -> int:
    """Submit all requests at once; the pipeline runs 16 at a time. Returns output tokens."""
    config = genai.GenerationConfig(max_new_tokens=job.output_tokens, ignore_eos=True, do_sample=False)
    prompts = [Tensor(np.array([prompt], dtype=np.int64)) for prompt in job.prompts]
    results = pipeline.generate(prompts, [config] * len(prompts))
    return sum(len(result.m_generation_ids[0]) for result in results)


serve(version("openvino-genai"), run)
