"""How shards are made: ``convert`` packs downloads as their ``cards`` describe, ``scene_shards`` renders, ``writer``
writes, ``verify`` checks. What training reads of them is in ``mfm_dist.data``.
"""
