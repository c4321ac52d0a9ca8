"""What surrounds a run: its ``folder``, what it says (``logging``), ``bad_samples``, steps skipped and runs that go
back (``recovery``), ``signals``, and the ``watchdog`` that ends a run that hangs.
"""
