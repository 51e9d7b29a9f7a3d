"""Two Ray nodes on this machine, each with one processor, until standard input ends.

Run as a program, because Ray's processes and threads stay in the process that starts them. Its arguments: a
folder with a short name for Ray's files, and the port at which the proxy of the second node listens. Prints
the cluster's address.
"""

import os
import sys

STARTS = 3  # attempts
HEAD, SECOND = "127.0.0.2", "127.0.0.3"  # Ray takes 127.0.0.1 for this machine's other address


def main(folder: str, second_port: str) -> None:
    os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": second_port, "RAY_SERVE_SLOW_STARTUP_WARNING_S": "3"}
    # With Ray's default of 15, other tests would take nearly all of the processors' time.
    os.environ |= {"RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "node_ip_address": HEAD, "include_dashboard": False}
    for attempt in range(STARTS):
        cluster = Cluster()
        try:
            cluster.add_node(**head)
            cluster.add_node(num_cpus=1, node_ip_address=SECOND)
            break
        except Exception:  # on a busy machine, a process of Ray may not be ready in time
            cluster.shutdown()
            if attempt == STARTS - 1:
                raise
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
