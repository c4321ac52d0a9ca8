"""Runs of the lab: plans that ask for them, and the records of those that ended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from mfm_dist.config.loader import flatten, load_config, read_yaml, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import EXIT_DONE, EXIT_UNSTABLE, ConfigError
from mfm_dist.storage import JsonLines

BEDS = Path("configs/lab")
PLANS = BEDS / "plans"
SCORED_AT = (0.8, 0.9, 1.0)
"""Shares of the steps whose evaluations are averaged."""
OUTCOMES = (EXIT_DONE, EXIT_UNSTABLE)
"""Exit codes of a run that need no second try: it trained to its end, or training diverged."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """An arm on a bed, for one seed."""

    bed: str
    arm: str
    overrides: tuple[str, ...]
    seed: int

    @cached_property
    def config(self) -> RunConfig:
        return load_config(BEDS / f"{self.bed}.yaml", [*self.overrides, f"seed={self.seed}"])

    @property
    def scored_steps(self) -> list[int]:
        return [round(share * self.config.train.steps) for share in SCORED_AT]

    @cached_property
    def settings(self) -> str:
        """Return a digest of all settings that are not the defaults, but for seed and folder.

        It tells runs apart whose bed, or whose variant of the Rebuilder, has changed since under the same name.
        """
        here, default = (flatten(to_tree(config)) for config in (self.config, RunConfig()))
        changed = {key: value for key, value in here.items() if value != default.get(key)}
        said = {key: value for key, value in changed.items() if key not in ("seed", "run.folder")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, under: Path) -> Path:
        """Return where it is or will be; other settings under the same name have another folder."""
        return under / self.bed / f"{self.arm}_{self.settings[:8]}" / f"seed_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A question, and the runs that are to answer it."""

    path: Path
    question: str
    prediction: str
    decision: str
    confirmed: bool
    """Whether its contrasts are claims: Holm's correction is over all of them."""
    beds: list[str]
    seeds: list[int]
    arms: dict[str, list[str]]
    """Overrides by name, after those of ``common``."""
    contrasts: list[list[str]]
    """Pairs of arms, the first minus the second; of four arms (first - second) - (third - fourth)."""
    common: list[str] = field(default_factory=list)
    """Overrides of every arm."""
    margin: float | None = None
    """Where every contrast has to hold, not one of them: the lower bound of each has to lie above this."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def runs(self) -> list[Run]:
        """List the runs seed by seed, so that what an interruption leaves is paired."""
        every = product(self.seeds, self.beds, self.arms.items())
        return [Run(bed=bed, arm=arm, overrides=(*self.common, *said), seed=seed) for seed, bed, (arm, said) in every]


def read_plan(name: str) -> Plan:
    """Read and check a plan. Raises ConfigError, with everything that is wrong with it, or where it has ended.

    ``ended: COMMIT`` in a plan says that all of it is on record, and that settings it asks for are gone since then.
    """
    path = Path(name) if name.endswith(".yaml") else PLANS / f"{name}.yaml"
    tree = read_yaml(path)
    if ended := tree.get("ended"):
        raise ConfigError(f"{path} has ended, and some of its settings are gone: run or collect it from commit {ended}")
    kinds = {"question": str, "prediction": str, "decision": str, "confirmed": bool, "beds": list, "seeds": list}
    kinds |= {"arms": dict, "contrasts": list, "common": list, "margin": float}
    tree = {"common": [], "margin": None, **tree}
    problems = [f"unknown key {key!r}: allowed are {', '.join(kinds)}" for key in tree if key not in kinds]
    said = {key: kind for key, kind in kinds.items() if key != "margin" or tree["margin"] is not None}
    problems += [f"{key}: expected {kind.__name__}" for key, kind in said.items() if type(tree.get(key)) is not kind]
    if not problems:
        plan = Plan(path=path, **tree)
        problems = [*_contrast_problems(plan), *_run_problems(plan)]
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return plan


def _contrast_problems(plan: Plan) -> list[str]:
    wrong = [one for one in plan.contrasts if not (isinstance(one, list) and len(one) in (2, 4))]
    unknown = {str(arm) for one in plan.contrasts if one not in wrong for arm in one if arm not in plan.arms}
    return [f"contrasts: {one!r} is no pair of arms, nor two of them" for one in wrong] + [
        f"contrasts: there is no arm {arm}; there are {', '.join(plan.arms)}" for arm in sorted(unknown)
    ]


def _run_problems(plan: Plan) -> list[str]:
    """Find what is wrong with the runs of the first seed; the others differ in nothing else."""
    problems = [f"seeds: {seed!r} is no whole number from 0 on" for seed in plan.seeds if type(seed) is not int]
    problems += [
        f"{name}: expected a list of section.key=value"
        for name, said in [("common", plan.common), *((f"arms.{arm}", said) for arm, said in plan.arms.items())]
        if not (isinstance(said, list) and all(isinstance(one, str) for one in said))
    ]
    if problems:
        return problems
    for run in plan.runs[: len(plan.beds) * len(plan.arms)]:
        try:
            off = [step for step in run.scored_steps if step % run.config.eval.every]
        except ConfigError as error:
            problems += [f"{run.arm} on {run.bed}: {problem}" for problem in error.problems]
            continue
        if off:
            problems.append(f"{run.arm} on {run.bed}: steps {off} are not evaluated: set eval.every to a tenth of all")
    return problems


class Records:
    """What is known of runs on a GPU, or of those on a CPU: one line of JSON for each that ended, by bed."""

    def __init__(self, folder: Path, *, gpu: bool) -> None:
        self.folder, self.gpu = folder, gpu

    def append(self, record: dict[str, Any]) -> None:
        """Add a line in a single write, so that several processes can do it at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with open(self.folder / f"lab_{record['bed']}.jsonl", "ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # for network file systems, which do not append in one piece
            file.write(line)
            os.fsync(file.fileno())

    def of(self, runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
        """Find for each of these runs its last record that needs no second try."""
        known = {(line["bed"], line["settings"], line["seed"]): line for line in self.lines(runs)}
        found = {run: known.get((run.bed, run.settings, run.seed)) for run in runs}
        return {run: line for run, line in found.items() if line is not None}

    def lines(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Return all records of the beds of these runs that need no second try, the oldest first."""
        files = [JsonLines(self.folder / f"lab_{bed}.jsonl") for bed in sorted({run.bed for run in runs})]
        ended = [line for file in files for line in file if line["code"] in OUTCOMES]
        return [line for line in ended if str(line["device"]).startswith("cuda") == self.gpu]
