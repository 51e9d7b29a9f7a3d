"""Where a request runs, if there are several replicas: the router's view of them, policies, and a simulator.

Bookkeeping in plain Python: it knows nothing of HTTP or Ray, and every time is an argument.
"""
