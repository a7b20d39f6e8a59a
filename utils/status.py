"""status.json in `train.weights_dir`: how a run stands, for batch scripts.

torchrun ends with 1 whatever its processes end with; this file says with what the run ended.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from utils.artefacts import sweep, write_artefact
from utils.locks import if_free

STATUS, LOCK = "status.json", ".status.lock"
STATES = {
    0: "done",
    1: "failed: a bug of the program",
    2: "failed: configuration",
    3: "failed: input data or artefact",
    4: "failed: environment",
    5: "failed: training diverged",
    75: "stopped, run again",
}
Tell = Callable[[int | None, str], None]


@contextlib.contextmanager
def status_in(folder: Path, wanted: bool = True) -> Iterator[Tell]:
    """What writes a run's status.json: the exit code, None while the run goes on, and a message.

    Of runs that go on beside each other only the first one writes; a rank that is not `wanted` to
    writes nothing, and so does a run that has no place in the folder: its exit code and the log say
    the same.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, status_in(Path(folder)) as tell:
    ...     with status_in(Path(folder)) as tell_beside:
    ...         tell(75, "stopped by a signal"), tell_beside(4, "in use by another run")
    ...     json.loads(Path(folder, STATUS).read_text())["state"]
    (None, None)
    'stopped, run again'
    """
    with contextlib.ExitStack() as stack:
        ours = False
        with contextlib.suppress(OSError):
            if wanted:
                folder.mkdir(parents=True, exist_ok=True)
                ours = stack.enter_context(if_free(folder / LOCK))
        yield lambda code, message: write_status(folder, code, message) if ours else None


def write_status(folder: Path, code: int | None, message: str) -> None:
    """Write status.json, as far as that can be."""
    told = {
        "state": "running" if code is None else STATES[code],
        "exit_code": code,
        "message": message,
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):
        sweep(folder)  # what a run left that was killed while it wrote the same
        write_artefact(folder / STATUS, f"{json.dumps(told, indent=2)}\n".encode())
