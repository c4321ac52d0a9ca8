"""Checkpoints that appear whole or not at all, say what they hold, and are verified before they are used.

Layout of ``checkpoints/step_XXXXXXXX/``, all tensors whole and by parameter name, so that neither the world size nor
the ZeRO stage of the writer matters to the reader:

    student.safetensors     parameters, and BatchNorm statistics averaged over ranks: the trained segmentor
    teacher.safetensors     parameters of the EMA teacher
    rebuilder.safetensors   parameters of the Rebuilder
    optimizer.safetensors   "<parameter>/<key>", e.g. ".../exp_avg"
    buffers.safetensors     "<rank>/<buffer>": each rank's own BatchNorm statistics
    state.json              progress, configuration, fingerprints of the training data, versions
    manifest.json           size and SHA-256 of every other file; written last

``checkpoints/latest`` names the newest, for people and scripts; a start looks for itself. Nothing is ever unpickled.

``files`` is the layout on disk, ``contents`` what a run puts in and takes out, ``writer`` writes beside training, and
``resume`` decides whether a run may go on from what is there.
"""

from mfm_dist.checkpoint.contents import collect, load_modules, load_optimizer, load_state, load_student, load_teacher
from mfm_dist.checkpoint.files import (
    Checkpoint,
    DamagedError,
    find_latest,
    find_sound,
    read_checkpoint,
    step_folder,
    write_checkpoint,
)
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.resume import check_resumable, find_resumable, resume_problems
from mfm_dist.checkpoint.writer import CheckpointWriter, Saved

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "DamagedError",
    "Progress",
    "Saved",
    "check_resumable",
    "collect",
    "find_latest",
    "find_resumable",
    "find_sound",
    "load_modules",
    "load_optimizer",
    "load_state",
    "load_student",
    "load_teacher",
    "read_checkpoint",
    "resume_problems",
    "step_folder",
    "write_checkpoint",
]
