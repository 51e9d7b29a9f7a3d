"""Many replicas of the engine behind one endpoint, on Ray Serve.

What decides where a request runs (`fleet`, `policies`) knows nothing of Ray, so a simulator can use it too.
"""
