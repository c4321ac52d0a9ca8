"""What came out of the lab: arms and their contrasts, paired by seed, out of the records of a plan's runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mfm_dist.errors import EXIT_DONE
from mfm_dist.report.paired import holm, paired_difference
from tools.lab_runs import Plan, Records

SIGNS = (1, -1, -1, 1)
"""Of the arms of a contrast, in their order."""


def collect(plan: Plan, records: Records) -> dict[str, Any]:
    """Return figures by arm and the contrasts, paired by seed.

    Of a plan that confirms, what is corrected for their number, or held against its margin, waits for its last run. A
    contrast of an arm of which a run diverged is not shown, and has not held.
    """
    known = records.of(plan.runs)
    ended: dict[tuple[str, str], dict[int, dict[str, Any]]] = {pair: {} for pair in product(plan.beds, plan.arms)}
    for run, line in known.items():
        if line["figure"] is not None and line["code"] == EXIT_DONE:
            ended[run.bed, run.arm][run.seed] = line
    diverged = [run for run, line in known.items() if line["code"] != EXIT_DONE]
    contrasts = [
        {"bed": bed, "arms": arms, **contrast([ended[bed, arm] for arm in arms])}
        for bed, arms in product(plan.beds, plan.contrasts)
    ]
    if plan.confirmed and len(known) == len(plan.runs):
        lost = {(run.bed, run.arm) for run in diverged}
        whole = [row["p"] is not None and not lost & {(row["bed"], arm) for arm in row["arms"]} for row in contrasts]
        p_values = [row["p"] if there else 1.0 for row, there in zip(contrasts, whole, strict=True)]
        for row, there, p in zip(contrasts, whole, holm(p_values), strict=True):
            row |= {"p_holm": p} if plan.margin is None else {"held": there and row["low"] > plan.margin}
    arms = [
        {
            "bed": bed, "arm": arm, "by_seed": {seed: line["figure"] for seed, line in lines.items()},
            "works": {name: interval(each) for name, each in works(list(lines.values())).items() if each},
            "skipped": sum((line.get("events") or {}).get("skipped_step", 0) for line in lines.values()),
        }
        for (bed, arm), lines in ended.items()
    ]  # fmt: skip
    return {
        "plan": plan.name,
        "confirmed": plan.confirmed,
        "margin": plan.margin,
        "on_record": len(known),
        "runs": len(plan.runs),
        "arms": arms,
        "contrasts": contrasts,
        "diverged": [f"{run.bed} {run.arm} seed {run.seed}" for run in diverged],
        "commits": sorted({line["commit"] for line in known.values()}),
        "machines": sorted({json.dumps(line["machine"], sort_keys=True) for line in known.values()}),
    }


def contrast(arms: Sequence[dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return the differences of arms, records by seed: of the figure, and of what ``works`` says of each.

    Of two arms the first minus the second; of four (first - second) - (third - fourth).
    """
    shared = sorted(set.intersection(*(set(arm) for arm in arms)))

    def differences(values: Sequence[Sequence[float]]) -> list[float]:
        return [
            sum(sign * value for sign, value in zip(SIGNS, each, strict=False)) for each in zip(*values, strict=True)
        ]

    by_seed = dict(zip(shared, differences([[arm[seed]["figure"] for seed in shared] for arm in arms]), strict=True))
    said = [works([arm[seed] for seed in shared]) for arm in arms]
    everywhere = [name for name in said[0] if all(len(one[name]) == len(shared) > 0 for one in said)]
    return {
        "by_seed": by_seed,
        **interval(list(by_seed.values())),
        "works": {name: interval(differences([one[name] for one in said])) for name in everywhere},
        "p_holm": None,
        "held": None,
    }


def title(arms: Sequence[str]) -> str:
    """Write a contrast of two arms, or of four, for people."""
    pairs = [" - ".join(arms[at : at + 2]) for at in range(0, len(arms), 2)]
    return pairs[0] if len(pairs) == 1 else " - ".join(f"({pair})" for pair in pairs)


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean, its 95 % interval, and p of a mean of 0; all None of none."""
    if not values:
        return dict.fromkeys(("mean", "low", "high", "p"))
    found = paired_difference(values)
    half = found.half_width
    low, high = (None, None) if half is None else (found.mean - half, found.mean + half)
    return {"mean": found.mean, "low": low, "high": high, "p": found.p}


def works(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Tell from records whether their Rebuilders do their task.

    Returns:
        A value for each record that says so, of ``hidden``: agreement with the pseudo-label on hidden pixels;
        ``over_diffusion``: minus that of averaged neighbours; ``over_controls``: minus that of these or of zeros,
        whichever is better; ``over_other``: minus that of the Rebuilder when it sees another image; ``share`` of the
        encoder's gradient that comes through the Rebuilder; ``loss_hidden`` of the last fifth of the steps;
        ``lambda_eff``, the mean of all steps.
    """
    found: dict[str, list[float]] = {
        name: []
        for name in ("hidden", "over_diffusion", "over_controls", "over_other", "share", "loss_hidden", "lambda_eff")
    }
    for line in lines:
        probe = line.get("probe") or {}
        if (share := probe.get("gradient_share")) is not None:
            found["share"].append(share)
        hidden = {name: values["hidden"] for name, values in (probe.get("agreement") or {}).items()}
        if hidden.get("rebuilder") is not None:  # None where nothing is hidden
            own, filled = hidden["rebuilder"], hidden["diffusion"]
            found["hidden"].append(own)
            found["over_diffusion"].append(own - filled)
            found["over_controls"].append(own - max(filled, hidden["zero_fill"]))
            found["over_other"].append(own - hidden["other_image"])
        logged = line.get("instruments") or {}
        for name, part in (("loss_hidden", "late"), ("lambda_eff", "mean")):
            if (value := logged.get(f"mfm/{name}", {}).get(part)) is not None:
                found[name].append(value)
    return found


def _cells(values: Sequence[tuple[Any, str]], wide: int = 8) -> str:
    """Write numbers, each with its format, into columns; what is None stays empty."""
    return " ".join(f"{'' if value is None else format(value, form):>{wide}}" for value, form in values)


def show_results(results: dict[str, Any]) -> str:
    """Return what was collected, for people."""
    heads = ("mean", "hidden", "-control", "-other", "share", "loss", "lambda")
    lines = [
        "agreement on hidden pixels, minus the better of neighbours and zeros, minus another image's; the share of the",
        "encoder's gradient that comes through the Rebuilder; hidden loss",
        f"{'bed':<10} {'arm':<24} {_cells([(head, '') for head in heads])}  by seed",
    ]
    for row in results["arms"]:
        seeds = ", ".join(f"{seed}: {value:.2f}" for seed, value in sorted(row["by_seed"].items()))
        said, mean = row["works"], statistics.fmean(row["by_seed"].values()) if seeds else None
        names = ("hidden", "over_controls", "over_other", "share", "loss_hidden", "lambda_eff")
        kept = [(said[name]["mean"] if name in said else None, ".3f") for name in names]
        cells = _cells([(mean, ".2f"), *kept])
        skipped = f"  ({row['skipped']} steps skipped)" if row["skipped"] else ""
        lines.append(f"{row['bed']:<10} {row['arm']:<24} {cells}  {seeds}{skipped}")
    last = "Holm" if results["margin"] is None else f"> {results['margin']}"
    columns = ("n", "mean", "low", "high", "least", "p", last, "hidden", "low")
    lines += ["", "differences paired by seed, with their 95 % intervals; at the end those of hidden agreement"]
    wide = max((len(title(row["arms"])) for row in results["contrasts"]), default=0)
    lines += [f"{'bed':<10} {'contrast':<{wide}} {_cells([(head, '') for head in columns])}"]
    for row in results["contrasts"]:
        least, held = min(row["by_seed"].values(), default=None), row["held"]
        answer = {True: "yes", False: "no", None: None}[held]
        verdict = (row["p_holm"], ".4f") if results["margin"] is None else (answer, "")
        agreed = row["works"].get("hidden", {})
        cells = _cells([
            (len(row["by_seed"]), ""), (row["mean"], "+.2f"), (row["low"], "+.2f"), (row["high"], "+.2f"),
            (least, "+.2f"), (row["p"], ".4f"), verdict, (agreed.get("mean"), "+.3f"), (agreed.get("low"), "+.3f"),
        ])  # fmt: skip
        lines.append(f"{row['bed']:<10} {title(row['arms']):<{wide}} {cells}")
    lines += ["", f"{results['on_record']} of {results['runs']} runs on record"]
    lines += [f"diverged, and in no mean: {name}" for name in results["diverged"]]
    several = [f"{len(results[kind])} {kind}" for kind in ("commits", "machines") if len(results[kind]) > 1]
    return "\n".join([*lines, *([f"NOTE: runs of {' and '.join(several)} are compared"] if several else [])])


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the contrasts with their intervals, and each seed's difference."""
    from matplotlib.figure import Figure

    rows = [row for row in results["contrasts"] if row["by_seed"]][::-1]
    beds = {row["bed"] for row in rows}
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        half = None if row["low"] is None else row["mean"] - row["low"]
        axes.errorbar(row["mean"], place, xerr=half, fmt="o", color="C0", capsize=3)
        axes.plot(list(row["by_seed"].values()), [place] * len(row["by_seed"]), "|", color="0.5")
    axes.axvline(0, color="0.7", linewidth=1)
    if results["margin"] is not None:
        axes.axvline(results["margin"], color="0.7", linewidth=1, linestyle="--")
    axes.set_yticks(
        range(len(rows)),
        [f"{row['bed']}: {title(row['arms'])}" if len(beds) > 1 else title(row["arms"]) for row in rows],
    )
    axes.set_title(f"{results['plan']}: mean, 95 % interval and each seed", fontsize="medium")
    axes.set_xlabel("difference in target mIoU, points")
    figure.savefig(path)
