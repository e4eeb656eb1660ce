"""Where the repository is, whatever the working directory.

JupyterLab starts a kernel in the notebook's folder, papermill in the caller's, pytest anywhere: every path of
the workbook is resolved from here.
"""

from __future__ import annotations

import os
from pathlib import Path

from cs336_systems.errors import UserError

MARKER = "problems.toml"
"""The file that only the repository's root has."""


def repository_root() -> Path:
    """The root of the checkout that this package belongs to.

    An editable install lies in the checkout. A package installed elsewhere is told by the environment
    variable CS336_ROOT, or finds the checkout around the working directory.

    Raises:
        UserError: neither place is a checkout.
    """
    told = os.environ.get("CS336_ROOT")
    if told:
        if (Path(told) / MARKER).is_file():
            return Path(told).resolve()
        raise UserError(f"CS336_ROOT is {told!r}, but there is no {MARKER} in it: set it to the checkout's root")
    around = Path.cwd()
    for candidate in (Path(__file__).resolve().parents[1], around, *around.parents):
        if (candidate / MARKER).is_file():
            return candidate
    raise UserError(
        f"expected a checkout of the workbook around {around}, found none: "
        "run inside the checkout, or set CS336_ROOT to its root"
    )


def cache_folder() -> Path:
    """Where what can be computed again is kept between runs: compiled code, tuned kernels. Not in git."""
    return repository_root() / ".cache"


def keep_compiled_code_here() -> None:
    """Tell the compilers of PyTorch and Triton to keep what they make in `cache_folder`, unless told otherwise."""
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(cache_folder() / name))


def shown_path(path: Path) -> str:
    """A path as it is told: from the root of the checkout if it lies within, else whole."""
    return str(path.relative_to(repository_root()) if path.is_relative_to(repository_root()) else path)
