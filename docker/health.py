"""The container's health: whichever of server and worker listens here says that it lives.

In: the ports that the service's own settings name. Out: exit code 0 or 1. A server answers /health/live; a worker has
no such path and is asked for its metrics, where nothing listens on the server's port.
"""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 4.0


def is_well(url: str) -> bool | None:
    """None where nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ConnectionRefusedError) else False
    except OSError:
        return False


def main() -> int:
    server, worker = os.environ.get("DVE_PORT", "8000"), os.environ.get("DVE_WORKER_METRICS_PORT", "8001")
    told = is_well(f"http://127.0.0.1:{server}/health/live")
    if told is None:
        told = is_well(f"http://127.0.0.1:{worker}/metrics")
    return 0 if told else 1


if __name__ == "__main__":
    sys.exit(main())
