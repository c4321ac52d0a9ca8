"""The loop: step, log, evaluate, save, stop on a signal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from mfm_dist.batch import UDABatch
from mfm_dist.build import Readers, train_pipeline
from mfm_dist.checkpoint.contents import load_state
from mfm_dist.checkpoint.files import Checkpoint, sound_first
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.resume import load_newest
from mfm_dist.checkpoint.writer import PATIENCE, CheckpointWriter, Saved
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.distributed.audit import audit
from mfm_dist.distributed.clipping import Ceilings
from mfm_dist.distributed.engine import Engine, StepResult
from mfm_dist.distributed.trackers import Trackers
from mfm_dist.errors import EXIT_DONE, EXIT_STOPPED, BadSample, DataError, RankMismatchError, UnstableError
from mfm_dist.inference.evaluation import Scores, evaluate
from mfm_dist.inference.unlabelled import look_at_unlabelled
from mfm_dist.run.bad_samples import BadSamples
from mfm_dist.run.folder import RunFolder
from mfm_dist.run.logging import Console, StepLog
from mfm_dist.run.recovery import SkippedSteps, ceilings, diagnosis, gone_back, must_roll_back, record_applied
from mfm_dist.run.signals import Stopped
from mfm_dist.run.trace import StepTrace
from mfm_dist.run.watchdog import SLOW_FACTOR, Phase, Watchdog
from mfm_dist.schedules import (
    averaged_norms,
    ema_decay_at,
    learning_rate_factor,
    mfm_weight,
    within_budget,
)
from mfm_dist.train_module import TrainModule

TURNS_BETWEEN_LOOKS = 4
"""Images of a rank in an evaluation between two looks at whether any rank was asked to stop; each is an exchange."""


class Flag(IntEnum):
    """What a rank tells all others in the exchange that every step makes, so that all take the same turn."""

    NO_DATA = 0
    """It has no data for this step, which therefore is not applied anywhere."""
    STOPPING = 1
    """It was asked to stop."""
    BAD_SAMPLE = 2
    """It met a bad sample that is not known yet."""
    NOT_SAVED = 3
    """The last checkpoint could not be written."""


@dataclass(frozen=True, kw_only=True)
class LaunchedStep:
    """A step whose outcome was not read yet."""

    step: int
    """The one that ends with it."""
    result: StepResult
    limits: Ceilings
    """What it was held to."""
    losses: Sequence[Tensor]
    """Of this rank's micro-batches."""
    bad_samples: Sequence[BadSample]
    """Among them."""
    mfm_weight: float


class Trainer:
    """Trains from ``progress`` to the last step. ``fit`` is the loop, ``train_step`` the step."""

    trackers: Trackers

    def __init__(
        self,
        engine: Engine,
        module: TrainModule,
        readers: Readers,
        run: RunFolder,
        data_fingerprints: Mapping[str, str],
        watchdog: Watchdog,
        asked_to_stop: Callable[[], str | None],
        count_flop: Callable[[], int] | None = None,
    ) -> None:
        """
        Args:
            engine: with the module prepared.
            data_fingerprints: of what the run has to find again when it goes on.
            asked_to_stop: gives the signal that asked for it, if one did.
            count_flop: counts the floating-point operations of a global batch.
        """
        self.config = config = engine.config
        self.engine = engine
        self.module = module
        self.readers = readers
        self.run = run
        self.watchdog = watchdog
        self.asked_to_stop = asked_to_stop
        self.progress = Progress()
        self.console = Console(enabled=engine.is_main, steps=config.train.steps)
        self.step_log = StepLog(engine, images_per_step=config.images_per_step, count_flop=count_flop)
        self.trace = StepTrace(config.log.profile, run.path, enabled=engine.is_main, say=self.console.line)
        self.skipped = SkippedSteps(engine, run)
        self.bad_samples = BadSamples(
            total=readers.samples,
            limit=config.data.bad_sample_limit,
            engine=engine,
            run=run,
            say=self.console.line,
        )
        self.writer = CheckpointWriter(
            run.checkpoints,
            engine,
            config,
            data_fingerprints=data_fingerprints,
            written=self._note_saved,
            # Less than a save may take: what is told is the rank that has not written, and not a hang.
            patience=(SLOW_FACTOR - 1) * config.watchdog.seconds or PATIENCE,
        )
        watchdog.before_leaving = self.writer.close
        self.launched: deque[LaunchedStep] = deque()
        """Steps whose outcome was not read yet: at most the last one, but for a moment."""
        self.nothing_said = torch.zeros(len(Flag), device=engine.device)
        """Flags of a batch that has none."""
        self.batches: list[UDABatch] = []
        """Of the last step."""
        self.no_data: DataError | None = None
        """Why this rank has no more data."""
        self.stopping = False
        """Whether any rank was asked to stop."""
        self.scores: Scores | None = None
        self.saved_step = self.audited_step = 0
        """Up to here nothing is new: a checkpoint was loaded, or these are the initial weights."""
        self.compiled = not config.train.compile
        """torch.compile works in the first step."""

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Collective."""
        read = self.engine.gather_objects(self._load(checkpoint))
        self.run.event("resume", step=checkpoint.progress.step, path=checkpoint.path.name, read_bytes=read)
        if checkpoint.world_size != self.engine.world_size:
            self.console.line(
                f"  written by {checkpoint.world_size} processes, read by {self.engine.world_size}: all go on from the "
                "mean of their BatchNorm statistics, which is what evaluation scores"
            )
        self.progress = checkpoint.progress
        self.saved_step = self.audited_step = self.progress.step

    def fit(self) -> int:
        """Train to the last step or to a stop signal; both end with a checkpoint. Return the exit code."""
        rank, world_size = self.engine.rank, self.engine.world_size
        stopped_by = None
        with self._running():
            blocks = iter(train_pipeline(self.config, self.readers, rank, world_size, first_block=self.progress.block))
            try:
                if self._evaluation_is_missing():
                    self.evaluate()
                while self.progress.step < self.config.train.steps:
                    self.trace.before_step(self.progress.step)
                    self.train_step(self.next_batches(blocks))
                    self._after_step()
                    if self.stopping and self.progress.step < self.config.train.steps:
                        self.settle()
                        raise Stopped
            except Stopped:
                stopped_by = next(name for name in self.engine.gather_objects(self.asked_to_stop()) if name)
                self.run.event("signal", step=self.progress.step, signal=stopped_by)
                self.save()
            with self.phase("save"):
                self.writer.wait()
        if stopped_by is not None:
            self.run.end(EXIT_STOPPED, f"stopped by {stopped_by}", self.progress.step)
            return EXIT_STOPPED
        assert self.scores is not None, "the last step is always scored"
        self.run.end(EXIT_DONE, "done", self.progress.step, miou=self.scores.miou)
        return EXIT_DONE

    def train_step(self, batches: list[UDABatch]) -> None:
        """Train on one global batch: this rank's micro-batches, the update, the teacher.

        Nothing here waits for the device: whether the step was applied is read by ``settle``.
        """
        config, progress, module = self.config, self.progress, self.module
        factor = learning_rate_factor(
            progress.step,
            steps=config.train.steps,
            warmup_steps=config.optim.warmup_steps,
            warmup_ratio=config.optim.warmup_ratio,
        )
        self.engine.set_learning_rates(factor)
        weight = mfm_weight(progress.step, config.mfm)
        weight = within_budget(weight, progress.map_norms, config.mfm.gradient_budget)
        measure = config.mfm.enabled and self._logs_at(progress.step + 1)
        own_losses = []
        for batch in batches:
            with self.phase("micro-batch" if self.compiled else "compile"):
                batch = batch.to(self.engine.device)
                losses = self.engine.forward_backward(batch, weight, measure)
            self.step_log.add(losses)
            own_losses.append(losses["total"])
        limits = ceilings(progress, config.recovery)
        with self.phase("update"):
            result = self.engine.step(limits, self.nothing_said if batch.flags is None else batch.flags)
            if module.teacher is not None:
                self.engine.update_teacher(ema_decay_at(self.engine.applied, config.self_training.ema_decay))
        self.compiled = True
        progress.step += 1
        progress.block += config.blocks_per_step
        self.launched.append(
            LaunchedStep(
                step=progress.step,
                result=result,
                limits=limits,
                losses=own_losses,
                bad_samples=[sample for batch in batches for sample in batch.bad_samples],
                mfm_weight=weight,
            )
        )
        self.step_log.grad_norms = result.grad_norms
        if measure:
            self.step_log.measured_step(weight, result.map_norms)
        self.console.advance()

    def settle(self, *, leave: int = 0) -> None:
        """Read what became of the steps launched so far, all but the last ``leave`` of them, and draw the consequences.

        While steps are not applied none is left, so that a run goes back in time.

        Raises:
            DataError: on every rank, when samples are bad beyond the limit or a block cannot be filled.
            StorageError: on every rank, when the last checkpoint could not be written.
        """
        while len(self.launched) > leave or (self.launched and self.progress.skipped):
            with self.phase("agreement"):
                applied, *flags = self.launched[0].result.verdict.read()
            self._settle(self.launched.popleft(), bool(applied), [bool(flag) for flag in flags])

    def _settle(self, launched: LaunchedStep, applied: bool, flags: Sequence[bool]) -> None:
        """Draw the consequences of one step; the same on all ranks."""
        config, progress, result = self.config, self.progress, launched.result
        if flags[Flag.NO_DATA]:
            steps = progress.step - launched.step + 1  # with those launched since, none of them applied
            progress.step -= steps
            progress.block -= steps * config.blocks_per_step
            reasons = self.engine.gather_objects(self.no_data and str(self.no_data))
            raise DataError(next(reason for reason in reasons if reason))
        if applied:
            record_applied(progress, config.recovery, result, launched.step)
            if config.mfm.gradient_budget:
                progress.map_norms = averaged_norms(progress.map_norms, result.map_norms.tolist(), launched.mfm_weight)
        else:
            progress.skipped += 1
            self.skipped.record(result, launched.limits, launched.losses, launched.step)
        if flags[Flag.NOT_SAVED]:
            self.writer.wait()  # raises, everywhere: steps that cannot be saved are not worth their time
        if flags[Flag.BAD_SAMPLE]:
            self.bad_samples.record(launched.bad_samples, launched.step - 1)
        self.stopping = self.stopping or flags[Flag.STOPPING]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Open what is written to while training, and close it whatever becomes of the run."""
        config, step = self.config, self.progress.step
        trackers = self.engine.run_collectively(lambda: Trackers(config, enabled=self.engine.is_main, step=step))
        self.console.begin(step)
        self.step_log.begin(step)
        with (
            closing(trackers) as self.trackers, closing(self.console), closing(self.writer), closing(self.trace),
            self.phase("loop"),
        ):  # fmt: skip
            yield

    def _after_step(self) -> None:
        """Do what is due after a step: go back, log, compare, save, score."""
        config, step = self.config, self.progress.step
        last = step == config.train.steps
        every = (config.log.every, config.checkpoint.every, config.eval.every, config.debug.audit_every)
        due = last or any(each and step % each == 0 for each in every)
        self.settle(leave=0 if due or self._needs_each_outcome else 1)
        if must_roll_back(self.progress, config.recovery):
            self.roll_back()
            return
        if self._logs_at(step):
            self.log()
        if config.debug.audit_every and step % config.debug.audit_every == 0:
            self.audit()
        # Saved first: a kill during a long evaluation then loses nothing. Not amid steps that are not applied: a
        # checkpoint that they begin with is no place to go back to.
        if (step % config.checkpoint.every == 0 and not self.progress.skipped) or last:
            self.save()
        if step % config.eval.every == 0 or last:
            self.evaluate()

    @property
    def _needs_each_outcome(self) -> bool:
        """Whether a step can only be launched when the outcome of the one before is known."""
        recovery = self.config.recovery
        return bool(recovery.spike_factor or self.config.mfm.gradient_budget) or recovery.rollback_after == 1

    def _logs_at(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == self.config.train.steps

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Tell the watchdog what this rank is about."""
        return self.watchdog.phase(name, self.progress.step)

    def roll_back(self) -> None:
        """Go back to the last sound checkpoint, and on from there with the data that comes next. Collective.

        If that did not help, to an earlier one: what went wrong may have been saved before it showed.

        Raises:
            UnstableError: on every rank, after ``recovery.rollbacks`` times in vain.
        """
        progress, run = self.progress, self.run
        if progress.rollbacks >= self.config.recovery.rollbacks:
            raise UnstableError(diagnosis(progress, self.skipped.reason))
        before = progress.rollback_step if progress.rollbacks else None
        with self.phase("save"):
            self.writer.wait()
            checkpoint = load_newest(
                run.checkpoints,
                self.engine,
                self._load,
                self.console.line,
                order=lambda folder, report: sound_first(folder, before, report),
            )
            # Before the first checkpoint the weights are all there is; no skipped step has touched them.
            back = gone_back(progress, checkpoint.progress if checkpoint else progress)
        run.event("rollback", step=progress.step, to_step=back.step, reason=self.skipped.reason)
        self.console.line(f"step {progress.step}: back to step {back.step}, passing over data ({self.skipped.reason})")
        run.forget_after(back.step)
        self.progress = back
        self.console.begin(back.step)
        self.step_log.begin(back.step)
        # Written over the one it came from: a run that is killed now must not meet the same data again.
        self.saved_step = self.audited_step = -1
        self.save()

    def _load(self, checkpoint: Checkpoint) -> int:
        """Put back what a checkpoint holds, and return the bytes that this rank read. Collective."""
        read = load_state(checkpoint, self.module, self.engine)
        self.engine.applied.fill_(checkpoint.progress.applied)
        return read

    def log(self) -> None:
        """Log the steps since the last line."""
        with self.phase("log"):
            record = self.step_log.record(self.progress.step)
        if self.engine.is_main:
            self.run.metrics.append(record)
            self._track({name: value for name, value in record.items() if name != "step"})
        self.console.show(record)

    def evaluate(self) -> Scores:
        """Score the student, or look at target images where there are no labels; save the result and a few overlays."""
        step, readers = self.progress.step, self.readers
        path = self.run.evaluation(step)
        with self.phase("evaluation"), self.engine.inference_context(), self.step_log.no_training():
            overlays = path.with_suffix("")
            if readers.validation is not None:
                scores, bad = self._scored(readers.validation, overlays)
            else:
                scores, bad = self._looked_at_target(overlays)
            if readers.source_validation is not None:
                of_source, more = self._scored(readers.source_validation)
                scores, bad = replace(scores, source_miou=of_source.miou), [*bad, *more]
        if self.engine.is_main:
            self._track(scores.numbers())
            self._report(self.trackers.show(overlays, step))
            scores.save(path)
        self.bad_samples.record(bad, step)
        self.console.line(f"step {step}: {scores.sentence()}")
        self.scores = scores
        return scores

    def _scored(self, reader: ShardReader, overlay_folder: Path | None = None) -> tuple[Scores, list[BadSample]]:
        """Score the student on a labelled data set."""
        config = self.config
        return evaluate(
            self.module.student,
            EvaluationSet(
                reader, rank=self.engine.rank, world_size=self.engine.world_size, workers=config.data.workers
            ),
            self.engine,
            step=self.progress.step,
            precision=self._precision,
            classes=self.readers.classes,
            class_sets=config.eval.class_sets,
            fit_into=config.eval.resize,
            overlays=config.eval.overlays,
            overlay_folder=overlay_folder,
            before_turn=self._before_turn,
        )

    def _looked_at_target(self, overlay_folder: Path) -> tuple[Scores, list[BadSample]]:
        """Look at the first target images, and what student and teacher make of them."""
        config, teacher = self.config, self.module.teacher
        return look_at_unlabelled(
            self.module.student,
            None if teacher is None else teacher.segmentor,
            EvaluationSet(
                self.readers.first_target,
                rank=self.engine.rank,
                world_size=self.engine.world_size,
                most=config.eval.unlabelled_images,
                workers=config.data.workers,
                with_label=False,
            ),
            self.engine,
            step=self.progress.step,
            precision=self._precision,
            classes=self.readers.classes,
            threshold=config.self_training.pseudo_threshold,
            fit_into=config.eval.resize,
            overlays=config.eval.overlays,
            overlay_folder=overlay_folder,
            before_turn=self._before_turn,
        )

    @property
    def _precision(self) -> str:
        """What the forwards of an evaluation run in."""
        return "bf16" if self.config.train.precision == "bf16_weights" else "fp32"

    def _before_turn(self, turn: int) -> None:
        """Keep all ranks in step, and end the evaluation in the same turn when any was asked to stop."""
        self.watchdog.keep_alive()
        if turn % TURNS_BETWEEN_LOOKS == 0:
            asked = torch.tensor([self.asked_to_stop() is not None], dtype=torch.int32, device=self.engine.device)
            if self.engine.maximum(asked).item():
                raise Stopped

    def _evaluation_is_missing(self) -> bool:
        """Tell whether the step to start from is one to score and was not: at the first start, or after a stop."""
        step, config = self.progress.step, self.config
        if step == config.train.steps:  # a start whose last score is whole has ended by now (train.report_finished)
            return True
        return step % config.eval.every == 0 and not self.engine.from_main(self.run.evaluation(step).exists)

    def save(self) -> None:
        """Begin to write a checkpoint of the current step, unless there is one."""
        if self.saved_step == self.progress.step:
            return
        if self.config.debug.audit_every and self.audited_step != self.progress.step:
            self.audit()
        with self.phase("save"):
            self.writer.save(self.module, self.progress)
        self.saved_step = self.progress.step

    def audit(self) -> None:
        """Compare what several places hold of the weights, before they are trained on or saved. Collective.

        Raises:
            RankMismatchError: on every rank, if anything differs.
        """
        with self.phase("save"):
            findings = audit(self.module, self.engine)
        for finding in findings:
            self.run.event("audit", step=self.progress.step, reason=finding)
        if findings:
            raise RankMismatchError(
                f"step {self.progress.step}: weights that must be equal are not (faulty memory or network?): "
                f"{'; '.join(findings[:5])}. The same command goes on from the last checkpoint, which was compared "
                "before it was written"
            )
        self.audited_step = self.progress.step

    def _note_saved(self, saved: Saved) -> None:
        self.run.event(
            "checkpoint",
            step=saved.step,
            checkpoint_stall_seconds=round(saved.stall_seconds, 4),
            checkpoint_write_seconds=round(saved.write_seconds, 4),
            gib=round(saved.gib, 4),
        )
        self.console.line(f"step {saved.step}: saved {saved.path}")

    def _track(self, values: dict[str, float]) -> None:
        """Hand numbers to the trackers."""
        self._report(self.trackers.log(values, self.progress.step))

    def _report(self, problems: Sequence[str]) -> None:
        """Note trackers that failed. They do not stop the run; a full disk does, in other places."""
        for problem in problems:
            self.run.event("tracker_failed", step=self.progress.step, reason=problem)
            self.console.line(problem)

    def next_batches(self, blocks: Iterator[UDABatch]) -> list[UDABatch]:
        """Take this rank's micro-batches of the next step, and what this rank has to tell the others in it.

        Where there are none, those of the last step stand in: the step is applied nowhere, and ``settle`` says why.

        Raises:
            DataError: on every rank, when there are none for the first step.
        """
        batches = self._fetch(blocks)
        if not self.batches:
            reasons = self.engine.gather_objects(self.no_data and str(self.no_data))
            if any(reasons):
                raise DataError(next(reason for reason in reasons if reason))
        flags = torch.zeros(len(Flag))
        flags[Flag.NO_DATA] = self.no_data is not None
        flags[Flag.STOPPING] = self.asked_to_stop() is not None
        flags[Flag.BAD_SAMPLE] = self.bad_samples.has_unseen(bad for batch in batches for bad in batch.bad_samples)
        flags[Flag.NOT_SAVED] = self.writer.failed()
        self.batches = [self.module.draw(batch) for batch in batches] or self.batches
        self.batches[-1] = replace(self.batches[-1], flags=flags)
        on_gpu = self.engine.device.type == "cuda"
        return [batch.pin_memory() for batch in self.batches] if on_gpu else self.batches

    def _fetch(self, blocks: Iterator[UDABatch]) -> list[UDABatch]:
        """Fetch this rank's micro-batches of the next step; none, and ``no_data``, if they cannot be had."""
        with self.phase("data"), self.step_log.waiting_for_data():
            try:
                if self.no_data is None:
                    return [next(blocks) for _ in range(self.engine.accumulation)]
            except DataError as error:
                self.no_data = error
        return []
