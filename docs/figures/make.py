"""Write the figures of ARCHITECTURE.md into this folder: `pdm run figures`."""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import layers
import token_path

FIGURES: dict[str, Callable[[], str]] = {"layers.svg": layers.draw, "token_path.svg": token_path.draw}


def main() -> None:
    """Write every figure and print its path."""
    ArgumentParser(prog="pdm run figures", description=__doc__).parse_args()
    for name, draw in FIGURES.items():
        (Path(__file__).parent / name).write_text(draw(), encoding="utf-8")
        print(f"wrote docs/figures/{name}")


if __name__ == "__main__":
    main()
