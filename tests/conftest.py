"""One compute thread in every test and in every server that a test starts.

The models are small, and threads that spin while they wait for each other lose a core that a second process needs:
beside one busy process the tests of the KV cache took 170 s with two threads and 14 s with one.
"""

import os

# Before anything imports torch: OpenMP reads it when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
