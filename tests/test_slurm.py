"""The batch script, run with stand-ins for Slurm's commands."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import project
import pytest

SCRIPT = project.ROOT / "slurm" / "train.sbatch"
STUBS = {
    "srun": 'echo "srun $*" >> calls\nshift\nexec "$@"',
    "scontrol": 'echo "scontrol $*" >> calls\n[ "$1" = show ] && printf "node1\\nnode2\\n"\nexit 0',
}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


@pytest.fixture
def slurm(tmp_path):
    """A function that starts the script where torchrun is a given shell command."""

    def start(torchrun: str, *arguments: str) -> subprocess.Popen:
        for name, body in (STUBS | {"torchrun": torchrun}).items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        places = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
        places |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        places |= {"SLURM_GPUS_ON_NODE": "4"}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], cwd=tmp_path, env=os.environ | places
        )

    return start


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_the_script_is_bash_and_asks_for_a_signal_and_a_requeue():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    asked = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in asked
    assert any(line.startswith("#SBATCH --signal=B:TERM@") for line in asked)


def test_every_node_runs_a_process_for_each_gpu_with_the_arguments_of_the_job(slurm, tmp_path):
    assert slurm("exit 0", "config.yml", "--set", "train.epochs=5").wait() == 0
    started = next(line for line in calls(tmp_path) if line.startswith("srun"))
    assert "--nnodes=2 --nproc-per-node=4" in started
    assert "--rdzv-endpoint=node1:24711" in started
    assert started.endswith(
        "main.py config.yml --set train.epochs=5 --set resources.distributed=true"
    )
    assert not any("requeue" in line for line in calls(tmp_path))


STOPPED = """mkdir -p weights
trap 'echo "{\\"exit_code\\": 75}" > weights/status.json; kill "$nap"; exit 1' TERM
touch started
sleep 60 & nap=$!
wait "$nap"
"""


def test_a_run_that_the_signal_stopped_is_queued_again(slurm, tmp_path):
    job = slurm(STOPPED, "config.yml")
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 0
    assert "scontrol requeue 4711" in calls(tmp_path)


def test_a_run_that_failed_is_not_queued_again(slurm, tmp_path):
    failed = 'mkdir -p weights; echo "{\\"exit_code\\": 3}" > weights/status.json; exit 1'
    assert slurm(failed, "config.yml").wait() == 1
    assert not any("requeue" in line for line in calls(tmp_path))
