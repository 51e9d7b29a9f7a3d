"""What Python makes for interactive figures: drawings for readers without JavaScript, and data.

DATA: values that a figure reads as JSON, made by the reference's own code or taken from a result.
"""

from collections.abc import Callable

from . import beam_frames, sampling_data, timeline_frames
from .find import draw

FALLBACKS: dict[str, str] = {
    "sampling": "stills.sampling",
    "block-table": "stills.block_table",
    "prefix-cache": "stills.prefix_cache",
    "allocation": "stills.allocation",
    "beams": "stills.beams",
    "timeline": "stills.timeline",
    "rotary": "stills.rotary",
}
"""The drawing for each interactive figure, as `MODULE.FIGURE`."""

DATA: dict[str, Callable[[], object]] = {
    "beams": beam_frames.frames,
    "timeline": timeline_frames.frames,
    "sampling": sampling_data.data,
}


def fallback(name: str) -> str:
    """The drawing for an interactive figure, as an element."""
    return draw(FALLBACKS[name]).inline()
