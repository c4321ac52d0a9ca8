"""Mutated configurations and pictures, by seed: each gets a result or one clear refusal, and none ends the process.

python -m tests.campaign.hostile_inputs [--configurations 20000] [--pictures 3000] [--seed 0] [--record FILE]

Every input is made from its own number, so that a line of the record names what to look at again. Anything but a
configuration, an image or the refusal that is due is a finding; no kind of error is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from mfm_dist.config.loader import load_config
from mfm_dist.data.decoding import decode_image, decode_label
from mfm_dist.errors import ConfigError, CorruptFileError
from mfm_dist.shards.pictures import read_picture
from tests.helpers import crafted_pngs
from tests.helpers.runs import REPOSITORY

RECORD = REPOSITORY / "docs" / "benchmarks" / "hostile_inputs.jsonl"
SECONDS = 5.0
"""In which every input has its answer."""
CHARACTERS = 4096
"""Of the longest message."""
PIECES = [
    b"&a {x: *a}", b"*a", b"!!int ''", b"!!timestamp x", b"!!python/object/apply:os.system [true]", b"9" * 400,
    b"[" * 400, b"\xff\xfe", b"\xe9", b"2024-13-45", b"1e400", b"-1", b".nan", b"{}", b"[]", b"null", b"? ", b": ",
    b"<<: *a", b"\t", b"'", b'"\\ud800"', b"0x" + b"f" * 300, b"&a [1, 1, 1]", b"- ", b"# ", b"|", b"%YAML 9.9\n",
    b"---\n", b"...\n",
]  # fmt: skip
"""What is put into the text of a configuration."""


def mutated(content: bytes, generator: np.random.Generator, pieces: list[bytes]) -> bytes:
    """Change a few places: bits, bytes, cuts, copies and foreign pieces."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        at, length = int(generator.integers(len(data) + 1)), int(generator.integers(1, 40))
        kind = int(generator.integers(6))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length] * int(generator.integers(1, 30))
        elif kind == 3:
            data[at : at + length] = generator.bytes(length)
        else:
            data[at : at + length * (kind - 4)] = pieces[int(generator.integers(len(pieces)))]
    return bytes(data)


def configuration(number: int, seed: int, folder: Path) -> str:
    """Load one mutated configuration; return what became of it."""
    generator = np.random.default_rng([seed, 1, number])
    files = [*sorted((REPOSITORY / "configs").glob("*/*.yaml")), REPOSITORY / "tests/unit/config/every_key.yaml"]
    text = files[int(generator.integers(len(files)))].read_bytes()
    if number % 4 == 0:
        override = mutated(b"train.steps=3", generator, PIECES).decode(errors="replace")
        return outcome(lambda: load_config(None, [override]), ConfigError)
    (folder / "run.yaml").write_bytes(mutated(text, generator, PIECES))
    return outcome(lambda: load_config(folder / "run.yaml"), ConfigError)


def picture(number: int, seed: int) -> str:
    """Decode one crafted or mutated picture as image, as label and as a photograph."""
    generator = np.random.default_rng([seed, 2, number])
    if number % 3 == 0:
        depth, colour = ((8, 0), (8, 2), (8, 3), (8, 4), (8, 6), (16, 0), (16, 2), (16, 6))[int(generator.integers(8))]
        kinds = crafted_pngs.broken(generator, depth=depth, colour=colour)
        content, form = kinds[sorted(kinds)[int(generator.integers(len(kinds)))]], "png"
    else:
        form = "png" if number % 3 == 1 else "jpg"
        file, pixels = io.BytesIO(), generator.integers(0, 19, (*crafted_pngs.SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG" if form == "png" else "JPEG", progressive=bool(generator.integers(2)))
        content = mutated(file.getvalue(), generator, [b"IDAT", b"IEND", b"\xff\xd9", b"\xff\xda", b"\0" * 9])
    payload = np.frombuffer(bytearray(content), dtype=np.uint8)
    answers = [
        outcome(lambda: decode_image(payload, form), CorruptFileError),
        outcome(lambda: decode_label(payload, 19, crafted_pngs.SIZE), CorruptFileError),
        outcome(lambda: read_picture(content), CorruptFileError),
    ]
    if number % 3 == 0 and "result" in answers[:2]:
        return "FOUND: wrong pixel data that were taken for a picture"
    return next((answer for answer in answers if answer.startswith("FOUND")), answers[0])


def outcome(work: Callable[[], object], refusal: type[Exception]) -> str:
    """Return ``result``, ``refused``, or what should not be, which begins with FOUND."""
    began = time.perf_counter()
    try:
        work()
        answer = "result"
    except Exception as error:
        answer = "refused"
        if type(error) is not refusal:
            answer = f"FOUND: {type(error).__name__}: {str(error)[:200]}"
        elif len(str(error)) > CHARACTERS:
            answer = f"FOUND: a message of {len(str(error))} characters"
    seconds = time.perf_counter() - began
    return answer if seconds < SECONDS else f"FOUND: {seconds:.1f} s until: {answer}"


def main() -> int:
    """Run the campaign, append a line to the record, and return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=20_000)
    parser.add_argument("--pictures", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    found: list[str] = []
    counts: dict[str, Counter[str]] = {"configurations": Counter(), "pictures": Counter()}
    with TemporaryDirectory() as folder:
        for kind, answers in counts.items():
            for number in range(getattr(arguments, kind)):
                if kind == "configurations":
                    answer = configuration(number, arguments.seed, Path(folder))
                else:
                    answer = picture(number, arguments.seed)
                answers[answer.partition(":")[0]] += 1
                if answer.startswith("FOUND"):
                    found.append(f"{kind} {number}: {answer}")
    line = {"seed": arguments.seed, **counts, "found": found}
    with arguments.record.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({**line, "found": found[:20]}, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
