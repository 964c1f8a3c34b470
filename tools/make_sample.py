"""Makes the built-in sample from the full sets: `FAROUT_DATA=… python tools/make_sample.py`.

Rows are a seeded choice, encoded bytes are copied as they are.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PARTS = {
    ("sample_fashion", "train"): ("fashion_mnist/train", 4000),
    ("sample_fashion", "test"): ("fashion_mnist/test", 1000),
    ("sample_digits", "test"): ("mnist/test", 500),
}


def main() -> None:
    """Writes src/farout/sample/<name>/<split>.parquet."""
    root = Path(os.environ["FAROUT_DATA"])
    target = Path(__file__).parent.parent / "src" / "farout" / "sample"
    for (name, split), (origin, count) in PARTS.items():
        table = pq.read_table(root / f"{origin}.parquet")
        rows = np.sort(np.random.default_rng(0).choice(len(table), count, replace=False))
        path = target / name / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.take(pa.array(rows)), path, compression="zstd", compression_level=19, row_group_size=1000)


if __name__ == "__main__":
    main()
