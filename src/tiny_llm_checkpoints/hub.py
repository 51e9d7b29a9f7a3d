"""Where a model is: a name becomes a path on this machine, fetched from the Hugging Face hub where need be.

Downloads show a progress bar, go on where they were interrupted, and are kept in the hub's own cache;
HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT are honoured: all of it `huggingface_hub`'s doing.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .embedded import PACKAGED, embedded_model_path
from .errors import ModelFileError
from .gguf_split import split_names
from .weight_files import INDEX, NOT_CHECKPOINTS, SINGLE, indexed_names

WANTED = ["*.json", "*.jinja"]  # of a repository beside its weights; not its folders
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>[^/].*\.gguf))?")


def find_model(model: str | Path | None) -> Path:
    """The file or folder of a model.

    model: None is the embedded one; a path is taken as it is; "smollm2" and "gemma3-270m" come as packages;
    `owner/name` is a repository of the hub, and `owner/name/FILE.gguf` one file of it. What is there as a
    path is never looked up elsewhere.

    Raises `ModelFileError` naming what was asked for and what can be done.
    """
    if model is None:
        return embedded_model_path()
    path = local_path(model)
    if os.path.exists(path):  # where a name is too long, or no name at all, Path.exists would raise
        return path
    if str(model) in PACKAGED:
        return PACKAGED[str(model)]()
    hub_id = None if path.is_absolute() else _HUB_ID.fullmatch(str(model))
    if hub_id is None or hub_id["repo"].endswith(".gguf"):
        raise ModelFileError(
            f"{model}: no such file or folder. A model is a .gguf file, a folder in Hugging Face's layout, "
            f"owner/name on the hub, owner/name/FILE.gguf, or one of {', '.join(PACKAGED)}"
        )
    return _fetch(str(model), hub_id["repo"], hub_id["file"])


def local_path(model: str | Path) -> Path:
    """The path that a model's name would be; a home that is not known is part of the name."""
    return Path(os.path.expanduser(model))


def _fetch(model: str, repo: str, file: str | None) -> Path:
    try:
        return _fetch_folder(repo) if file is None else _fetch_gguf(repo, file)
    except ModelFileError:
        raise
    except Exception as error:  # the library raises its own kinds, its HTTP client's, and the system's
        raise ModelFileError(f"{model}: {_reason(error, repo)}") from error


def _fetch_gguf(repo: str, file: str) -> Path:
    """One file of a repository, with the other parts of a model that is split."""
    from huggingface_hub import errors, hf_hub_download

    found = Path(hf_hub_download(repo, file))
    folder, slash, name = file.rpartition("/")
    for part in split_names(name):
        try:
            hf_hub_download(repo, f"{folder}{slash}{part}")
        except errors.RemoteEntryNotFoundError as error:
            raise ModelFileError(
                f"{repo}/{folder}{slash}{part}: the hub has no such file, a part of {name}"
            ) from error
    return found


def _fetch_folder(repo: str) -> Path:
    """The checkpoint of a repository: what describes it, then the weights that `weight_files` would read."""
    folder = _snapshot(repo, WANTED)
    if (folder / INDEX).exists():
        return _snapshot(repo, indexed_names(folder / INDEX, are_here=False), folder.name)
    _snapshot(repo, [SINGLE], folder.name)
    if not (folder / SINGLE).exists():
        _snapshot(repo, ["*.safetensors"], folder.name, NOT_CHECKPOINTS)
    return folder


def _snapshot(
    repo: str, wanted: Sequence[str], revision: str | None = None, unwanted: Sequence[str] = ()
) -> Path:
    """The folder with those of a repository's files that fit a pattern; its name is the revision."""
    from huggingface_hub import snapshot_download

    left_out = ["*/*", *unwanted]
    return Path(
        snapshot_download(repo, revision=revision, allow_patterns=[*wanted], ignore_patterns=left_out)
    )


def _reason(error: Exception, repo: str) -> str:
    """What went wrong at the hub, and what can be done about it."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} asks for its terms to be accepted: do so on its page, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such file or folder here, and the hub has no {repo}, or it is private: then set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"no such file or folder here, {repo} is not in the hub's cache, and the hub cannot be reached"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} on the hub has no such file"
    return f"cannot be fetched from the hub: {' '.join(str(error).split()) or type(error).__name__}"
