"""An estimate of how long a test takes, from a few batches of it."""

import time
from collections.abc import Mapping

from featinv_pl.evaluation.methods import INVERSION
from featinv_pl.evaluation.reconstructions import Reconstructions
from featinv_pl.evaluation.results import aligned
from featinv_pl.types import Batch

BATCHES = 3


class Trial:
    """Times the reconstruction of a few batches of the first test set, given the sizes of all."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.timed: list[tuple[float, int]] = []

    def update(self, reconstructions: Reconstructions, batch: Batch) -> None:
        """Time a batch."""
        start = time.perf_counter()
        reconstructions(batch)[INVERSION]["logits"].cpu()  # waits for the result
        self.timed.append((time.perf_counter() - start, len(batch["key"])))

    def estimate(self, processes: int) -> str:
        """The table of hours by test set, on so many processes."""
        timed = self.timed[1:] or self.timed  # the first batch warms up
        seconds = sum(time for time, _ in timed) / sum(samples for _, samples in timed) / processes
        sizes = {**self.sizes, "all": sum(self.sizes.values())}
        rows = [[name, str(size), f"{size * seconds / 3600:.2g}"] for name, size in sizes.items()]
        table = aligned([["test set", "samples", "hours"], *rows])
        ranks = f"{processes} process{'es' * (processes > 1)}"
        return f"{table}\nFrom {len(timed)} batches at {seconds:.3g} s a sample, on {ranks}."
