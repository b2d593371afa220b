"""From runs to scores, interquartile means, intervals, tables and figures: python -m analysis --help."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy reads it when imported; resamples have their own threads
