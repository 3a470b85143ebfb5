"""The worker's inside: devices, the trainer's process, the lease that it trains under, and the loop that joins them.

No torch here and no CUDA: what trains is a subprocess, and what it does is told in lines and an exit code.
"""
