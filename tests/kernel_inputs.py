"""Shared by the tests of the compiled kernels: instruction sets, random inputs, and array addresses.

The fixture `isa` runs every test of a module that imports it with each instruction set of this processor.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import tiny_llm_kernels as kernels

INSTRUCTION_SETS = kernels.instruction_sets() if kernels.available() else []
THREADS = [1, 2, 3, 5]
SEED = 7


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def isa(request: pytest.FixtureRequest) -> str:
    """The selected instruction set. conftest.py restores it and the number of threads."""
    kernels.select_instruction_set(request.param)
    return request.param


def normal(*shape: int, seed: int = SEED) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def property_settings(examples: int) -> Callable:
    """Hypothesis settings for `examples` reproducible cases without a deadline."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def address_of(a: mx.array) -> int:
    """The address of an array's data."""
    return np.array(a, copy=False).__array_interface__["data"][0]
