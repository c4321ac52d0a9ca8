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
