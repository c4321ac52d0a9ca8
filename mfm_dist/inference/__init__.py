"""After and beside training: ``evaluation`` scores, ``predict_labels`` predicts, ``segmentor`` is a trained network
on its own, ``open_run`` opens a run folder.
"""
