"""What a run costs: ``flops`` (operations, by ``counting``) and ``throughput`` (time, by ``step`` and ``data``).

``records.py`` writes what was found beside what it was found with.
"""
