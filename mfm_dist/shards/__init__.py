"""How shards are made: ``make`` and ``check`` are the commands, ``convert`` packs downloads as ``cards`` describe them,
``scene_shards`` renders, ``writer`` writes, ``verify`` checks. What training reads of them is in ``mfm_dist.data``.
"""
