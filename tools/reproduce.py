#!/usr/bin/env python
"""The papers' tables: what was published, beside what was trained here.

  tools/reproduce.py                                    every row, with the figures of finished runs
  tools/reproduce.py gta2cs/daformer --seeds 3          train this row with and without MFM, then the same table
  tools/reproduce.py gta2cs/mic --sbatch --forms with   submit a job array a row and form instead, one task a seed
  tools/reproduce.py --data scenes --seeds 5            the four methods on the embedded data
  tools/reproduce.py --data scenes --seeds 5 --all      those and the ablations of MFM in small, by the paper's names

A run is one form of a row (with MFM, without) and one seed, in FOLDER/ROW/FORM/seed_N. Finished runs are kept and not
trained again: the same command goes on after an interruption, more seeds or rows add to what there is. Gains are paired
by seed. Commands are meant for the repository's folder. Exit codes: 0 done, 1 runs failed, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from tools.paper_rows import FORMS, SCENES, SCENES_ABLATIONS, Row, paper_rows
from tools.seeds import MOST_SEEDS, all_scores, is_finished, mean_of, refuse_other_settings, save_record, shown, train

GPU = Path("configs/accelerate/gpu_single.yaml")
"""How the papers' rows were trained: on one GPU."""

MARK = "\\*"
"""Of a figure with a note below the table; escaped for Markdown."""


class Run(NamedTuple):
    """One training."""

    row: Row
    form: str
    seed: int

    def folder(self, under: Path) -> Path:
        """Where it is, or will be."""
        return under / self.row.name / self.form / f"seed_{self.seed}"

    def overrides(self, more: Iterable[str] = ()) -> list[str]:
        """Of the row's configuration."""
        return [*self.row.overrides, *FORMS[self.form], *more, f"seed={self.seed}"]


def runs_of(rows: Iterable[Row], forms: Iterable[str], seeds: int) -> list[Run]:
    """List runs seed by seed, so that what an interruption leaves is paired."""
    every = product(range(seeds), rows, forms)
    return [Run(row, form, seed) for seed, row, form in every if form in row.forms]


def submit(runs: Sequence[Run], under: Path, overrides: Sequence[str]) -> str:
    """Submit a job array that trains the unfinished seeds of one row and form; tell its number.

    Raises:
        RuntimeError: Slurm takes no job, or a folder holds a run with other settings.
    """
    for run in runs:
        refuse_other_settings([run.row.config], run.folder(under), run.overrides(overrides))
    row, form, _ = runs[0]
    folder = runs[0].folder(under).parent
    seeds = ",".join(str(run.seed) for run in runs if not finds(run, under))
    if not seeds:
        return f"{folder}: all finished"
    command = ["sbatch", "--parsable", f"--array={seeds}", f"--job-name={row.name}"]
    command += ["slurm/train_mfm.sh", str(row.config)]
    said = [f"run.folder={folder}", *row.overrides, *FORMS[form], *overrides]  # a task adds its seed to folder and run
    try:
        done = subprocess.run([*command, *said], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("there is no sbatch on this machine: leave --sbatch out to train here") from error
    if done.returncode != 0:
        raise RuntimeError(f"{folder}: sbatch ended with exit code {done.returncode}: {done.stderr.strip()}")
    return f"{folder}: job array {done.stdout.strip()}, seeds {seeds}"


def collect(rows: Iterable[Row], under: Path) -> list[dict[str, Any]]:
    """Collect for each row and class set the published figures, and those of all finished runs."""
    results = []
    for row in rows:
        finished = {
            form: {run.seed: run.folder(under) for run in runs_of([row], [form], MOST_SEEDS) if finds(run, under)}
            for form in row.forms
        }
        results += [
            {
                "row": row.name,
                "score": published.score,
                "published": {"without": published.without, "with": published.with_mfm},
                "note": published.note,
                **ours(of_runs(finished, published.score)),
                "best": {
                    form: mean_of(list(found.values()))
                    for form, found in of_runs(finished, published.score, best=True).items()
                },
                "cost": {form: cost(folders.values()) for form, folders in finished.items() if folders},
                "other_settings": [line for form in finished for line in other_settings(row, form, finished[form])],
            }
            for published in row.published
        ]
    return results


def ours(values: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Return means of what was trained here, by form and seed, and of the gain, paired by seed; None without a pair."""
    without, with_mfm = (values.get(form, {}) for form in FORMS)
    gains = [with_mfm[seed] - without[seed] for seed in sorted(without.keys() & with_mfm.keys())]
    return {
        "ours": {form: {"by_seed": by_seed, **mean_of(list(by_seed.values()))} for form, by_seed in values.items()},
        "gain": mean_of(gains) if gains else None,
    }


def finds(run: Run, under: Path) -> bool:
    """Tell whether this run is there and finished."""
    return is_finished(run.folder(under))


def of_runs(finished: dict[str, dict[int, Path]], score: str, *, best: bool = False) -> dict[str, dict[int, float]]:
    """Return ``scores`` by form, of those that have some."""
    return {form: found for form, folders in finished.items() if (found := scores(folders, score, best=best))}


def scores(folders: dict[int, Path], score: str, *, best: bool = False) -> dict[int, float]:
    """Return mIoU by seed, in percent, of the runs that were scored (not those with data.validation=null).

    Args:
        best: of all evaluations, and not of the last step's.
    """
    found = {}
    for seed, folder in folders.items():
        evaluations = all_scores(folder)
        if evaluations[-1]["miou"] is not None:
            scored = [one for one in evaluations if one["miou"] is not None]
            values = [one["miou"] if score == "miou" else one["means"][score] for one in scored]
            found[seed] = max(values) if best else values[-1]
    return found


def cost(folders: Iterable[Path]) -> dict[str, float]:
    """Return images a second (median of all lines) and memory (the most), as the runs logged them."""
    lines = [json.loads(text) for folder in folders for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        name: of([line[name] for line in lines if line.get(name) is not None])
        for name, of in (("images_per_second", statistics.median), ("memory_gib", max))
    }


def other_settings(row: Row, form: str, folders: dict[int, Path]) -> list[str]:
    """Return what finished runs were told beside the row's configuration."""
    lines = []
    for seed, folder in folders.items():
        shipped = load_config(row.config, Run(row, form, seed).overrides())
        changed = changed_keys(to_tree(shipped), load_config(folder / "config.yaml"))
        lines += [f"{row.name}, {form} MFM, seed {seed}: {line}" for line in changed]
    return lines


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return Markdown, one line a row and class set."""
    columns = ["row", "classes", "published", "with MFM", "ours, last step (mean ± 95 %)", "with MFM"]
    columns += ["best evaluation", "with MFM", "gain, paired", "seeds", "time a step", "memory"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        classes = "19" if result["score"] == "miou" else result["score"].removeprefix("miou_synthia")
        published = [("" if value is None else f"{value:.1f}") for value in result["published"].values()]
        published[-1] += MARK if result["note"] else ""
        ours = [shown(result["ours"][form], ".2f") if form in result["ours"] else "" for form in FORMS]
        ours += [format(result["best"][form]["mean"], ".2f") if form in result["best"] else "" for form in FORMS]
        gain = "" if result["gain"] is None else shown(result["gain"], "+.2f")
        seeds = ", ".join(str(len(result["ours"][form]["by_seed"])) for form in FORMS if form in result["ours"])
        cells = [result["row"], classes, *published, *ours, gain, seeds, *relative_cost(result["cost"])]
        lines.append(f"| {' | '.join(cells)} |")
    notes = dict.fromkeys(f"{MARK} {result['note']}" for result in results if result["note"])
    lines += ["", *notes] if notes else []
    other = dict.fromkeys(line for result in results for line in result["other_settings"])
    return "\n".join([*lines, *(["", "Trained with other settings than the row's:"] if other else []), *other])


def relative_cost(costs: dict[str, dict[str, float]]) -> list[str]:
    """Return step time and memory with MFM, as multiples of those without."""
    if len(costs) < len(FORMS):
        return ["", ""]
    without, with_mfm = (costs[form] for form in FORMS)
    time = without["images_per_second"] / with_mfm["images_per_second"]
    return [f"x {time:.2f}", f"x {with_mfm['memory_gib'] / without['memory_gib']:.2f}"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``rows`` become ``Row``s and ``overrides``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help="rows to train (paper: none; scenes: the four methods); section.key=value changes a setting",
    )
    parser.add_argument("--all", action="store_true", help="train all rows of the tables")
    parser.add_argument("--data", choices=("paper", "scenes"), default="paper", help="of which tables (paper)")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, MOST_SEEDS + 1), metavar="N", help="0 to N-1")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="with MFM, without (both)")
    parser.add_argument("--sbatch", action="store_true", help="submit to Slurm; options: SBATCH_ variables")
    parser.add_argument("--launch", type=Path, help=f"file of configs/accelerate (paper: {GPU}; scenes: one process)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on this machine (1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="where the runs are")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_intermixed_args(argv)
    names = [word for word in arguments.rows if "=" not in word]
    arguments.overrides = [word for word in arguments.rows if "=" in word]
    by_default, every = (SCENES, (*SCENES, *SCENES_ABLATIONS)) if arguments.data == "scenes" else ((), paper_rows())
    arguments.table = {row.name: row for row in every}
    if unknown := [name for name in names if name not in arguments.table]:
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(arguments.table)}")
    wanted = arguments.table if arguments.all else names or [row.name for row in by_default]
    arguments.rows = [] if arguments.collect else [arguments.table[name] for name in wanted]
    arguments.launch = arguments.launch or (GPU if arguments.data == "paper" else None)
    return arguments


def submit_all(arguments: argparse.Namespace) -> list[str]:
    """Submit what is not finished, an array a row and form; return what failed."""
    failed = []
    for row, form in product(arguments.rows, arguments.forms):
        if runs := runs_of([row], [form], arguments.seeds):
            try:
                print(submit(runs, arguments.folder, arguments.overrides), flush=True)
            except (RuntimeError, UserError) as error:
                print(error, file=sys.stderr, flush=True)
                failed.append(str(error))
    return failed


def run_all(arguments: argparse.Namespace) -> list[str]:
    """Train what is not finished; return what failed. The figures are written after each run."""

    def run_one(run: Run) -> str:
        folder = run.folder(arguments.folder)
        try:
            found = train([run.row.config], folder, run.overrides(arguments.overrides), launch=arguments.launch)
        except (RuntimeError, UserError) as error:
            print(error, file=sys.stderr, flush=True)
            return str(error)
        score = "no target labels" if found["miou"] is None else f"{found['miou']:.2f}"
        print(f"{folder}: {score}", flush=True)
        return ""

    failed = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for problem in pool.map(run_one, runs_of(arguments.rows, arguments.forms, arguments.seeds)):
            failed += [problem] if problem else []
            if arguments.json:
                save(arguments)
    return failed


def save(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the figures of all finished runs to the file that was asked for."""
    results = collect(arguments.table.values(), arguments.folder)
    if arguments.json:
        save_record(arguments.json, ["tools/reproduce.py", *arguments.said], results)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse(argv)
    arguments.said = sys.argv[1:] if argv is None else list(argv)
    failed = submit_all(arguments) if arguments.sbatch else run_all(arguments)
    print(table(save(arguments)))
    if failed:
        print(f"{len(failed)} runs failed, the others stand above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
