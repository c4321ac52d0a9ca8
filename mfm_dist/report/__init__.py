"""One self-contained HTML page about one run, or about several side by side.

``run.py`` reads a run folder, ``curves.py`` and ``svg.py`` draw, ``gallery.py`` and ``picture.py`` show what the
networks see, ``tables.py`` compares, ``page.py`` fills ``templates/``. The page has no script and loads nothing.
"""
