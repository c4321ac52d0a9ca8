#!/usr/bin/env python
"""Mutated configurations, pictures and files by seed, given to the commands: each a result or one clear refusal.

python -m tests.campaign.hostile_inputs [configurations pictures files] [--count N] [--seed 0] [--tree CLONE]
    [--work FOLDER] [--record FILE]

Every input is made from its own number and goes to real commands, each call in a process of its own. Found is whatever
is neither a result nor one refusal with an exit code of the README: a process that a signal ends, a traceback, more
than 5 s of CPU time for a configuration, a message of more than 4 kB, something executed, a picture that is bad and is
not named, a checkpoint that is gone. No kind of error is left out. What is done stands in the work folder, where an
interrupted campaign goes on; the end appends a line to the record. With ``--tree`` the code of another clone is tried.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from mfm_dist.storage import JsonLines
from tests.helpers import crafted_pngs
from tests.helpers.damaged_shards import write_tar
from tests.helpers.forked_commands import Answer, ForkedCommands
from tests.helpers.mutations import YAML_PIECES, change_file, copy_fresh, mutated, vouch
from tests.helpers.provenance import provenance
from tests.helpers.runs import DEFAULTS, REPOSITORY, tiny_overrides

RECORD = REPOSITORY / "docs" / "benchmarks" / "hostile_inputs.jsonl"
COUNTS = {"configurations": 20_000, "pictures": 3_000, "files": 2_000}
SMALL = ["data.crop=32x32", "eval.overlays=0", "log.trackers=[]", "model.decoder=segformer",
         "model.decoder_options={width: 8}", "rebuilder.width=8", "rebuilder.grid=1", "train.global_batch=2",
         "checkpoint.keep=99", "debug.check_gradients=false"]  # fmt: skip
"""Beside ``tiny_overrides``: a run of a second."""
REFUSALS = (2, 3, 4)
"""Exit codes of a refusal: configuration, data, storage."""
SECONDS = 5.0
"""Of CPU time, for any configuration."""
CHARACTERS = 4096
"""Of the longest message."""
BATCH = 10
"""Pictures that go through training, check and prediction together."""
NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 7, 0.5, 1e-12, 5.0, 1e8, 1e38, 100_000, float("nan"), None, [], "x"]
"""What a key of a configuration is set to, to see what passes ``--check`` and fails later."""


class Campaign:
    """Inputs for the code of one clone."""

    def __init__(self, tree: Path, work: Path, seed: int) -> None:
        self.tree, self.work, self.seed = tree, work, seed
        self.call = ForkedCommands(tree)
        self.scenes, self.run, self.export = work / "scenes", work / "run", work / "export"
        self.keys = sorted(_leaves(yaml.safe_load((REPOSITORY / "tests/unit/config/every_key.yaml").read_text()), ""))
        if not self.export.exists():
            self.must("scenes", self.scenes, 32, 64, 6, 1)
            self.must("train", *self.settings(self.scenes, self.run))
            self.must("export", "--run", self.run, "--output", self.export)
            Image.fromarray(np.zeros((32, 64, 3), dtype=np.uint8)).save(work / "picture.png")

    def must(self, *call: object) -> None:
        """Call what has to go well."""
        answer = self.call(str(call[0]), *call[1:])
        assert answer.code == 0, answer

    def settings(self, scenes: Path, run: Path) -> list[str]:
        """Return the arguments of a tiny run."""
        return [*DEFAULTS, *tiny_overrides(scenes, run), *SMALL]

    def configurations(self, number: int) -> list[str]:
        """Load one mutated configuration, or set one key of a run that otherwise trains."""
        generator = np.random.default_rng([self.seed, 1, number])
        if number % 20 == 0:
            return self.one_key(generator)
        if number % 4 == 0:
            override = mutated(b"train.steps=3", generator, YAML_PIECES[:-2]).decode(errors="replace").replace("\0", "")
            return self.judge("config", "", override, limit=SECONDS)
        files = [*sorted((REPOSITORY / "configs").glob("*/*.yaml")), REPOSITORY / "tests/unit/config/every_key.yaml"]
        text = files[int(generator.integers(len(files)))].read_bytes()
        path = self.work / "mutated.yaml"
        path.write_bytes(mutated(text, generator, YAML_PIECES))
        found = self.judge("config", path, limit=SECONDS)
        if (executed := self.tree / "executed").exists():
            executed.unlink()
            found.append("something was executed")
        return found

    def one_key(self, generator: np.random.Generator) -> list[str]:
        """What ``--check`` lets pass must train."""
        key = self.keys[int(generator.integers(len(self.keys)))]
        value = NUMBERS[int(generator.integers(len(NUMBERS)))]
        run = self.work / "one_key"
        shutil.rmtree(run, ignore_errors=True)
        arguments = [*self.settings(self.scenes, run), f"{key}={json.dumps(value)}", "train.steps=1"]
        if key in ("train.steps", "train.global_batch", "run.folder", "data.root"):  # as long a run as is asked for
            return []
        answer = self.call("train", *arguments, "--check")
        found = self.problems(f"{key}={value} --check", answer, limit=SECONDS)
        if answer.code == 0:
            found += self.problems(f"{key}={value}", self.call("train", *arguments), allowed=(0, 3, 4, 5, 76))
        return found

    def judge(self, *call: object, limit: float = 60.0) -> list[str]:
        """Call something; return what is neither a result nor a refusal."""
        return self.problems(str(call[0]), self.call(str(call[0]), *call[1:]), limit)

    def problems(
        self, what: str, answer: Answer, limit: float = 60.0, allowed: Sequence[int] = (0, *REFUSALS)
    ) -> list[str]:
        """List what is wrong with an answer."""
        found = []
        if answer.code not in allowed or "Traceback (most recent call last)" in answer.output:
            said = " ".join(answer.output.split()[-50:])[-300:]
            ended = f"ended by signal {-answer.code}" if answer.code < 0 else f"code {answer.code}"
            found.append(f"{what}: {ended}: {said}")
        longest = answer.length if what == "config" else max(map(len, answer.output.split("\n")))
        if longest > CHARACTERS:
            found.append(f"{what}: a message of {longest} characters: {answer.output[:100]}")
        if answer.cpu > limit:
            found.append(f"{what}: {answer.cpu} s of CPU time")
        return found

    def pictures(self, number: int) -> list[str]:
        """Train on, check and predict a batch of pictures; as many samples beside them are sound."""
        folder, inputs = self.work / "pictures" / "set", self.work / "pictures" / "inputs"
        shutil.rmtree(folder.parent, ignore_errors=True)
        for path in (folder, inputs):
            path.mkdir(parents=True)
        known: dict[str, bool] = {}
        samples = []
        for one in range(2 * BATCH):
            generator = np.random.default_rng([self.seed, 2, number * BATCH + one // 2, one % 2])
            key, (members, bad) = f"sample_{one:04d}", self.sample(generator, sound=one % 2 == 1)
            samples.append((key, members))
            known[key] = bad
            form = next(name for name in members if name in ("jpg", "png"))
            (inputs / f"{key}.{form}").write_bytes(members[form])
        write_tar(folder / "000000.tar", samples)
        self.must("adopt", folder / "000000.tar")
        check = self.call("check", folder, "--workers", 1)
        found = self.problems("check", check)
        checked = set(re.findall(r"sample '?(sample_\d+)'?", check.output))
        run = self.work / "pictures" / "run"
        arguments = [*self.settings(folder.parent, run), "data.source=set", "data.target=set", "data.validation=set",
                     "data.bad_sample_limit=1", "data.crop=24x40", f"train.steps={BATCH}", "checkpoint.every=99",
                     "mfm.enabled=false", "method.name=dacs"]  # fmt: skip
        trained = self.call("train", *arguments)
        found += self.problems("train", trained)
        events = JsonLines(run / "events.jsonl")
        named = {str(line["key"]) for line in events if line.get("event") == "bad_sample"}
        predicted = self.call("predict", "--run", self.run, "--input", inputs, "--output", self.work / "pictures/out")
        found += self.problems("predict", predicted)
        for key, bad in known.items():
            sound = int(key[-4:]) % 2 == 1
            if bad and check.code in (0, 3) and key not in checked:
                found.append(f"check does not name {key}")
            if sound and key in checked | named:
                found.append(f"{key} is sound and is named")
        if trained.code == 0 and check.code in (0, 3) and named != checked:
            found.append(f"training names {sorted(named - checked)} alone, check {sorted(checked - named)}")
        return found

    def sample(self, generator: np.random.Generator, *, sound: bool) -> tuple[dict[str, bytes], bool]:
        """Return the members of a sample, and whether it is bad by construction."""
        pixels = generator.integers(0, 256, (*crafted_pngs.SIZE, 3), dtype=np.uint8)
        label = crafted_pngs.png(zlib.compress(crafted_pngs.rows(generator)))
        if sound:
            return {"jpg": _encoded(pixels, "JPEG"), "label.png": label}, False
        kind, progressive = int(generator.integers(4)), bool(generator.integers(2))
        if kind == 3:
            jpeg = _encoded(pixels, "JPEG", progressive=progressive)
            return {"jpg": mutated(jpeg, generator, [b"\xff\xd9", b"\xff\xda", b"\0" * 9]), "label.png": label}, False
        if kind == 2:
            png = mutated(_encoded(pixels, "PNG"), generator, [b"IDAT", b"IEND", b"PLTE", b"\0" * 9])
            return {"png": png, "label.png": label}, False
        as_image = kind == 1
        forms = ((8, 0), (8, 2), (8, 3), (8, 4), (8, 6), (16, 0), (16, 2), (16, 6))
        depth, colour = forms[int(generator.integers(len(forms)))]
        crafted = crafted_pngs.broken(generator, depth=depth, colour=colour)
        png = crafted[sorted(crafted)[int(generator.integers(len(crafted)))]]
        return (
            {"png": png, "label.png": label} if as_image else {"jpg": _encoded(pixels, "JPEG"), "label.png": png}
        ), True

    def files(self, number: int) -> list[str]:
        """Change a file of shards, a checkpoint, an export or a run folder, and use it."""
        generator = np.random.default_rng([self.seed, 3, number])
        group = (self.of_shards, self.of_checkpoint, self.of_export, self.of_run)[number % 4]
        return group(generator)

    def of_shards(self, generator: np.random.Generator) -> list[str]:
        scenes = copy_fresh(self.scenes, self.work / "changed")
        done = self.change([path for path in scenes.rglob("*") if path.suffix in (".json", ".npy")], scenes, generator)
        run = self.work / "changed_run"
        shutil.rmtree(run, ignore_errors=True)
        folders = [path for path in scenes.iterdir() if path.is_dir()]
        answer = self.call("check", *folders, "--workers", 1)
        found = self.problems("check", answer)
        found += ["advice to run rm"] if re.search(r"(again|remake|run):? .*rm -rf", answer.output) else []
        found += self.judge("train", *self.settings(scenes, run), "train.steps=1")
        return _about(done, found)

    def of_checkpoint(self, generator: np.random.Generator) -> list[str]:
        run = copy_fresh(self.run, self.work / "changed")
        newest = max((run / "checkpoints").glob("step_*"))
        newer = generator.integers(12) == 0
        if newer:
            state = json.loads((newest / "state.json").read_text())
            state["format"] = state.get("format", 1) + int(generator.integers(1, 4))
            (newest / "state.json").write_text(json.dumps(state))
            vouch(newest)
            done = f"format {state['format']}"
        else:
            files = [path for path in newest.rglob("*") if path.is_file()]
            done = self.change([*files, *([run / "checkpoints/latest"])], newest, generator)
        there = _digests(run / "checkpoints")
        answer = self.call("evaluate", "--run", run)
        found = self.problems("evaluate", answer)
        again = self.call("train", *self.settings(self.scenes, run), "train.steps=6")
        found += self.problems("train", again)
        if re.match(r"(not finite|other type): ", done) and "resealed" in done:
            if "student" in done and "buffers" not in done and answer.code == 0:
                found.append("evaluate scores weights of a kind that is never written")
            if again.code == 0 and not (run / "checkpoints" / "set_aside").exists():
                found.append("training goes on from weights of a kind that is never written")
        if newer and again.code != 2:
            found.append(f"a newer format is not refused: code {again.code}")
        lost = [path for digest, path in there.items() if digest not in _digests(run / "checkpoints")]
        if lost and (newer or again.code != 0 or any(newest.name in path for path in lost)):
            found.append(f"lost: {sorted(lost)[:4]}")
        return _about(done, found)

    def of_export(self, generator: np.random.Generator) -> list[str]:
        export = copy_fresh(self.export, self.work / "changed")
        done = self.change([export / "config.json", export / "model.safetensors"], export, generator)
        output = self.work / "changed_out"
        shutil.rmtree(output, ignore_errors=True)
        picture = self.work / "picture.png"
        answer = self.call("predict", "--model", export, "--input", picture, "--output", output, seconds=20)
        found = self.problems("predict", answer, limit=15)
        if re.match(r"(not finite|other type): ", done) and answer.code == 0:
            found.append("predict takes weights of a kind that is never written")
        return _about(done, found)

    def of_run(self, generator: np.random.Generator) -> list[str]:
        run = copy_fresh(self.run, self.work / "changed")
        outside = [path for path in run.rglob("*") if path.is_file() and "step_" not in path.parent.name]
        chosen = [path for path in outside if "tensorboard" not in path.parts]
        done = self.change(chosen, run, generator)
        found = self.judge("report", run) + self.judge("evaluate", "--run", run)
        found += self.judge("train", *self.settings(self.scenes, run), "train.steps=6")
        return _about(done, found)

    def change(self, files: list[Path], folder: Path, generator: np.random.Generator) -> str:
        """Change one of some files; every other time what stands beside it vouches for it. Return what was done."""
        path = sorted(files)[int(generator.integers(len(files)))]
        done = change_file(path, generator)
        if sealed := bool(generator.integers(2)):
            vouch(folder)
        return f"{done} in {path.name}{', resealed' if sealed else ''}"


def _leaves(tree: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key, value in tree.items():
        inner = isinstance(value, dict) and not key.endswith("options")
        found += _leaves(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return found


def _about(done: str, found: list[str]) -> list[str]:
    return [f"{done[:120]}: {problem}" for problem in found]


def _digests(checkpoints: Path) -> dict[str, str]:
    """Map the digest of every file of every checkpoint to its path."""
    files = [
        path for path in checkpoints.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size
    ]
    inside = [path for path in files if path.parent != checkpoints]
    return {sha256(path.read_bytes()).hexdigest(): str(path.relative_to(checkpoints)) for path in inside}


def _encoded(pixels: np.ndarray, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def summary(kind: str, lines: list[dict[str, Any]], seed: int, tree: Path) -> dict[str, Any]:
    """Return the line of the record: what was given, and what was found, by its beginning."""
    inputs = len(lines) * (BATCH if kind == "pictures" else 1)
    found = [f"{line['number']}: {problem}" for line in lines for problem in line["found"]]
    classes = Counter(re.sub(r"[0-9.]+|/\S+", "#", problem.partition(": ")[2])[:90] for problem in found)
    where = {"inputs": inputs, "seed": seed, "inputs_with_a_finding": sum(bool(line["found"]) for line in lines)}
    return {"kind": kind, **where, "found": found[:40], "kinds_found": len(classes), **provenance(tree)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign, append to the record, and return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[[], *COUNTS], help=f"of {', '.join(COUNTS)} (all)")
    parser.add_argument("--count", type=int, help=f"of each ({', '.join(f'{n:,}' for n in COUNTS.values())})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="the clone to try (this one)")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign/hostile"), help="(%(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="appended to (%(default)s)")
    arguments = parser.parse_args(argv)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(arguments.tree.resolve(), work, arguments.seed)
    bad = False
    for kind in arguments.kinds or COUNTS:
        give: Callable[[int], list[str]] = getattr(campaign, kind)
        count = (arguments.count or COUNTS[kind]) // (BATCH if kind == "pictures" else 1)
        progress = JsonLines(work / f"{kind}_{arguments.seed}.jsonl")
        done = {line["number"] for line in progress}
        for number in range(count):
            if number not in done:
                found = [problem.replace(str(work), "WORK") for problem in give(number)]
                progress.append({"number": number, "found": found})
                if found:
                    print(f"{kind} {number}: {found}", flush=True)
        lines = [line for line in progress if line["number"] < count]
        line = summary(kind, lines, arguments.seed, campaign.tree)
        JsonLines(arguments.record).append(line)
        print(json.dumps(line, indent=1))
        bad = bad or bool(line["found"])
    campaign.call.close()
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
