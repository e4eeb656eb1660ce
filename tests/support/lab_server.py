"""A JupyterLab of its own for a test: on 127.0.0.1 with a token, every folder it writes in a temporary one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

LIMIT_S = 60

# Every cell in the page whether in sight or not, and nothing asked of the network.
_SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextlib.contextmanager
def lab_server(folder: Path, notebooks: Path) -> Iterator[str]:
    """Serve the folder `notebooks`; gives the address with `{path}` for a notebook's, the token included."""
    settings = folder / "settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(json.dumps(_SETTINGS))
    token = secrets.token_hex(16)
    environment = os.environ | {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "CS336_DATA")
    }
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}", "--ServerApp.allow_root=True"),
        *(f"--LabApp.app_settings_dir={settings}", f"--LabApp.user_settings_dir={folder / 'user-settings'}"),
        *(f"--LabApp.workspaces_dir={folder / 'workspaces'}", "--KernelManager.transport_encryption=auto"),
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        yield f"{_address(server, folder)}lab/tree/{{path}}?token={token}"
    finally:
        _end(server)


def _address(server: subprocess.Popen[bytes], folder: Path) -> str:
    """What the server writes of itself once it listens."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        assert server.poll() is None, (folder / "log").read_text()
        for path in (folder / "jupyter_runtime_dir").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):  # half written
                return str(json.loads(path.read_text())["url"])
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start: {(folder / 'log').read_text()}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """The server and the kernels it started, all of them."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    server.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    server.wait()
