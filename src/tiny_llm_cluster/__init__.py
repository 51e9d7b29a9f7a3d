"""Many replicas of the engine behind one endpoint, on Ray Serve. Needs Ray, which is an optional group."""

import os

# Bytes of a message from a replica: 4 MiB, as usual, are too few for a long prompt's log-probabilities.
MESSAGE_LIMIT = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(1 << 30)}
os.environ.update(MESSAGE_LIMIT | dict(os.environ))  # Ray reads it when it is imported

try:
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ImportError("replicas need Ray: pip install 'tiny-llm[cluster]'") from error
