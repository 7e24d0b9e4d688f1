import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for NumPy, not imported yet: its threads wait by spinning
