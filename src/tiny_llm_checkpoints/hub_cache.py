"""Lists the models in the Hugging Face hub's cache, which load without a download."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .errors import ModelFileError
from .gguf_split import split_names
from .weight_files import weight_files

MAIN = "main"  # the revision that `find_model` loads


class CachedModel(NamedTuple):
    """A model in the cache. name: for `find_model`. nbytes: the size of its weights."""

    name: str
    nbytes: int


def cached_models() -> list[CachedModel]:
    """The complete models in the cache, by name. Empty if there is no cache."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    folders = [
        (repo.repo_id, revision.snapshot_path)
        for repo in repos
        for revision in repo.revisions
        if repo.repo_type == "model" and MAIN in revision.refs
    ]
    return sorted(model for repo, folder in folders for model in _models_in(repo, folder))


def _models_in(repo: str, folder: Path) -> Iterator[CachedModel]:
    """The checkpoint of a downloaded repository, and its GGUF files, without those that lack a part."""
    if (folder / "config.json").exists():
        with suppress(ModelFileError):  # the weights are missing or incomplete
            yield CachedModel(repo, _size(weight_files(folder)))
    for file in sorted(folder.rglob("*.gguf")):
        parts = [file.with_name(name) for name in split_names(file.name)]
        if parts[0] == file and all(part.exists() for part in parts):
            yield CachedModel(f"{repo}/{file.relative_to(folder).as_posix()}", _size(parts))


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
