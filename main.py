"""DINOv3Seg: from GeoTIFFs and labels to a trained head and a finished map, on a frozen DINOv3.

    python main.py config.yml
    python main.py config.yml --set train.epochs=5 --set model.head=linear
    torchrun --standalone --nproc_per_node=4 main.py config.yml --set resources.distributed=true

Phases, each switched by its `enable` key: prepare (cache frozen features of labelled tiles), verify
(find bad tiles), train (fit a head), inference (map a scene). Without an argument the configuration
is $DINOV3SEG_CONFIG, or the nearest config.yml in this folder and the ones above it.

Exit codes: 0 done, 2 configuration, 3 input data or artefact, 4 environment (device, hub, disk,
memory, permission), 5 training diverged, 75 stopped by a signal (run again), 1 a bug of ours.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from config import Config, ConfigError, find_config, load_config, to_yaml
from utils.logging import STOPPED, TimedBlock, VerbosityLogger, complain, launched_rank, say

if TYPE_CHECKING:
    from utils.distributed import Runtime
    from utils.phases import Phase

# Imports of torch and everything above it stand inside the functions that need them: `--help` and a
# wrong configuration answer at once, and thread counts are set before torch reads them.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    >>> import contextlib, io
    >>> with contextlib.redirect_stderr(io.StringIO()) as said:
    ...     main(["no-such.yml"]), "no-such.yml" in said.getvalue()
    (2, True)
    """
    options = parse(arguments)
    try:
        config = load_config(find_config(options.config), options.set)
    except ConfigError as error:
        if launched_rank() == 0:
            complain("\n".join(f"error: {fault}" for fault in error.faults))
        return ConfigError.exit_code
    if options.print_config:
        say(to_yaml(config).rstrip())
        return 0
    return guarded(config)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options.

    >>> parse(["config.yml", "--set", "train.epochs=5"]).set
    ['train.epochs=5']
    """
    usage, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=usage, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="the YAML file that drives the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override one key, such as train.epochs=5; repeatable; its relative paths start here",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    return parser.parse_args(arguments)


def guarded(config: Config) -> int:
    """Run the phases; how they end is said in the log, in status.json and by the exit code."""
    from utils.process import ending_of, set_environment
    from utils.status import status_in

    rank, section = launched_rank(), config.logging
    set_environment(config)
    with status_in(config.train.weights_dir, wanted=rank == 0) as status:
        try:
            log = VerbosityLogger(section.level, section.timestamps, section.file, silent=rank > 0)
        except OSError as error:
            code, said = ending_of(error)
            said = f"{said} (logging.file)"
            complain(f"error: {said}")
            status(code, said)
            return code
        status(None, "")
        code, said = outcome_of(config, log)
        status(code, said)
        log.close()
    return code


def outcome_of(config: Config, log: VerbosityLogger) -> tuple[int, str]:
    """Run the phases; what goes wrong becomes one line and the exit code of its kind."""
    from utils.process import ending_of, stoppable

    rank = launched_rank()
    try:
        with stoppable():
            run_phases(config, log)
    except Exception as error:  # noqa: BLE001  what it is decides on the exit code
        code, said = ending_of(error)
        if rank == 0:
            log.fail(said, error)
        elif not getattr(error, "everywhere", False):
            log.fail(f"rank {rank}: {said}", error)
        return code, said
    return 0, ""


def run_phases(config: Config, log: VerbosityLogger) -> None:
    """Prepare, verify and train among the ranks; then the first one infers."""
    from utils.process import importing

    with importing():
        import torch

        from utils import phases
        from utils.block_cache import make_room
        from utils.distributed import distributed
        from utils.preflight import cache_held, check_paths, weights_held

    make_room(config)
    torch.set_float32_matmul_precision(config.resources.matmul_precision)
    with distributed(config.resources) as run:
        if run.is_main:
            check_paths(config)
        with weights_held(config, run):
            with cache_held(config, run):
                phases.load_libraries(config, run)
                phases.look_ahead(config, run, log)
                enter(phases.prepare, config, run, log)
                enter(phases.verify, config, run, log)
            enter(phases.train, config, run, log)
    # the group is left by now: nobody should wait in it while one rank maps a scene for hours
    if run.is_main:
        enter(phases.inference, config, run, log)


def enter(phase: "Phase", config: Config, run: "Runtime", log: VerbosityLogger) -> None:
    """Run a phase that is enabled, unless a signal has come in."""
    from utils.process import STOP, within_memory

    STOP.check()
    if getattr(config, phase.__name__).enable:
        with TimedBlock(log, phase.__name__), within_memory(phase.__name__):
            phase(config, run, log)


def start() -> None:
    """Run the command line and leave; ranks without the interpreter's own end, in which threads of
    torch's may abort it.
    """
    try:
        code = main()
    except KeyboardInterrupt:  # before the run has handlers of its own
        complain("error: stopped before the run began; run it again")
        code = STOPPED
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    start()
