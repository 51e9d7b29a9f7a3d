"""Many replicas of the engine behind one endpoint, on Ray Serve. Needs Ray, which is an optional group."""

try:
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tiny_llm_cluster needs Ray Serve: `pip install 'tiny-llm[cluster]'`, or in a copy of the repository "
        "`pdm sync -G cluster`"
    ) from error
