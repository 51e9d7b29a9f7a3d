"""Resolves a model's name to a local path; downloads it from the Hugging Face hub if necessary.

`huggingface_hub` does the downloads: they show a progress bar, resume after an interruption, use the hub's
cache, and respect HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .embedded import PACKAGED, embedded_model_path
from .errors import ModelFileError
from .gguf_split import split_names
from .hf_tokenizer import TEMPLATES
from .weight_files import INDEX, NOT_CHECKPOINTS, SINGLE, indexed_names

WANTED = ["*.json", "*.jinja"]  # the files other than weights; top folder only
_SUBFOLDERS = "*/*"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>[^/].*\.gguf))?")


def find_model(model: str | Path | None) -> Path:
    """The file or folder of a model.

    model: None for the embedded model; "smollm2" and "gemma3-270m" for models that come as packages; a path;
    `owner/name` for a repository on the hub, or `owner/name/FILE.gguf` for one of its files. A path that
    exists takes precedence over all other meanings.

    Raises a `ModelFileError` that names the model and what the user can do.
    """
    if model is None:
        return embedded_model_path()
    path = local_path(model)
    if os.path.exists(path):  # unlike Path.exists, it does not raise for names that are too long or invalid
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
    """`model` as a path, with ~ expanded; if the home folder is unknown, ~ stays as it is."""
    return Path(os.path.expanduser(model))


def _fetch(model: str, repo: str, file: str | None) -> Path:
    try:
        return _fetch_folder(repo) if file is None else _fetch_gguf(repo, file)
    except ModelFileError:
        raise
    except Exception as error:  # errors of huggingface_hub, of its HTTP client, and of the system
        raise ModelFileError(f"{model}: {_reason(error, repo)}") from error


def _fetch_gguf(repo: str, file: str) -> Path:
    """Download one file of a repository, with all parts if the model is split."""
    from huggingface_hub import errors, hf_hub_download

    found = Path(hf_hub_download(repo, file))
    folder, slash, name = file.rpartition("/")
    for part in split_names(name):
        try:
            hf_hub_download(repo, f"{folder}{slash}{part}")
        except errors.RemoteEntryNotFoundError as error:
            raise ModelFileError(
                f"{repo}/{folder}{slash}{part}: this part of {name} does not exist on the hub"
            ) from error
    return found


def _fetch_folder(repo: str) -> Path:
    """Download a repository's checkpoint: the small files, then the weights that `weight_files` reads."""
    folder = _snapshot(repo, WANTED)
    _snapshot(repo, [f"{TEMPLATES}/*.jinja"], folder.name, unwanted=[])
    if (folder / INDEX).exists():
        return _snapshot(repo, indexed_names(folder / INDEX, must_exist=False), folder.name)
    _snapshot(repo, [SINGLE], folder.name)
    if not (folder / SINGLE).exists():
        _snapshot(repo, ["*.safetensors"], folder.name, [_SUBFOLDERS, *NOT_CHECKPOINTS])
    return folder


def _snapshot(
    repo: str, wanted: Sequence[str], revision: str | None = None, unwanted: Sequence[str] = (_SUBFOLDERS,)
) -> Path:
    """Download the files that match a pattern; return their folder, whose name is the revision."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repo, revision=revision, allow_patterns=[*wanted], ignore_patterns=[*unwanted])
    )


def _reason(error: Exception, repo: str) -> str:
    """What went wrong at the hub, and what the user can do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} requires you to accept its terms: do so on its page on the hub, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such file or folder here, and no {repo} on the hub; if it is private, set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"no such file or folder here; {repo} is not in the local cache, and the hub cannot be reached"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} on the hub does not have this file"
    return f"cannot be downloaded from the hub: {' '.join(str(error).split()) or type(error).__name__}"
