"""Train: accelerate launch [--config_file LAUNCH.yaml] -m mfm_dist.train [--config RUN.yaml] [section.key=value ...]

The same command again resumes the run in run.folder. Without arguments it runs the quickstart. Exit codes: 0 done,
2 configuration, 3 bad data, 4 storage, 75 stopped by a signal after saving; outcome.json says the same.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.build import build_train_module, open_readers
from mfm_dist.checkpoint import Checkpoint, Progress, find_latest, load_modules, load_optimizer
from mfm_dist.config.loader import changed_keys, describe, load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.data.scene_shards import write_scenes
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, StorageError, UserError
from mfm_dist.optim import build_optimizer
from mfm_dist.run_folder import RunFolder
from mfm_dist.trainer import StopRequested, Trainer

QUICKSTART = Path("configs/quickstart.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    rank = Launch.from_environment().rank
    run: RunFolder | None = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        run = RunFolder(config.run.folder, writes=rank == 0)
        if arguments.check:
            check(config)
            return EXIT_DONE
        return train(config, run)
    except UserError as error:
        # The same message on every rank: one copy is enough.
        if rank == 0:
            print(error, file=sys.stderr, flush=True)
        if run is not None and not arguments.check:
            run.outcome(error.exit_code, str(error), step=-1)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        full = StorageError(f"{error}. Checkpoints are intact; free some space and start the same command again")
        print(full, file=sys.stderr, flush=True)
        if run is not None:
            run.outcome(full.exit_code, str(full), step=-1)
        return full.exit_code


def train(config: RunConfig, run: RunFolder) -> int:
    """Build everything, resume if there is something to resume, train, say how it ended."""
    stop = StopRequested()
    engine = start_engine(config)
    module = build_train_module(config)
    engine.agreed(lambda: prepare_folders(config, run, engine.is_main))
    readers = engine.agreed(lambda: open_readers(config, module.method.supervised_on))

    say = print if engine.is_main else lambda _: None
    checkpoint = find_latest(run.checkpoints, report=say)
    progress = Progress()
    if checkpoint is not None:
        progress = checkpoint.progress
        say(f"resuming {checkpoint.path}")
        for line in changed_keys(checkpoint.config, config):
            say(f"  changed since: {line}")
        refuse_other_positions(checkpoint, config)
        load_modules(checkpoint, module, engine.rank)
    world = {"world_size": engine.world_size, "device": str(engine.device)}
    engine.agreed(lambda: run.begin(config, world, progress.step))
    optimizer = build_optimizer(module, config.optim)
    engine.prepare(module, optimizer)
    if checkpoint is not None:
        load_optimizer(checkpoint, module, engine)

    trainer = Trainer(config=config, engine=engine, module=module, readers=readers, run=run, progress=progress)
    finished = trainer.fit(stop)
    code, reason = (EXIT_DONE, "done") if finished else (EXIT_STOPPED, f"stopped by {stop.name or 'another rank'}")
    if finished:
        scores = trainer.scores or trainer.evaluate()
        result = {"run": str(run.path), "step": progress.step, "miou": round(scores.miou, 4)}
        say("RESULT " + json.dumps(result))
    else:
        say(f"{reason}; the same command goes on from step {progress.step}")
    run.outcome(code, reason, progress.step)
    engine.close()
    return code


def prepare_folders(config: RunConfig, run: RunFolder, is_main: bool) -> None:
    """Make the run folder and, where asked for, the scenes; rank 0 does it for all."""
    run.create()
    if config.data.render_scenes and is_main:
        scenes = config.scenes
        write_scenes(
            config.data.root, train=scenes.train, val=scenes.val, size=scenes.size, seed=scenes.seed, report=print
        )


def refuse_other_positions(checkpoint: Checkpoint, config: RunConfig) -> None:
    """A block is ``micro_batch`` samples, so another size would move the position in the data.

    Raises:
        ConfigError: if the micro-batch differs from the checkpoint's.
    """
    before = checkpoint.config["train"]["micro_batch"]
    if before != config.train.micro_batch:
        raise ConfigError(
            f"train.micro_batch={config.train.micro_batch}, but {checkpoint.path} counts its data in micro-batches of "
            f"{before}: keep {before}, or choose another run.folder"
        )


def check(config: RunConfig) -> None:
    """What can be found wrong without training: configuration, networks, shards."""
    module = build_train_module(config)
    if not config.data.render_scenes:
        open_readers(config, module.method.supervised_on)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    student = sum(p.numel() for p in module.student.parameters())
    print(f"ok: {config.method.name}{' + MFM' if config.mfm.enabled else ''}, {student / 1e6:.2f} M parameters in the")
    print(f"    segmenter, {(trainable - student) / 1e6:.2f} M in the Rebuilder; run.folder={config.run.folder}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--help`` lists every key of the configuration."""
    keys = "\n".join(f"  {line}" for line in describe())
    parser = argparse.ArgumentParser(
        prog="python -m mfm_dist.train",
        description=__doc__,
        epilog=f"keys, defaults and meaning:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = f" (default: {QUICKSTART})"
    parser.add_argument("--config", type=Path, default=QUICKSTART, metavar="FILE", help="the run" + default)
    parser.add_argument("--check", action="store_true", help="find mistakes without training, then end")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
