"""Train: mfm-train [--launch LAUNCH.yaml] [--config RUN.yaml ...] [section.key=value ...]

One process, or those of a launch file, which `accelerate launch --config_file LAUNCH.yaml -m mfm_dist.train ...` starts
alike, or those of `torchrun --nproc_per_node N -m mfm_dist.train [--zero STAGE] ...`. The same command again resumes
the run in run.folder. Without arguments it runs the quickstart. Files are those of the working folder, or what is
shipped under that name. Exit codes: 0 done, 2 configuration, 3 bad data, 4 storage, 5 training that does not get past a
step, 6 out of memory, 75 stopped by a signal after saving, 76 hung, 77 a weight is not the same wherever it is held (75
to 77: run the same command again); outcome.json says the same.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mfm_dist.config.arguments import config_arguments, whole
from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.config.loader import describe, load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch, combination_problems, launch_problems
from mfm_dist.distributed.launcher import choose_zero, launch_environment, start_processes
from mfm_dist.errors import (
    EXIT_DONE,
    EXIT_ERROR,
    ConfigError,
    CorruptFileError,
    EndedByPeerError,
    OutOfMemoryError,
    StorageError,
    UserError,
    ended_from_outside,
    first_line,
    joined,
)
from mfm_dist.run.folder import LEASE, OUTCOME, RunFolder, storage_error, write_outcome
from mfm_dist.run.signals import StopRequested, end_process, end_with_launcher
from mfm_dist.storage import read_json, read_text

if TYPE_CHECKING:
    from mfm_dist.checkpoint.files import Checkpoint
    from mfm_dist.trainer import Trainer

QUICKSTART = Path("configs/quickstart.yaml")
RANK_0_SPEAKS_WITHIN = 20.0
"""Seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    if arguments.zero is not None:
        choose_zero(arguments.zero)
    launch = Launch.from_environment()
    folder = stop = trainer = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.check:
            check(config, launch_environment(arguments.launch) if arguments.launch else None)
            return EXIT_DONE
        if arguments.launch:
            return start_processes(arguments.launch, "mfm_dist.train", arguments.of_each_process)
        folder = config.run.folder
        end_with_launcher(launch)
        with StopRequested(folder, launch.rank) as stop, start_run(config, stop) as trainer:
            return EXIT_DONE if trainer is None else trainer.fit()
    except EndedByPeerError as ended:
        return ended.exit_code
    except Exception as error:
        step = trainer.progress.step if trainer else -1
        owned = stop is not None and stop.owns_folder
        mistake = error if isinstance(error, UserError) else None
        if mistake is None and isinstance(error, OSError) and folder is not None:
            mistake = storage_error(error, folder)
        if mistake is not None:
            return tell(mistake, launch.rank, folder, step=step, owned=owned)
        reason = f"{type(error).__name__}: {first_line(error)}"
        if outside := ended_from_outside(error):
            reason = f"rank {launch.rank}: {outside} ({reason})"
            print(reason, file=sys.stderr, flush=True)
        if folder is not None and owned and not (folder / OUTCOME).exists():  # the first rank to fail says why
            write_outcome(folder, code=EXIT_ERROR, reason=reason, step=step, owned=True)
        if outside:
            return EXIT_ERROR
        raise


@contextmanager
def start_run(config: RunConfig, stop: StopRequested) -> Iterator[Trainer | None]:
    """Build everything a run needs, and resume it if there is something to resume; None where nothing is left to do.

    Raises:
        UserError: on every rank, for what is wrong with the launch, the configuration, the data or the run folder.
    """
    # Not at the top: these imports take seconds, and by now signals are heard.
    from mfm_dist.build import build_train_module, open_readers, render_scenes
    from mfm_dist.checkpoint.resume import check_resumable, load_newest
    from mfm_dist.cluster.lease import Lease
    from mfm_dist.distributed.start import start_engine
    from mfm_dist.optim import build_optimizer
    from mfm_dist.run.logging import StartClock
    from mfm_dist.run.out_of_memory import ending_out_of_memory
    from mfm_dist.run.watchdog import LONGEST_WAIT, watch_run
    from mfm_dist.trainer import Trainer

    clock = StartClock()
    engine = start_engine(config, exchange_seconds=LONGEST_WAIT * config.watchdog.seconds)
    clock.lap("rendezvous")
    run = RunFolder(config.run.folder, writes=engine.is_main)
    say = print if engine.is_main else lambda _: None
    with engine.run_collectively(lambda: Lease.take(run.path) if engine.is_main else nullcontext()):
        engine.run_collectively(run.create)
        held = engine.from_main(lambda: read_text(run.path / LEASE))
        engine.run_collectively(lambda: run.check_shared(held, engine.rank))
        stop.owns_folder = True
        if engine.from_main(lambda: report_finished(config, run)):
            yield None
        else:
            with (
                closing(watch_run(run, engine, config.watchdog.seconds)) as watchdog,
                ending_out_of_memory(run, engine, watchdog),
            ):
                say(f"training in {engine.place}, {engine.arithmetic}")
                with watchdog.phase("start", 0):
                    engine.from_main(lambda: render_scenes(config))
                    readers = engine.run_collectively(lambda: open_readers(config))
                    for note in readers.notes:
                        say(note)
                    module = build_train_module(config, readers.classes)
                    fingerprints = {**readers.fingerprints, **module.fingerprints()}
                    clock.lap("data and networks")
                with watchdog.phase("start", 0):
                    engine.prepare(module, build_optimizer(module, config.optim, fused=engine.fuses_optimizer))
                    count = partial(count_global_batch, config)
                    trainer = Trainer(engine, module, readers, run, fingerprints, watchdog, lambda: stop.name, count)

                    def resume(checkpoint: Checkpoint) -> None:
                        say(f"resuming {checkpoint.path}")
                        check_resumable(checkpoint, config, fingerprints, readers.classes, say)
                        trainer.resume(checkpoint)

                with watchdog.phase("start", 0):
                    checkpoint = load_newest(run.checkpoints, engine, resume, say)
                    if checkpoint is not None:
                        engine.run_collectively(lambda: set_aside(checkpoint, run, say))
                    start, classes = trainer.progress.step, readers.classes
                    engine.run_collectively(lambda: run.begin(config, classes, engine.environment, start))
                    clock.lap("resume" if checkpoint is not None else "engine")
                say(f"started: {clock}")
                trainer.step_log.start_seconds = dict(clock.seconds)
                stop.training_begins()
                yield trainer
    engine.close()


def count_global_batch(config: RunConfig) -> int:
    """Count the floating-point operations that the networks need for a global batch. Takes seconds."""
    from mfm_dist.profiling.counting import count_step

    return config.blocks_per_step * sum(term.flop for term in count_step(config).values())


def set_aside(checkpoint: Checkpoint, run: RunFolder, say: Callable[[str], object]) -> None:
    """Put the damaged checkpoints that the run passes over where it will not write over them, and name them.

    Raises:
        StorageError: if the folder cannot be written.
    """
    from mfm_dist.checkpoint.files import set_aside_later

    if not run.writes:
        return
    try:
        for path in set_aside_later(checkpoint):
            run.event("checkpoint_set_aside", step=checkpoint.progress.step, path=str(path.relative_to(run.path)))
            say(f"  set aside: {path}")
    except OSError as error:
        raise StorageError(f"run.folder={run.path} cannot be written: {error}") from error


def report_finished(config: RunConfig, run: RunFolder) -> bool:
    """Tell whether a run has trained and scored its last step already; if so, say how it ended, and change nothing.

    Raises:
        ConfigError: if it is the run of another configuration.
    """
    from mfm_dist.checkpoint.files import DamagedCheckpointError, read_checkpoint, step_folder
    from mfm_dist.checkpoint.resume import check_resumable

    step = config.train.steps
    try:
        score = read_json(run.evaluation(step))["miou"]
        miou = None if score is None else float(score)
        checkpoint = read_checkpoint(step_folder(run.checkpoints, step))
    except (OSError, ValueError, KeyError, TypeError, CorruptFileError, DamagedCheckpointError):
        return False  # something is left to do, or to mend
    named = config.data.classes
    check_resumable(checkpoint, config, {}, load_class_set(named) if named else checkpoint.classes)
    print(f"{run.path} has been trained to step {step} already; more steps: train.steps=N")
    run.end(EXIT_DONE, "done", step, miou=miou)
    return True


def check(config: RunConfig, started: Mapping[str, str] | None = None) -> None:
    """Find what can be found wrong without training: configuration, trackers, weights, networks, shards.

    On a machine with GPUs also warn if the run will hardly fit one.

    Args:
        started: the environment of a launch file's processes; what is wrong with it is told, too.

    Raises:
        UserError: for all of it, of the kind of the first.
    """
    import torch

    from mfm_dist.build import build_train_module, check_data, check_shapes
    from mfm_dist.distributed.trackers import tracker_problems
    from mfm_dist.models.backbone import pretrained_problem

    errors: list[UserError] = []
    module = None
    launch = Launch.from_environment(os.environ if started is None else started)
    problems = tracker_problems(config)
    if started is not None:
        problems += launch_problems(started)
        problems += [*combination_problems(config, launch), *config.world_problems(launch.world_size)]
    if problems:
        errors.append(ConfigError(problems))
    config = replace(config, train=replace(config.train, compile=False))  # nothing is computed here
    try:
        classes, notes = check_data(config)
        for note in notes:
            print(note)
    except UserError as error:
        errors.append(error)
        classes = load_class_set(DEFAULT)  # the networks differ in their last layer alone
    try:
        if config.model.pretrained and (problem := pretrained_problem(config.model.backbone)):
            errors.append(ConfigError(problem))
            config = replace(config, model=replace(config.model, pretrained=False))
        module = build_train_module(config, classes)
        check_shapes(module)
    except UserError as error:
        errors.append(error)
    if errors or module is None:
        raise joined(errors)
    student = sum(p.numel() for p in module.student.parameters())
    rebuilder = sum(p.numel() for p in module.rebuilder.parameters()) if module.rebuilder is not None else 0
    print(f"ok: {config.method_label}{' + MFM' if config.mfm.enabled else ''}, {student / 1e6:.2f} M parameters in the")
    print(f"    segmentor, {rebuilder / 1e6:.2f} M in the Rebuilder; run.folder={config.run.folder}")
    if torch.cuda.is_available() and not launch.use_cpu:
        from mfm_dist.profiling.plan import does_not_fit

        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        if warning := does_not_fit(config, launch, gib):
            print(f"warning: {warning}")


def tell(error: UserError, rank: int, folder: Path | None, *, step: int, owned: bool) -> int:
    """Print the message, once, for it is the same on every rank; write it to the run folder too, if there is one.

    Out of memory is the exception: one rank says so for all.
    """
    if rank != 0 and not isinstance(error, OutOfMemoryError):
        # The launcher ends every rank as soon as one has ended, and rank 0 may not have spoken yet. Who is still there
        # after the wait met with something that rank 0 did not.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_SPEAKS_WITHIN)
    print(error, file=sys.stderr, flush=True)
    if folder is not None and folder.is_dir():
        write_outcome(folder, code=error.exit_code, reason=str(error), step=step, owned=owned)
    return error.exit_code


class Help(argparse.Action):
    """``--help``: everything; ``--help SECTION``: the keys that begin so."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, values: object, __: object = None) -> None:
        """Print and end."""
        if values is None:
            parser.print_help()
            parser.exit()
        keys = list(describe())
        chosen = [line for line in keys if re.match(rf"{re.escape(str(values))}(\.|=)", line)]
        if not chosen:
            sections = dict.fromkeys(re.split(r"[.=]", line, maxsplit=1)[0] for line in keys)
            near = difflib.get_close_matches(str(values), sections, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            parser.error(f"--help {values}: no such section or key; {meant}Sections: {', '.join(sections)}")
        print("\n".join(chosen))
        parser.exit()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``--help`` lists every key of the configuration, or those of one section."""
    keys = "\n".join(f"  {line}" for line in describe())
    parser = argparse.ArgumentParser(
        prog="mfm-train",
        description=__doc__,
        epilog=f"keys, defaults and meaning:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", nargs="?", action=Help, metavar="SECTION", help="all of this, or the keys of a section or key"
    )
    files = f"the run; given again, later files win key by key (default: {QUICKSTART})"
    parser.add_argument("--config", type=Path, action="append", metavar="FILE", help=files)
    processes = "a launch file: how many processes, on what, at which ZeRO stage (without: one process)"
    parser.add_argument("--launch", type=Path, metavar="FILE", help=processes)
    stage = "ZeRO stage, where torchrun starts the processes and there is no launch file (without: DDP)"
    parser.add_argument("--zero", type=whole(0, 3), metavar="N", help=stage)
    parser.add_argument("--check", action="store_true", help="find mistakes without training, then end")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.zero is not None and (arguments.launch or "ACCELERATE_USE_DEEPSPEED" in os.environ):
        parser.error("--zero is for torchrun: the launch file says the ZeRO stage already")
    arguments.config = arguments.config or [QUICKSTART]
    arguments.of_each_process = [*config_arguments(arguments.config), *arguments.overrides]
    return arguments


def command() -> NoReturn:
    """Run the console command: ``main``, and an end that no thread of gloo disturbs."""
    end_process(main())


if __name__ == "__main__":
    command()
