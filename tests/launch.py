"""Scripts in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def in_two_processes(script: Path, seconds: int) -> subprocess.CompletedProcess[str]:
    """Runs a script under torch's launcher, two processes on the CPU; fails with what they printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(_free_port()), str(script)], env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
