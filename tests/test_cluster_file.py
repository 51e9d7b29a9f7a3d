"""The file of `tiny-llm serve-cluster`: what it may say, and what its errors say. Needs no Ray.

Oracles: the dataclasses that the sections stand for.
"""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from command_line import Run, plain_cli
from tiny_llm_cli.cluster_file import ClusterFileError, read_cluster_file
from tiny_llm_cluster.config import ClusterConfig
from tiny_llm_cluster.deployment import Deployment, HttpConfig, IngressConfig
from tiny_llm_server import ServerConfig

__all__ = ["plain_cli"]
pytest.importorskip("yaml")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "a-key-that-is-secret"
EVERYTHING = """\
engine:
  model: smollm2
  max_num_seqs: 8
  kv_cache_memory: 64MiB
  speculative_config: {method: ngram}
server:
  served_model_name: the-model
  api_key_file: keys.txt
  isolate_keys: true
  max_body_bytes: 1MiB
  request_timeout: null
  allowed_hosts: [llm.example]
  scheduling_policy: priority
cluster:
  num_replicas: 3
  ray_actor_options: {num_cpus: 2}
  max_replicas_per_node: 4
  threads: 2
  grace: 5
ingress:
  num_replicas: 2
  ray_actor_options: {num_cpus: 0.5}
  max_replicas_per_node: 1
  log_level: warning
http: {host: 0.0.0.0, port: 8123}
"""


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "cluster.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def error_of(folder: Path, text: str | bytes) -> str:
    """The error's message, without the folder's name."""
    with pytest.raises(ClusterFileError) as raised:
        read_cluster_file(written(folder, text))
    return str(raised.value).removeprefix(f"{folder}/")


def keys_in(folder: Path, text: str = f"{KEY}\n", mode: int = 0o600) -> None:
    (folder / "keys.txt").write_text(text)
    (folder / "keys.txt").chmod(mode)


# ---- what it may say ----


def test_every_section_is_read(tmp_path: Path) -> None:
    keys_in(tmp_path)
    deployment, keys = read_cluster_file(written(tmp_path, EVERYTHING))
    assert deployment == Deployment(
        engine={
            "model": "smollm2",
            "max_num_seqs": 8,
            "kv_cache_memory": 64 << 20,
            "speculative_config": {"method": "ngram"},
            "max_num_waiting": 256,
        },
        server=ServerConfig(
            served_model_name="the-model",
            api_keys=(KEY,),
            isolate_keys=True,
            max_body_bytes=1 << 20,
            request_timeout=None,
            allowed_hosts=("llm.example", *LOOPBACK),
            scheduling_policy="priority",
            live=False,
        ),
        cluster=ClusterConfig(
            num_replicas=3,
            ray_actor_options={"num_cpus": 2},
            max_replicas_per_node=4,
            threads=2,
            grace=5,
        ),
        ingress=IngressConfig(
            num_replicas=2,
            ray_actor_options={"num_cpus": 0.5},
            max_replicas_per_node=1,
            log_level="warning",
        ),
        http=HttpConfig(host="0.0.0.0", port=8123),
    )
    assert keys is not None
    assert keys.is_private


@pytest.mark.parametrize("text", ["", "engine:\nhttp:\n", "# nothing\n", "{}"])
def test_everything_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv("TINY_LLM_API_KEY", raising=False)
    deployment, keys = read_cluster_file(written(tmp_path, text))
    server = ServerConfig(live=False, allowed_hosts=LOOPBACK)
    assert deployment == Deployment(engine={"max_num_waiting": 256}, server=server)
    assert keys is None


def test_the_keys_are_in_no_repr(tmp_path: Path) -> None:
    keys_in(tmp_path)
    deployment, _ = read_cluster_file(written(tmp_path, EVERYTHING))
    assert deployment.server.api_keys == (KEY,)
    assert KEY not in repr(deployment)


# ---- what its errors say ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clutser: {}", "unknown section 'clutser'; did you mean cluster?"),
        ("nothing: {}", "unknown section 'nothing'; known: engine, server, cluster, ingress, http"),
        ("cluster: {num_replica: 2}", "cluster: unknown key 'num_replica'; did you mean num_replicas?"),
        ("engine: {max-num-seqs: 2}", "engine: unknown key 'max-num-seqs'; did you mean max_num_seqs?"),
        ("server: {max_m: 2}", "server: unknown key 'max_m'; did you mean max_n?"),
        ("server: {api_keyfile: k}", "server: unknown key 'api_keyfile'; did you mean api_key_file?"),
        ("ingress: {num_replcas: 2}", "ingress: unknown key 'num_replcas'; did you mean num_replicas?"),
        ("http: {prot: 2}", "http: unknown key 'prot'; did you mean port?"),
        ("http: {1: 2}", "http: a key must be text, not 1"),
    ],
)
def test_an_unknown_name_is_named_with_its_section(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(tmp_path, text) == f"cluster.yaml: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engine: fast", "engine must have keys and values, not 'fast'"),
        ("engine: {max_num_seqs: many}", "engine: max_num_seqs must be a whole number, not 'many'"),
        ("engine: {model: 3}", "engine: model must be text or null, not 3"),
        ("engine: {kv_cache_memory: 5 miles}", "engine: kv_cache_memory: '5 miles' is not a size"),
        ("engine: {kv_cache_dtype: int3}", "engine: kv_cache_dtype must be one of float32"),
        ("engine: {chat_template_content_format: x}", "engine: chat_template_content_format must be one of"),
        ("server: {max_n: many}", "server: max_n must be a whole number, not 'many'"),
        ("server: {max_n: true}", "server: max_n must be a whole number, not True"),
        ("server: {max_n: 0}", "server: max_n must be at least 1, not 0"),
        ("server: {keep_alive: soon}", "server: keep_alive must be a number, not 'soon'"),
        ("server: {isolate_keys: 1}", "server: isolate_keys must be true or false, not 1"),
        ("server: {allowed_hosts: a}", "server: allowed_hosts must be a list of texts, not 'a'"),
        ("server: {allowed_hosts: [1]}", "server: allowed_hosts must be a list of texts, not [1]"),
        ("server: {scheduling_policy: x}", "server: scheduling_policy must be fcfs or priority, not 'x'"),
        ("server: {override_generation_config: 1}", "server: override_generation_config must be a mapping"),
        ("server: {api_key_file: 7}", "server: api_key_file must be the name of a file, not 7"),
        ("server: {isolate_keys: true}", "server: isolate_keys needs api_keys"),
        ("cluster: {num_replicas: two}", "cluster: num_replicas must be a whole number, not 'two'"),
        ("cluster: {num_replicas: 0}", "cluster: num_replicas must be a whole number of at least 1, not 0"),
        (
            "cluster: {max_replicas_per_node: 0}",
            "cluster: max_replicas_per_node must be a whole number of at least 1, not 0",
        ),
        (
            "cluster: {max_replicas_per_node: 101}",
            "cluster: max_replicas_per_node must be at most 100, not 101",
        ),
        (
            "ingress: {max_replicas_per_node: 101}",
            "ingress: max_replicas_per_node must be at most 100, not 101",
        ),
        (
            "ingress: {max_replicas_per_node: -1}",
            "ingress: max_replicas_per_node must be at least 1, not -1",
        ),
        ("cluster: {threads: 1.5}", "cluster: threads must be a whole number or null, not 1.5"),
        ("cluster: {routing_policy: x}", "cluster: routing_policy must be one of prefix"),
        ("cluster: {ray_actor_options: 4}", "cluster: ray_actor_options must be a mapping, not 4"),
        (
            "cluster: {autoscaling_config: {min_replicas: 0}}",
            "cluster: autoscaling_config: min_replicas must be at least 1, not 0: without a replica",
        ),
        (
            "cluster: {autoscaling_config: {max_replica: 2}}",
            "cluster: autoscaling_config: unknown key 'max_replica'; did you mean max_replicas?",
        ),
        (
            "cluster: {autoscaling_config: {max_replicas: many}}",
            "cluster: autoscaling_config: max_replicas: Input should be a valid integer",
        ),
        (
            "cluster: {autoscaling_config: {min_replicas: 3, max_replicas: 2}}",
            "cluster: autoscaling_config: Value error, max_replicas (2) must be greater than or equal to",
        ),
        ("ingress: {num_replicas: 0}", "ingress: num_replicas must be at least 1, not 0"),
        ("ingress: {log_level: loud}", "ingress: log_level must be one of critical"),
        ("http: {port: 70000}", "http: port must be from 1 to 65535, not 70000"),
        ("http: {host: null}", "http: host must be text, not None"),
        ("http: {host: ''}", "http: host must not be empty"),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.delenv("TINY_LLM_API_KEY", raising=False)
    assert error_of(tmp_path, text).startswith(f"cluster.yaml: {expected}")


@pytest.mark.parametrize(
    "name", ["max_connections", "header_timeout", "timeout_keep_alive", "unread_timeout", "api_keys", "live"]
)
def test_what_the_proxies_cannot_do_is_refused(tmp_path: Path, name: str) -> None:
    assert name in {field.name for field in fields(ServerConfig)}
    assert error_of(tmp_path, f"server: {{{name}: 1}}").startswith(
        f"cluster.yaml: server: {name} is not possible here: "
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engine: {}\nhttp: {port: 1\n", 3),
        ("engine: {}\n\thttp: 1\n", 2),
        ("http:\n  port: 1\n  host: a\n  port: 2\n", 4),
        ("http: {}\nengine: {}\nhttp: {}\n", 3),
        ("engine: {}\nhttp: !!python/name:os.system\n", 2),
        ("http: {port: 1}\n---\nhttp: {port: 2}\n", 2),
    ],
)
def test_broken_yaml_is_an_error_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    assert re.match(rf"cluster\.yaml, line {line}: \w", error_of(tmp_path, text))


@pytest.mark.parametrize("text", [b"\xff\xfe\xff", b"http: \x00", "[" * 5000, "7", "- engine"])
def test_what_is_not_a_mapping_is_an_error_of_one_line(tmp_path: Path, text: Any) -> None:
    assert error_of(tmp_path, text).startswith("cluster.yaml")


def test_a_file_of_keys_is_read_once_and_its_errors_show_no_key(tmp_path: Path) -> None:
    keys_in(tmp_path, f" {KEY}\n")
    message = error_of(tmp_path, "server: {api_key_file: keys.txt}")
    assert "keys.txt, line 1: a key must not start or end with white space" in message
    assert KEY not in message


# ---- the command ----


def test_check_reads_the_file_only(plain_cli: Run, tmp_path: Path) -> None:
    keys_in(tmp_path)
    file = written(tmp_path, EVERYTHING)
    assert plain_cli("serve-cluster", str(file), "--check") == (0, f"{file} is valid\n", "")
    assert plain_cli("serve-cluster", str(file), "--check", "--json") == (0, '{"status": "valid"}\n', "")


def test_check_warns_of_keys_that_others_can_read_and_of_a_server_without_keys(
    plain_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINY_LLM_API_KEY", raising=False)
    keys_in(tmp_path, mode=0o644)
    readable = plain_cli("serve-cluster", str(written(tmp_path, EVERYTHING)), "--check")
    assert readable.code == 0
    assert "other users can access the file that holds the API keys" in readable.err
    without = plain_cli("serve-cluster", str(written(tmp_path, "http: {host: 0.0.0.0}")), "--check")
    assert "other machines may reach 0.0.0.0, and requests need no key" in without.err


def test_an_error_of_the_file_is_one_line(plain_cli: Run, tmp_path: Path) -> None:
    file = written(tmp_path, "http: {prot: 1}")
    done = plain_cli("serve-cluster", str(file), "--check")
    message = f"tiny-llm: error: {file}: http: unknown key 'prot'; did you mean port?\n"
    assert done == (1, "", message)
    missing = plain_cli("serve-cluster", str(tmp_path / "none.yaml"))
    assert missing == (1, "", f"tiny-llm: error: {tmp_path}/none.yaml: No such file or directory\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "CONFIG: name the file that says what to deploy"),
        (["a.yaml", "--stop"], "--stop: it takes no file"),
        (["--stop", "--restart"], "--stop: it takes no file"),
        (["a.yaml", "--check", "--restart"], "--check: use it without --restart"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    plain_cli: Run, options: list[str], expected: str
) -> None:
    done = plain_cli("serve-cluster", *options)
    assert done.code == 2
    assert done.err.startswith(f"tiny-llm: error: {expected}")


def test_the_example_in_the_help_is_valid(plain_cli: Run, tmp_path: Path) -> None:
    shown = plain_cli("serve-cluster", "--help")
    assert shown.code == 0
    example = re.search(r"Write cluster\.yaml:\n(.*?)\n  Deploy", shown.out, re.DOTALL)
    assert example is not None
    keys_in(tmp_path)
    deployment, _ = read_cluster_file(written(tmp_path, re.sub("^    ", "", example[1], flags=re.MULTILINE)))
    assert (deployment.cluster.num_replicas, deployment.http.host) == (4, "0.0.0.0")


WITHOUT_RAY = """
import sys

sys.modules["ray"] = None  # an import of it fails from now on
from tiny_llm_cli.main import run

sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments",
    [["serve-cluster", "cluster.yaml"], ["serve-cluster", "--stop"], ["serve", "--replicas", "2"]],
)
def test_without_ray_a_line_says_what_to_install(tmp_path: Path, arguments: list[str]) -> None:
    written(tmp_path, "")
    command = [sys.executable, "-c", WITHOUT_RAY, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    expected = "tiny-llm: error: replicas need Ray: pip install 'tiny-llm[cluster]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
