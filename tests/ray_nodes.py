"""Two Ray nodes on this machine, each with one processor, until standard input ends.

Run as a program, because Ray's processes and threads stay in the process that starts them. Its arguments: a
folder with a short name for Ray's files, and the port at which the proxy of the second node listens. Prints
the cluster's address.
"""

import os
import sys

HEAD, SECOND = "127.0.0.2", "127.0.0.3"  # Ray takes 127.0.0.1 for this machine's other address


def main(folder: str, second_port: str) -> None:
    os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = second_port
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "node_ip_address": HEAD, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, node_ip_address=SECOND)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
