"""How long a trainer's threads spin while they wait for each other; decided before torch is imported.

GNU's OpenMP lets them spin for milliseconds, so that a data worker on the same cores never comes to its turn: on two
cores its packs took 1.2 s each instead of 0.25. Threads that never spin pay for being woken, a tenth of a step.
"""

from __future__ import annotations

import os

#: About ten microseconds: longer than the way from one operation to the next.
_SPINS = "3000"


def spin_shortly() -> None:
    """Unless the user has said how threads wait. Later than torch's import it has no effect."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
