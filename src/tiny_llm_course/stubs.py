"""Links for editors and type checkers, which do not know that the overlay falls through to the reference.

`src/tiny_llm/X.pyi` is a link to the reference's `X.py`, for each module that is not the learner's. So
`from .X import C` resolves in a learner's file, and every class has one identity. Python itself never reads
`.pyi` files, and git ignores them.
"""

import os
from pathlib import Path

from .repo import Repo


def link_stubs(repo: Repo) -> int:
    """Bring the links up to date: one for each module of the reference that the overlay has no file for.

    How many were made that were not there before.
    """
    known = {file.stem for file in repo.reference.glob("*.py")} - {"__init__"}
    own = {file.stem for file in repo.overlay.glob("*.py")}
    for stub in repo.overlay.glob("*.pyi"):
        if stub.is_symlink() and (stub.stem in own or stub.stem not in known):
            stub.unlink()
    modules = sorted(known - own)
    return sum(_link(repo.overlay / f"{one}.pyi", repo.reference / f"{one}.py") for one in modules)


def _link(stub: Path, module: Path) -> bool:
    """A relative link, so that the checkout can be moved; where links cannot be made there is none.

    Whether it is new.
    """
    target = os.path.relpath(module, stub.parent)
    if stub.is_symlink() and os.readlink(stub) == target:
        return False
    if stub.is_symlink():
        stub.unlink()
    try:
        stub.symlink_to(target)
    except OSError:
        return False  # a file of that name, or a system without links
    return True
