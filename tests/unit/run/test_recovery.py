"""What a run remembers when it goes back to a checkpoint."""

from __future__ import annotations

from dataclasses import asdict

from mfm_dist.checkpoint.progress import Progress
from mfm_dist.run.recovery import gone_back


def test_going_back_takes_all_from_the_checkpoint_but_the_data_and_the_count_of_rollbacks() -> None:
    memory = {"losses": [1.0], "grad_norms": [2.0], "map_norms": [1.0, 100.0]}
    saved = Progress(step=20, applied=19, block=25, **memory)
    failed = Progress(step=63, applied=58, block=70, skipped=5, rollbacks=1, furthest_failed_step=80, losses=[9.0])
    assert asdict(gone_back(failed, saved)) == {
        "step": 20, "applied": 19, "block": 70, "skipped": 0, "rollbacks": 2, "furthest_failed_step": 80,
        "rollback_step": 20, **memory,
    }  # fmt: skip
