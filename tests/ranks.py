"""Run a function of a test module on several ranks: processes that train together over loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 600

_CODE = """
import atexit, importlib, json, sys
import torch.distributed as dist
atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())  # runs last; otherwise gloo may abort
module, name, arguments, out = sys.argv[1:]
result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
import os
with open(f"{out}.{os.environ['LOCAL_RANK']}", "w") as file:
    json.dump(result, file)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _log_tails(logs: list[Path]) -> str:
    return "".join(log.read_text()[-4000:] for log in logs)


def run_on_ranks(module: str, name: str, out: Path, world: int = 2, **arguments: Any) -> list[Any]:
    """Call ``module.name(world=world, **arguments)`` on every rank, and return the results by rank."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    logs = [out.with_suffix(f".{rank}.log") for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _CODE,
            module,
            name,
            json.dumps(arguments | {"world": world}),
            str(out),
        ]
        environment = os.environ | common | {"LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)  # noqa: S603
            )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while any(process.poll() is None for process in processes):  # a failed rank leaves the others waiting
            failed = any(process.poll() not in (None, 0) for process in processes)
            assert not failed, _log_tails(logs)
            assert time.monotonic() < deadline, _log_tails(logs)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log.read_text()[-4000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world)]
