"""A run in which nothing moves any more ends, says which rank it waited for, and can be started again.

One rank that stops (a dead GPU, a mount that hangs, a stopped process) leaves all others waiting inside an exchange,
for ever or until a library aborts them without a name. Here a thread of every rank compares notes through files of
the run folder, which works across machines when the network between the ranks does not:

    heartbeats/rank_XXXXX.json   where a rank was when it last moved; the file's time says when
    heartbeats/end_START.txt     the exit code that one rank asks of all others, who may wait for it in an exchange
    hang/rank_XXXXX.txt          one line of JSON and the stacks of all its threads, for every hang of the run
    hang/rank_XXXXX.exchanges.json   the last exchanges with other ranks, begun and ended, as torch recorded them
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

from torch.profiler import record_function

from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import EXIT_HUNG, CorruptFileError
from mfm_dist.run.folder import RunFolder, write_outcome
from mfm_dist.storage import read_text, read_whole

Phase = Literal["start", "loop", "compile", "data", "agreement", "micro-batch", "update", "log", "save", "evaluation"]
"""What a rank is about. ``loop``: between two of the others; ``micro-batch``: forward, backward; ``compile``: the first
of these, if it compiles the networks; ``agreement``: it reads what all ranks said in a step, and what became of it."""
SLOW: frozenset[Phase] = frozenset({"start", "compile", "save"})
"""Phases with a single step that may take long and cannot say that it moves: a large file read or written."""
SLOW_FACTOR = 6
"""Their time limit is this many times that of the others."""
LONGEST_WAIT = 2 * SLOW_FACTOR
"""Time limits that an exchange may wait: a library's own end, which names nobody, must not come first."""
TICKS = 20
"""Looks within the time limit; also how exact that is."""
NAMED = 8
"""Ranks that a message names at most."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where a rank is."""

    start: str
    """Names the start of the run that all ranks belong to; files of earlier starts do not count."""
    rank: int
    entered: int
    """Phases entered so far. All ranks enter the same ones, so the smallest count is the furthest behind."""
    phase: Phase
    step: int
    host: str
    process: int

    def place(self) -> str:
        """Name the phase and the step, e.g. 'data' of step 12."""
        return f"'{self.phase}' of step {self.step}"


class Watchdog:
    """Ends this process when neither it nor any other rank moved for ``seconds``; 0 turns it off."""

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        world_size: int,
        seconds: float,
        start: str,
        on_hang: Callable[[str, int], object],
        exchanges: Callable[[], bytes] = bytes,
    ) -> None:
        """
        Args:
            run: the run folder, which all ranks share.
            seconds: of silence that mean a hang; ``SLOW_FACTOR`` times as many in a ``SLOW`` phase.
            start: the same on all ranks and another at every start.
            on_hang: told who is behind, and in which step; on one rank only.
            exchanges: gives this rank's last exchanges as JSON text, empty where there are none.
        """
        self.rank = rank
        self.world_size = world_size
        self.seconds = seconds
        self._heartbeats = run / "heartbeats"
        self._reports = run / "hang"
        self._end_of_all = self._heartbeats / f"end_{start}.txt"
        self._start = start
        self._on_hang = on_hang
        self._exchanges = exchanges
        self._entered = 0
        self._moves = 0
        self._place: tuple[Phase, int] = ("start", 0)
        self.before_leaving: Callable[[], object] = lambda: None
        """What to do before this process ends because another rank asks for it."""
        self._ended = threading.Event()
        self._tick = seconds / TICKS
        self._grace = min(max(2.0, 2 * self._tick), 60.0)
        """Seconds for the other ranks to notice too, and for their files to be seen on other machines."""
        if seconds > 0:
            self._heartbeats.mkdir(parents=True, exist_ok=True)
            self._write_heartbeat()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    @contextmanager
    def phase(self, name: Phase, step: int) -> Iterator[None]:
        """Say what this rank is about inside the block, then that it is back in what encloses it.

        Costs nothing, waits for nothing. It stands in the trace of a profiler, too.

        Args:
            step: global batches consumed so far.
        """
        enclosing, self._place = self._place, (name, step)
        self._entered += 1
        self.keep_alive()
        with record_function(name):
            yield
        self._place = enclosing
        self.keep_alive()

    def keep_alive(self) -> None:
        """Say that this rank moves, in the phase it is in."""
        self._moves += 1

    def close(self) -> None:
        """Stop watching: the run has ended."""
        self._ended.set()

    def end_all(self, code: int) -> bool:
        """Have every rank end with ``code``, as soon as it looks; tell whether nobody else has said so before."""
        with suppress(OSError):  # what cannot be written down, the others find out by the watchdog's time limit
            self._heartbeats.mkdir(parents=True, exist_ok=True)
            try:
                self._end_of_all.touch(exist_ok=False)
            except FileExistsError:
                return False
            self._end_of_all.write_text(f"{code}\n", encoding="utf-8")
        return True

    def told_to_end(self) -> int | None:
        """Return the exit code that another rank asks of all, if one does."""
        try:
            return int(read_text(self._end_of_all))
        except (OSError, CorruptFileError, ValueError):  # there is none, or it is about to be written
            return None

    def report(self) -> Report:
        """Say where this rank is."""
        phase, step = self._place
        return Report(
            start=self._start,
            rank=self.rank,
            entered=self._entered,
            phase=phase,
            step=step,
            host=socket.gethostname(),
            process=os.getpid(),
        )

    def _watch(self) -> None:
        seen, idle, before = 0, 0.0, time.monotonic()
        while not self._ended.wait(self._tick):
            now = time.monotonic()
            idle += min(now - before, 2 * self._tick)  # a job that was suspended as a whole did not hang meanwhile
            before = now
            if (code := self.told_to_end()) is not None:
                self._leave(code)
            if self._moves != seen:
                seen, idle = self._moves, 0.0
                self._write_heartbeat()
            else:
                limit = self.seconds * (SLOW_FACTOR if self._place[0] in SLOW else 1)
                if idle >= limit and self._others_idle() >= limit - self._tick:
                    self._end()

    def _leave(self, code: int) -> NoReturn:
        """End this process, which may wait in an exchange for a rank that is gone."""
        last_resort = threading.Timer(SLOW_FACTOR * self.seconds, os._exit, [code])
        last_resort.daemon = True
        last_resort.start()
        self.before_leaving()
        os._exit(code)

    def _write_heartbeat(self) -> None:
        with suppress(OSError):  # a full disk is told by whoever needs it
            text = json.dumps(asdict(self.report()))
            (self._heartbeats / _file(self.rank, "json")).write_text(text, encoding="utf-8")

    def _others_idle(self) -> float:
        """Measure the seconds since another rank moved, by the clock of the file system: machines may differ."""
        clock = self._heartbeats / _file(self.rank, "now")
        moved = [0.0]
        try:
            clock.touch()
            now = clock.stat().st_mtime
        except OSError:  # then the others cannot say that they move either
            return math.inf
        for rank in set(range(self.world_size)) - {self.rank}:
            with suppress(OSError):  # a rank that never wrote one does not move
                moved.append((self._heartbeats / _file(rank, "json")).stat().st_mtime)
        return now - max(moved)

    def _end(self) -> None:
        """Write this rank's report, wait for those of the others; the first that wrote one speaks for all."""
        last_resort = threading.Timer(4 * self._grace, os._exit, [EXIT_HUNG])  # the disk may be what hangs
        last_resort.daemon = True
        last_resort.start()
        with suppress(OSError):
            self._write_report()
        reports = self._wait(lambda found: len(found) == self.world_size)
        verdict = self._reports / f"verdict_{self._start}.txt"
        if self.rank == min(reports, default=self.rank):
            reports.setdefault(self.rank, self.report())
            reason = name_the_hang(reports, self._last_seen(), self.world_size)
            with suppress(OSError):
                told = (
                    f"{reason}. Nothing moved for {self.seconds:g} s or more; stacks of all threads, and the last "
                    f"exchanges between ranks: {self._reports}"
                )
                self._on_hang(told, min(report.step for report in reports.values()))
            with suppress(OSError):
                verdict.write_text(reason + "\n", encoding="utf-8")
        else:  # the launcher ends everything as soon as one rank has ended
            self._wait(lambda _: verdict.exists())
        os._exit(EXIT_HUNG)

    def _write_report(self) -> None:
        self._reports.mkdir(parents=True, exist_ok=True)
        with (self._reports / _file(self.rank, "txt")).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self.report())) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        # Last, for it asks what may hang itself, the GPU.
        with suppress(Exception):
            if exchanges := self._exchanges():
                (self._reports / _file(self.rank, "exchanges.json")).write_bytes(exchanges)

    def _wait(self, enough: Callable[[Mapping[int, Report]], bool]) -> dict[int, Report]:
        """Wait for the ranks' reports until after the grace or as soon as they are ``enough``."""
        deadline = time.monotonic() + self._grace
        while True:
            found = read_reports(self._reports, "txt", self._start, self.world_size)
            if enough(found) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _last_seen(self) -> dict[int, Report]:
        return read_reports(self._heartbeats, "json", self._start, self.world_size)


def watch_run(run: RunFolder, engine: Engine, seconds: float) -> Watchdog:
    """Start this rank's watchdog. Collective."""

    def tell_hang(reason: str, step: int) -> None:
        """Say who hung where a person or a script will look; called on one rank, which need not be rank 0."""
        text = f"{reason}; the same command goes on from the last checkpoint\n"
        os.write(sys.stderr.fileno(), text.encode())  # past Python's own buffers, which a thread that hangs may hold
        write_outcome(run.path, code=EXIT_HUNG, reason=reason, step=step, owned=True)
        RunFolder(run.path, writes=True).event("hang", step=step, reason=reason)

    start = engine.from_main(lambda: str(time.time_ns()))
    return Watchdog(
        run.path,
        rank=engine.rank,
        world_size=engine.world_size,
        seconds=seconds,
        start=start,
        on_hang=tell_hang,
        exchanges=engine.exchanges,
    )


def read_reports(folder: Path, suffix: str, start: str, world_size: int) -> dict[int, Report]:
    """Read the newest report of each rank that wrote one since ``start``."""
    found: dict[int, Report] = {}
    for rank in range(world_size):
        with suppress(OSError, CorruptFileError):
            for line in read_whole(folder / _file(rank, suffix)).decode(errors="replace").splitlines():
                with suppress(ValueError, TypeError):
                    report = Report(**json.loads(line)) if line.startswith("{") else None
                    if report is not None and report.start == start:
                        found[rank] = report
    return found


def name_the_hang(reports: Mapping[int, Report], last_seen: Mapping[int, Report], world_size: int) -> str:
    """Say who keeps the others waiting, in one sentence.

    Args:
        reports: of the ranks whose watchdog noticed the hang, at least one.
        last_seen: the heartbeats, also of ranks that cannot report any more.
    """
    front = max(reports.values(), key=lambda report: report.entered)
    silent = [rank for rank in range(world_size) if rank not in reports]
    behind = [report for report in reports.values() if report.entered < front.entered]
    if silent:
        named = [_name(rank, last_seen.get(rank), "last seen in") for rank in silent]
        return (
            f"hung: {_listed(named)} gave no sign of life (stopped, dead or cut off) while the others wait "
            f"in {front.place()}"
        )
    if behind:
        least = min(report.entered for report in behind)
        named = [_name(report.rank, report) for report in behind if report.entered == least]
        return f"hung: {_listed(named)} kept the others waiting, who are in {front.place()}"
    if world_size == 1:
        return f"hung: {_name(front.rank, front)}"
    return f"hung: all {world_size} ranks are in {front.place()}, in an exchange that does not end"


def _name(rank: int, report: Report | None, where: str = "in") -> str:
    if report is None:
        return f"rank {rank} (never seen)"
    return f"rank {rank} ({report.host}, process {report.process}, {where} {report.place()})"


def _listed(named: list[str]) -> str:
    more = len(named) - NAMED
    return ", ".join(named[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _file(rank: int, suffix: str) -> str:
    return f"rank_{rank:05d}.{suffix}"
