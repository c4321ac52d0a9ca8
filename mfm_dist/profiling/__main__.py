"""Count and time what a run does: mfm-profile (flops | kernels | plan | step | data) [section.key=value ...]

flops: parameters and operations by module, and of a training step by term; kernels: what a
GPU would be asked to do in a step; plan: memory, time and hours of a run on GPUs before it
is started; step: images a second and the parts of a step, with and without MFM, against a
bare PyTorch loop; data: the data pipeline by part.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mfm_dist.config.arguments import Command, run_named
from mfm_dist.profiling import flops, kernels, plan_command, throughput

COMMANDS: dict[str, Command] = {
    "flops": flops.main,
    "kernels": kernels.main,
    "plan": plan_command.main,
    **throughput.COMMANDS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_named(COMMANDS, __doc__, "mfm-profile", argv)


if __name__ == "__main__":
    sys.exit(main())
