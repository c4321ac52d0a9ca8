"""What training reads: the ``order`` of samples, the ``reader`` of shards by index or ``streaming``, ``blocks`` of
both domains, and the ``pipeline`` that gives each rank its own. ``mfm_dist.shards`` is how shards are made.
"""
