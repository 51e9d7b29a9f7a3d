"""Many replicas of the engine behind one endpoint, on Ray Serve. Needs Ray, which is an optional group."""

import os

# A message from a replica has at most so many bytes. Ray's 4 MiB are too few for the log-probabilities of a long
# prompt. Ray reads the variable when it is imported.
MESSAGE_LIMIT = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(1 << 30)}
os.environ.update(MESSAGE_LIMIT | dict(os.environ))  # a user's own value stays

try:
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ImportError("replicas need Ray: pip install 'tiny-llm[cluster]'") from error
