"""Print the hash of the library's sources: `python benchmark/tree_hash.py [FOLDER]`.

Names the measured tree in the CSV files where git is absent or does not know it: the folder has
changes that are not committed. Else that is git's own `git rev-parse HEAD:ring_flash_attn`.
"""

import hashlib
import sys
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "ring_flash_attn"


def tree_hash(folder: Path = LIBRARY) -> str:
    """Return the sha256 over path and content of every .py file under `folder`, sorted by path."""
    total = hashlib.sha256()
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name in sorted(paths):
        content = hashlib.sha256(paths[name].read_bytes()).hexdigest()
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()


if __name__ == "__main__":
    print(tree_hash(Path(sys.argv[1])) if len(sys.argv) > 1 else tree_hash())
