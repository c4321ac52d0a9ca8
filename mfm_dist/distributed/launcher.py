"""Start the processes of a launch file: what ``accelerate launch`` does, told what it would otherwise complain of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.config.loader import read_yaml
from mfm_dist.config.shipped import find_shipped
from mfm_dist.errors import EXIT_ERROR, EXIT_STOPPED, ConfigError

SETTINGS = {
    # torchrun passes these signals on to the ranks, which save and end, instead of dying of them; and gives them time.
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "300",
    "OMP_NUM_THREADS": "1",  # torch's own threads are train.threads
}
"""Variables of the environment that are set where they are not."""
DEEPSPEED_VARIABLES = {
    "zero_stage": "DEEPSPEED_ZERO_STAGE",
    "deepspeed_config_file": "DEEPSPEED_CONFIG_FILE",
    "offload_optimizer_device": "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "gradient_accumulation_steps": "GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "GRADIENT_CLIPPING",
}
"""Entries of ``deepspeed_config`` in a launch file, and the variables in which Accelerate hands them over."""


def start_processes(file: Path, module: str, arguments: Sequence[str]) -> int:
    """Run a module of Python in as many processes as a launch file says, and wait for them.

    Args:
        file: in the working folder, or the one of that name that is shipped.

    Returns:
        the exit code of the first process that failed, or 0.

    Raises:
        ConfigError: there is no such file.
    """
    found = find_launch_file(file)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # DeepSpeed looks for a GPU when it is imported, and warns where there is none. The launcher needs none to be found,
    # and its processes look for themselves.
    chosen = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = chosen or "cpu"
    import deepspeed  # noqa: F401
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if chosen is None:
        del os.environ["DS_ACCELERATOR"]
    try:
        launch_command(launch_command_parser().parse_args(["--config_file", str(found), "-m", module, *arguments]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else EXIT_ERROR
    except subprocess.CalledProcessError as error:  # of a single process
        return error.returncode if error.returncode > 0 else EXIT_ERROR
    except SignalException:
        return EXIT_STOPPED
    return 0


def find_launch_file(file: Path) -> Path:
    """Return the launch file of the working folder, or the one of that name that is shipped. Raises ConfigError."""
    found = find_shipped(file)
    if not found.is_file():
        there = sorted(str(file.parent / path.name) for path in find_shipped(file.parent).glob("*.yaml"))
        known = f"; there are: {', '.join(there)}" if there else ""
        raise ConfigError(f"--launch {file}: no such launch file{known}")
    return found


def launch_environment(file: Path) -> dict[str, str]:
    """Return what the processes of a launch file will find in their environment, as far as ``launch`` reads it.

    Raises:
        ConfigError: there is no such file, or it is none that could be read.
    """
    tree = read_yaml(find_launch_file(file))
    kind = tree.get("distributed_type")
    deepspeed, dynamo = tree.get("deepspeed_config") or {}, tree.get("dynamo_config") or {}
    try:
        processes, machines = int(tree.get("num_processes", 1)), int(tree.get("num_machines", 1))
    except (TypeError, ValueError):
        processes = machines = 0
    if min(processes, machines) < 1:
        raise ConfigError(f"--launch {file}: num_processes and num_machines have to be numbers, 1 at least")
    if not isinstance(deepspeed, dict):
        raise ConfigError(f"--launch {file}: deepspeed_config has to hold zero_stage or deepspeed_config_file")
    if deepspeed.get("zero_stage") not in (None, 0, 1, 2, 3):
        raise ConfigError(f"--launch {file}: zero_stage={deepspeed['zero_stage']}, there are 0, 1, 2 and 3")
    if not isinstance(dynamo, dict):
        raise ConfigError(f"--launch {file}: leave dynamo_config out, train.compile of the run decides it")
    said = {
        "USE_CPU": tree.get("use_cpu", False) or set(str(tree.get("gpu_ids", "all")).split(",")) == {"-1"},
        "USE_FSDP": kind == "FSDP",
        "USE_MEGATRON_LM": kind == "MEGATRON_LM",
        "MIXED_PRECISION": tree.get("mixed_precision") or "no",  # YAML reads a bare no as false
        "DYNAMO_BACKEND": dynamo.get("dynamo_backend") or tree.get("dynamo_backend") or "no",
    }
    if kind == "DEEPSPEED":
        said["USE_DEEPSPEED"] = True
        given = {key: value for key, value in deepspeed.items() if value is not None}
        said |= {name: given[key] for key, name in DEEPSPEED_VARIABLES.items() if key in given}
    environment = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(max(1, processes // machines))}
    return environment | {f"ACCELERATE_{name}": str(value) for name, value in said.items()}


def choose_zero(stage: int) -> None:
    """Have this process, which torchrun started, train at a ZeRO stage, with the shipped DeepSpeed file of the stage.

    Says so in the variables of ``accelerate launch``, which both Accelerate and ``Launch`` read.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    file = Path(f"configs/deepspeed/zero{stage}.json")
    if find_shipped(file).is_file():
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
