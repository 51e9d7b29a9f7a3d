"""OpenAI's API over a `tiny_llm` engine, for many clients at once: HTTP, and nothing that is the engine's.

Requests come in as JSON and go to the engine as token ids and sampling parameters; events come back as
numbers and texts. What cannot be done is refused at the door, in OpenAI's error shape, with the field's name.
"""

from .app import make_app
from .config import ServerConfig

__all__ = ["ServerConfig", "make_app"]
