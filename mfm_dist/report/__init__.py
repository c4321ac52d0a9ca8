"""One self-contained HTML page about one run, or about several side by side.

``run.py`` reads a run folder, ``charts.py`` draws curves, ``gallery.py`` and ``picture.py`` show what the networks see,
``page.py`` makes tables and fills ``templates/``. The page has no script and loads nothing.
"""
