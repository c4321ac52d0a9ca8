"""Checkpoints that appear whole or not at all, say what they hold, and are verified before they are used.

Layout of ``checkpoints/step_XXXXXXXX/``; neither the world size nor the ZeRO stage of the writer matters to the reader:

    rank_XXXXX.safetensors     pieces of tensors, flat, each named by its tensor and its place there; a rank writes what
                               it holds, and of what all ranks hold an even share:
                               student/NAME      parameters, and BatchNorm statistics averaged over ranks
                               teacher/NAME      parameters of the EMA teacher
                               rebuilder/NAME    parameters of the Rebuilder
                               optimizer/PARAMETER/KEY, e.g. .../exp_avg
    buffers_XXXXX.safetensors  that rank's own BatchNorm statistics
    state.json                 progress, configuration, fingerprints of the training data, versions
    manifest.json              size and SHA-256 of every other file, of those of tensors one of every 4 MiB; type and
                               shape of every tensor; written last, by rank 0

``checkpoints/latest`` names the newest, for people and scripts; a start looks for itself. Nothing is ever unpickled.

A write beside training exchanges nothing between ranks. Each rank leaves word in the temporary folder when its pieces
are on the disk, and rank 0 gives the folder its name when all have. To read, the chunks of all files are dealt out to
the ranks evenly, which pass on what they read: all together they read a checkpoint once, whoever wrote it.

``pieces`` are the files of tensors, ``files`` is the layout on disk, ``contents`` what a run puts in and takes out,
``writer`` writes beside training, and ``resume`` decides whether a run may go on from what is there.
"""
