"""One start of a run: build everything, resume if there is something to resume, train, say how it ended."""

from __future__ import annotations

import json
import time
from contextlib import closing, nullcontext

import torch

from mfm_dist.build import build_train_module, open_readers
from mfm_dist.checkpoint import Progress, find_resumable, load_state, resume_problems
from mfm_dist.cluster.lease import Lease
from mfm_dist.config.loader import changed_keys
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.distributed.trackers import Trackers, tracker_problems
from mfm_dist.errors import EXIT_DONE, EXIT_HUNG, EXIT_STOPPED, ConfigError, UserError
from mfm_dist.optim import build_optimizer
from mfm_dist.run.folder import RunFolder
from mfm_dist.run.signals import StopRequested
from mfm_dist.run.watchdog import Watchdog, to_stderr
from mfm_dist.shards.scene_shards import write_scenes
from mfm_dist.trainer import Trainer


def train(config: RunConfig, run: RunFolder, stop: StopRequested) -> int:
    """Build everything, resume if there is something to resume, train, say how it ended."""
    engine = start_engine(config)
    with engine.run_collectively(lambda: Lease.take(run.path) if engine.is_main else nullcontext()):
        engine.run_collectively(lambda: prepare_folders(config, run, engine.is_main))
        with closing(watch_over(engine, config, run)) as watchdog:
            return train_with(engine, config, run, stop, watchdog)


def train_with(engine: Engine, config: RunConfig, run: RunFolder, stop: StopRequested, watchdog: Watchdog) -> int:
    """The same, once the processes know of one another and the run folder is theirs."""
    module = build_train_module(config)
    readers = engine.run_collectively(lambda: open_readers(config, module.method.supervised_on))

    data_fingerprints = {**readers.fingerprints, **module.fingerprints()}
    say = print if engine.is_main else lambda _: None
    # Rank 0 looks for all: reading everything once is enough, and no rank starts from another step.
    found = engine.run_collectively(
        lambda: find_resumable(run.checkpoints, say, watchdog.moving) if engine.is_main else None
    )
    checkpoint = engine.gather_objects(found)[0]
    progress = Progress()
    if checkpoint is not None:
        progress = checkpoint.progress
        say(f"resuming {checkpoint.path}")
        for line in changed_keys(checkpoint.config, config):
            say(f"  changed since: {line}")
        if problems := resume_problems(checkpoint, config, data_fingerprints):
            raise ConfigError(problems)
    engine.prepare(module, build_optimizer(module, config.optim))
    if checkpoint is not None:
        load_state(checkpoint, module, engine, watchdog.moving)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    world = {"gpus": gpus, "world_size": engine.world_size, "device": str(engine.device)}
    engine.run_collectively(lambda: run.begin(config, world, progress.step))

    trackers = engine.run_collectively(lambda: Trackers(config, enabled=engine.is_main, step=progress.step))
    with closing(trackers):
        stop.training_begins()
        trainer = Trainer(
            config=config,
            engine=engine,
            module=module,
            readers=readers,
            data_fingerprints=data_fingerprints,
            run=run,
            trackers=trackers,
            progress=progress,
            asked_to_stop=lambda: stop.name,
            watchdog=watchdog,
        )
        try:
            finished = trainer.fit()
        except UserError as error:
            error.step = trainer.progress.step
            raise
    code, reason = (EXIT_DONE, "done") if finished else (EXIT_STOPPED, f"stopped by {trainer.stopped_by}")
    if finished and trainer.scores is not None:
        result = {"run": str(run.path), "step": trainer.progress.step, "miou": round(trainer.scores.miou, 4)}
        say("RESULT " + json.dumps(result))
    else:
        say(f"{reason}; the same command goes on from step {trainer.progress.step}")
    run.outcome(code, reason, trainer.progress.step)
    engine.close()
    return code


def watch_over(engine: Engine, config: RunConfig, run: RunFolder) -> Watchdog:
    """This rank's watchdog. Collective."""
    return Watchdog(
        run.path,
        rank=engine.rank,
        world_size=engine.world_size,
        seconds=config.watchdog.seconds,
        start=engine.gather_objects(str(time.time_ns()))[0],
        on_hang=lambda reason, step: tell_hang(run, reason, step),
    )


def tell_hang(run: RunFolder, reason: str, step: int) -> None:
    """Say who hung, wherever a person or a script will look; called on one rank, which need not be rank 0."""
    to_stderr(f"{reason}; the same command goes on from the last checkpoint")
    run = RunFolder(run.path, writes=True)
    run.outcome(EXIT_HUNG, reason, step)
    run.event("hang", step=step, reason=reason)


def prepare_folders(config: RunConfig, run: RunFolder, is_main: bool) -> None:
    """Make the run folder and, where asked for, the scenes; rank 0 does it for all."""
    run.create()
    if config.data.render_scenes and is_main:
        scenes = config.scenes
        write_scenes(
            config.data.root, train=scenes.train, val=scenes.val, size=scenes.size, seed=scenes.seed, report=print
        )


def check(config: RunConfig) -> None:
    """What can be found wrong without training: configuration, trackers, networks, shards."""
    if problems := tracker_problems(config):
        raise ConfigError(problems)
    module = build_train_module(config)
    if not config.data.render_scenes:
        open_readers(config, module.method.supervised_on)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    student = sum(p.numel() for p in module.student.parameters())
    print(f"ok: {config.method.name}{' + MFM' if config.mfm.enabled else ''}, {student / 1e6:.2f} M parameters in the")
    print(f"    segmentor, {(trainable - student) / 1e6:.2f} M in the Rebuilder; run.folder={config.run.folder}")
