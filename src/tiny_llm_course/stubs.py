"""Links for editors and type checkers, which do not know that missing modules come from the reference.

For each module that the learner has not written, `src/tiny_llm/X.pyi` is a link to the reference's `X.py`. So
`from .X import C` resolves in a learner's file, and no class exists twice. Python never reads `.pyi` files,
and git ignores them.
"""

import os
from pathlib import Path

from .repo import Repo


def link_stubs(repo: Repo) -> int:
    """Update the links, one for each module that the overlay lacks, and return the number of new links."""
    known = {file.stem for file in repo.reference.glob("*.py")} - {"__init__"}
    own = {file.stem for file in repo.overlay.glob("*.py")}
    for stub in repo.overlay.glob("*.pyi"):
        if stub.is_symlink() and (stub.stem in own or stub.stem not in known):
            stub.unlink()
    modules = sorted(known - own)
    return sum(_link(repo.overlay / f"{one}.pyi", repo.reference / f"{one}.py") for one in modules)


def _link(stub: Path, module: Path) -> bool:
    """Create a relative link, so that the checkout can be moved; returns whether it is new."""
    target = os.path.relpath(module, stub.parent)
    if stub.is_symlink() and os.readlink(stub) == target:
        return False
    if stub.is_symlink():
        stub.unlink()
    try:
        stub.symlink_to(target)
    except OSError:
        return False  # a file with that name exists, or the system has no links
    return True
