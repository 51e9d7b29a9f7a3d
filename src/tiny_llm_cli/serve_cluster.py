"""`tiny-llm serve-cluster`: the server on a Ray cluster, with replicas of the engine on many machines."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tiny_llm_cluster.deploy import DeployedStatus
    from tiny_llm_cluster.deployment import Deployment

_STOP = "tiny-llm serve-cluster --stop"


def serve_cluster(
    config: Annotated[
        Path | None,
        typer.Argument(help="The YAML file that says what to deploy.", metavar="CONFIG", show_default=False),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only read and check the file; needs no cluster.")
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Replace all processes by new ones, one after the other, with what the file says now; fails "
            "if nothing runs. Accepted requests have `grace` seconds to finish.",
        ),
    ] = False,
    stop: Annotated[
        bool,
        typer.Option(
            "--stop", help="Stop what runs on the cluster. Accepted requests may finish, within `grace`."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the status at the end as one JSON object.")
    ] = False,
) -> None:
    """Serve a model with OpenAI's API on a Ray cluster.

    \b
    Start Ray on the first machine, and then on each of the others:
      ray start --head
      ray start --address FIRST:6379
    Write cluster.yaml:
      engine:  {model: smollm2, max_num_seqs: 32}
      cluster: {num_replicas: 4, ray_actor_options: {num_cpus: 8}, threads: 8}
      ingress: {num_replicas: 2}
      http:    {host: 0.0.0.0, port: 8000}
      server:  {api_key_file: keys.txt}
    Deploy it from any of these machines:
      tiny-llm serve-cluster cluster.yaml
    Ask it:
      curl http://FIRST:8000/v1/models -H "Authorization: Bearer $(head -n 1 keys.txt)"

    Every section and every key is optional. The section engine has the options of the engine as in `tiny-llm
    serve --help`, with underscores; server has the others of a server; cluster says how many replicas of the
    engine run and what each gets; ingress, how many processes take the HTTP requests; http, where each
    machine listens. Each machine needs the same tiny-llm, Ray and Python, and the model under the same path.
    Others must not reach Ray's ports, where anyone can run code: docs/cluster.md says how to protect them.

    The command returns when the replicas are ready, and they run on. RAY_ADDRESS names the cluster; without
    it, it is the one of this machine.
    """
    if stop and (config is not None or check or restart):
        raise typer.BadParameter("it takes no file and no other option than --json", param_hint="--stop")
    if check and restart:
        raise typer.BadParameter("use it without --restart", param_hint="--check")
    if stop:
        _stop(as_json)
        return
    if config is None:
        raise typer.BadParameter("name the file that says what to deploy", param_hint="CONFIG")
    deployment = _read(config)
    if check:
        print(json.dumps({"status": "valid"}) if as_json else f"{config} is valid")
        return
    status = _deploy(deployment, restart)
    print(json.dumps(asdict(status)) if as_json else _as_text(status, config))


def _read(config: Path) -> "Deployment":
    """Read the file; warns if others can read the keys, or can send requests without one."""
    from .cluster_file import read_cluster_file

    deployment, keys = read_cluster_file(config)
    if keys is not None and not keys.is_private:
        _say("warning: other users can access the file that holds the API keys: run chmod 600")
    http = deployment.http
    if not http.is_local and not deployment.server.api_keys:
        _say(f"warning: other machines may reach {http.host}, and requests need no key: see api_key_file")
    return deployment


def _deploy(deployment: "Deployment", restart: bool) -> "DeployedStatus":
    from tiny_llm_cluster.deploy import connected, deploy, require_running

    with connected():
        if restart:
            require_running()
        return deploy(deployment, _say)


def _stop(as_json: bool) -> None:
    from tiny_llm_cluster.deploy import connected, stop

    with connected():
        stop(_say)
    print(json.dumps({"status": "stopped"}) if as_json else "Stopped")


def _as_text(status: "DeployedStatus", config: Path) -> str:
    addresses = "\n".join(f"Serving on {address}" for address in status.addresses)
    restart = f"tiny-llm serve-cluster {config} --restart"
    return f"{addresses}\nRestart one process after the other: {restart}\nStop: {_STOP}"


def _say(line: str) -> None:
    print(f"tiny-llm: {line}", file=sys.stderr, flush=True)
