"""Reads the file that `tiny-llm serve-cluster` deploys: YAML with five sections, each of them optional."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .field_types import check_types
from .key_file import KeyFile, read_keys
from .options import parse_bytes

if TYPE_CHECKING:
    from tiny_llm_cluster.deployment import Deployment

SECTIONS = ("engine", "server", "cluster", "ingress", "http")
MAX_NUM_WAITING = 256  # as `tiny-llm serve`
_OF_LLM = ("model", "chat_template_content_format")  # engine options that are not in `EngineConfig`
_SIZES = ("kv_cache_memory", "swap_space", "max_body_bytes", "body_memory_bytes")
_OF_CONNECTIONS = ("max_connections", "header_timeout", "timeout_keep_alive", "unread_timeout")


class ClusterFileError(ValueError):
    """The file cannot be read, or a value in it cannot work; the message names the file and the place."""


def read_cluster_file(file: Path) -> "tuple[Deployment, KeyFile | None]":
    """Return what the file describes, and the file of keys that it names, which is read too.

    Raises `ClusterFileError`, and OSError if one of the files cannot be read.
    """
    from tiny_llm_cluster.config import ClusterConfig
    from tiny_llm_cluster.deployment import Deployment, HttpConfig, IngressConfig

    sections = _sections(file)
    with _naming(file, "engine"):
        engine = _engine_options(sections["engine"])
    with _naming(file, "http"):
        http = HttpConfig(**_checked(HttpConfig, sections["http"]))
    with _naming(file, "server"):
        server, keys = _server(sections["server"], http.host, file.parent)
    with _naming(file, "cluster"):
        cluster = ClusterConfig(**_checked(ClusterConfig, sections["cluster"]))
    with _naming(file, "ingress"):
        ingress = IngressConfig(**_checked(IngressConfig, sections["ingress"]))
    return Deployment(engine=engine, server=server, cluster=cluster, ingress=ingress, http=http), keys


@contextmanager
def _naming(file: Path, section: str) -> Iterator[None]:
    """Name the file and the section in errors."""
    try:
        yield
    except ValueError as error:
        raise ClusterFileError(f"{file}: {section}: {error}") from error


def _sections(file: Path) -> dict[str, Mapping[str, Any]]:
    """The values of each section; a missing one has none."""
    from tiny_llm_checkpoints.errors import shown
    from tiny_llm_checkpoints.suggestions import unknown_name

    found = _yaml(file)
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise ClusterFileError(f"{file} must have the sections {', '.join(SECTIONS)}, not {shown(found)}")
    for name, values in found.items():
        if name not in SECTIONS:
            raise ClusterFileError(f"{file}: {unknown_name('section', str(name), SECTIONS)}")
        if not isinstance(values, dict | None):
            raise ClusterFileError(f"{file}: {name} must have keys and values, not {shown(values)}")
        if odd := [key for key in values or () if not isinstance(key, str)]:
            raise ClusterFileError(f"{file}: {name}: a key must be text, not {odd[0]!r}")
    return {name: found.get(name) or {} for name in SECTIONS}


def _yaml(file: Path) -> Any:
    """What is in a YAML file. Raises `ClusterFileError` with the line if it is broken or has a key twice."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("reading YAML needs PyYAML: pip install 'tiny-llm[cluster]'") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """PyYAML would keep the last one of two equal keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                if isinstance(key_node, yaml.ScalarNode):
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(file.read_bytes(), Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}"
        raise ClusterFileError(f"{file}{place}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ClusterFileError(f"{file} is not YAML: {error}") from error


def _checked(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, if each is for a field of `cls` and has its type."""
    from tiny_llm import ConfigError
    from tiny_llm_checkpoints.suggestions import check_fields

    check_fields(cls, values, "key", ConfigError)
    check_types(cls, values)
    return values


def _engine_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `LLM`."""
    from tiny_llm import ConfigError, EngineConfig
    from tiny_llm_checkpoints.chat_template import CONTENT_FORMATS
    from tiny_llm_checkpoints.errors import shown
    from tiny_llm_checkpoints.suggestions import check_fields

    check_fields(EngineConfig, values, "key", ConfigError, _OF_LLM)
    options = {"max_num_waiting": MAX_NUM_WAITING, **_with_bytes(values)}
    EngineConfig.from_options(**{name: value for name, value in options.items() if name not in _OF_LLM})
    model, content_format = options.get("model"), options.get("chat_template_content_format", "auto")
    if not isinstance(model, str | None):
        raise ConfigError(f"model must be text or null, not {shown(model)}")
    if content_format not in CONTENT_FORMATS:
        known = ", ".join(CONTENT_FORMATS)
        raise ConfigError(f"chat_template_content_format must be one of {known}, not {shown(content_format)}")
    return options


def _server(values: Mapping[str, Any], host: str, folder: Path) -> "tuple[Any, KeyFile | None]":
    """The server's configuration, and its file of keys. folder: where the file's name starts."""
    from tiny_llm import ConfigError
    from tiny_llm_checkpoints.errors import shown
    from tiny_llm_checkpoints.suggestions import unknown_name
    from tiny_llm_server import ServerConfig

    from .serve import ServerOptions, server_config

    refused = {
        **dict.fromkeys(_OF_CONNECTIONS, "Ray Serve's proxies accept the connections"),
        "api_keys": "write the keys into a file, one on each line, and its name here as api_key_file",
        "live": "the live page shows a single pool",
    }
    known = [field.name for field in fields(ServerConfig) if field.name not in refused] + ["api_key_file"]
    for name in values:
        if name in refused:
            raise ConfigError(f"{name} is not possible here: {refused[name]}")
        if name not in known:
            raise ConfigError(unknown_name("key", name, known))
    rest = _with_bytes({name: value for name, value in values.items() if name != "api_key_file"})
    check_types(ServerConfig, rest)
    keys, key_file = None, values.get("api_key_file")
    if not isinstance(key_file, str | None):
        raise ConfigError(f"api_key_file must be the name of a file, not {shown(key_file)}")
    if key_file is not None:
        keys = read_keys(folder / key_file)
    options = ServerOptions(**rest, api_keys=None if keys is None else list(keys.keys), live=False)
    return server_config(options, host), keys


def _with_bytes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with sizes such as 512MiB in bytes."""
    from tiny_llm import ConfigError

    converted = dict(values)
    for name in _SIZES:
        if isinstance(text := values.get(name), str):
            try:
                converted[name] = parse_bytes(text)
            except typer.BadParameter as error:
                raise ConfigError(f"{name}: {error.message}") from error
    return converted
