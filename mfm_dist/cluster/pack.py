"""Several small runs on one node, a GPU each: python -m mfm_dist.cluster.pack --seeds 0 1 2 -- RUN CONFIG.yaml ...

Trains RUN/seed_N for each seed, all at once, each on the next of the node's GPUs (with more runs than GPUs they share
them; without GPUs, on the CPU). What a run prints goes to train.log in its folder. Finished runs end at once, and a
signal is passed on to all, so that the same command goes on where it was stopped. Exit code: 0 if all are done, 75 if a
run is to go on, else that of the first that failed. Needs no torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mfm_dist.config.arguments import config_arguments, whole
from mfm_dist.errors import EXIT_DONE, EXIT_HUNG, EXIT_MISMATCH, EXIT_STOPPED

GO_ON = (EXIT_STOPPED, EXIT_HUNG, EXIT_MISMATCH)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def gpus_here() -> list[str]:
    """List what CUDA_VISIBLE_DEVICES may name of this job's GPUs; nothing without a driver."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")]


def start(run: Path, seed: int, arguments: Sequence[str], gpu: str) -> subprocess.Popen[bytes]:
    """Start the training of one seed on one GPU; "" for the CPU."""
    folder = run / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mfm_dist.train", *arguments, f"seed={seed}", f"run.folder={folder}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with (folder / "train.log").open("ab") as log:  # a session of its own: signals come from here, once
        return subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m mfm_dist.cluster.pack", description=__doc__)
    parser.add_argument("--seeds", type=whole(0), nargs="+", required=True, metavar="N")
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder; each seed has one below it")
    parser.add_argument("settings", nargs="+", metavar="CONFIG.yaml | section.key=value", help="later ones win")
    arguments = parser.parse_args(argv)
    files = [Path(word) for word in arguments.settings if "=" not in word]
    overrides = [word for word in arguments.settings if "=" in word]
    gpus = gpus_here() or [""]
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    for place, seed in enumerate(arguments.seeds):
        passed_on = [*config_arguments(files), *overrides]
        running.append(start(arguments.run, seed, passed_on, gpus[place % len(gpus)]))
    codes = [process.wait() for process in running]
    for seed, code in zip(arguments.seeds, codes, strict=True):
        print(f"seed {seed}: exit code {code}, {arguments.run / f'seed_{seed}'}", flush=True)
    if any(code in GO_ON for code in codes):
        return EXIT_STOPPED
    return next((code if code > 0 else 1 for code in codes if code), EXIT_DONE)


if __name__ == "__main__":
    sys.exit(main())
