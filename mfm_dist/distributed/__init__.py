"""One step on any number of processes: ``launch`` reads what the launcher decided, ``start`` makes an ``engine``.
The only door to accelerate and DeepSpeed.
"""
