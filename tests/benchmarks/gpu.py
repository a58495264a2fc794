"""python -m tests.benchmarks.gpu [DEVICE], or `make gpu`: see gpu_suite.py. Names the packages that are not here first.

It needs no network and no installation of the project: torch, the packages below, and the real data (FNET_DATA).
"""

import os
import sys
from importlib.util import find_spec

PACKAGES = ("torch", "torchvision", "numpy", "pydantic", "safetensors", "filelock", "rich", "packaging")


def main(device: str) -> int:
    if lacking := [name for name in PACKAGES if find_spec(name) is None]:
        print(f"not installed here: {' '.join(lacking)}; pip install them, pydantic with its pydantic-core")
        return 2
    from tests.benchmarks import gpu_suite

    return gpu_suite.main(device)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
