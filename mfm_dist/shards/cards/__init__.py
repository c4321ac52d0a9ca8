"""One file a data set: where it comes from, where its files lie as downloaded, and what its labels mean.

Each file has a ``CARD``. A new data set needs a new file here and nothing else.
"""
