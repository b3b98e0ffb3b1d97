"""Several processes that train together on this machine, as torchrun would start them."""

import os
import socket
import subprocess
import sys


def launch(script: str, *arguments: object, size: int = 2, timeout: float = 120) -> list[tuple[int, str]]:
    """Runs a script on `size` ranks; the exit code of each and what it said, standard error included.

    A rank that hangs past the timeout is an error here, and none is left behind.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]
