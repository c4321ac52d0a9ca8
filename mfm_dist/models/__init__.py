"""Networks: a ``segmentor`` is a ``backbone`` with one of the ``decoders``, ``hrda`` sees two resolutions, and the
``rebuilder`` restores hidden features.
"""
