"""The yardstick of a merge: read every file given, write as many bytes as the first model has. No torch, no numpy.

python -I -S bench/copy_bytes.py OUT BASE EXPERT...
"""

import os
import sys

BLOCK = 1 << 20  # fits into the cache of a core: a larger block is slower


def copy(out: str, folders: list[str]) -> None:
    block = memoryview(bytearray(BLOCK))
    os.makedirs(out)  # noqa: PTH103
    for k, folder in enumerate(folders):
        for name in sorted(os.listdir(folder)):  # noqa: PTH208
            if not name.endswith(".safetensors"):
                continue
            source = os.open(f"{folder}/{name}", os.O_RDONLY)
            target = os.open(f"{out}/{name}", os.O_CREAT | os.O_WRONLY, 0o644) if k == 0 else None
            while size := os.readv(source, [block]):
                if target is not None:
                    os.write(target, block[:size])
            os.close(source)
            if target is not None:
                os.close(target)


if __name__ == "__main__":
    copy(sys.argv[1], sys.argv[2:])
