"""OpenAI's HTTP API for a `tiny_llm` engine, for many clients at once.

A request arrives as JSON and goes to the engine as token ids and sampling parameters; its answer comes back
as events. A request that cannot be served is refused before it reaches the engine, with an error in OpenAI's
format that names the field.
"""

from .app import make_app
from .config import ServerConfig

__all__ = ["ServerConfig", "make_app"]
