"""Many replicas of the engine behind one endpoint, on Ray Serve. Needs Ray, which is an optional group."""

try:
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ImportError("replicas need Ray: pip install 'tiny-llm[cluster]'") from error
