"""Figures of an engine as plain values: Serve's controller passes them on, and need not import the engine."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tiny_llm import DraftStats, EngineStats


def stats_message(stats: EngineStats) -> dict[str, Any]:
    """Return an engine's figures as a dictionary of numbers and tuples of numbers."""
    return {**asdict(stats), "drafts": tuple(stats.drafts)}


def stats_of(message: Mapping[str, Any]) -> EngineStats:
    """Return the figures of a message from `stats_message`."""
    return EngineStats(**{**message, "drafts": DraftStats(*message["drafts"])})
