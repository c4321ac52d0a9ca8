"""What a command prints when it cannot go on."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.runs import REPOSITORY

TALKATIVE = """
from mfm_dist.errors import tell_user_errors

@tell_user_errors
def main(argv=None):
    for number in range(100_000):
        print(number)
    return 0

raise SystemExit(main())
"""


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence() -> None:
    pipe = ["bash", "-c", 'set -o pipefail; "$@" | head -1', "bash", sys.executable, "-c", TALKATIVE]
    ended = subprocess.run(pipe, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("0\n", "", 141)
