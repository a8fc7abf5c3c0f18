"""What all data for training have in common: an order that goes on within an epoch, and that ranks share out."""

from typing import Any, cast

from lightning.pytorch import LightningDataModule

from featinv_pl.data.batches import Batches, ShuffledBatches, cut
from featinv_pl.errors import UserError


class ResumableData(LightningDataModule):
    """Training resumes within an epoch, and evaluation sees each sample exactly once.

    A checkpoint notes how many batches of an epoch have been seen; the order is a function of seed and epoch alone,
    and a step takes the same samples on any number of processes that share a batch of the same size.

    Args:
        batch_size: Samples per batch and process.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"--data.batch_size must be at least 1, and is {batch_size}.")
        self.batch_size = batch_size
        self._order: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None

    def training_batches(self, sizes: list[int], seed: int) -> ShuffledBatches:
        """The training set's batches, from where a checkpoint has left off.

        Args:
            sizes: Samples of each of its stretches, such as shards, which are read a few at a time.
            seed: Of the order.
        """
        rank, world_size = self._rank
        samples = sum(sizes)
        if samples < self.batch_size * world_size:
            raise UserError(
                f"--data.batch_size: a batch of {self.batch_size} is more than the {samples // world_size} "
                "training samples that each process gets. Lower it."
            )
        self._order = {"samples": samples, "batch_size": self.batch_size, "processes": world_size, "seed": seed}
        epoch, start = self._position()
        return ShuffledBatches(sizes, self.batch_size, rank, world_size, seed, epoch, start)

    def evaluation_batches(self, samples: int, name: str) -> Batches:
        """All samples, shared out: torch's own sampler repeats some to give each rank the same number."""
        rank, world_size = self._rank
        if samples < world_size:
            raise UserError(
                f"--trainer.devices: '{name}' has {samples} samples, which is fewer than the {world_size} processes. "
                "Use fewer."
            )
        return Batches(cut([range(rank, samples, world_size)], self.batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: the epoch, the batches of it that have been seen, and what orders them."""
        if self.trainer is None or not self._order:
            return {}
        loop = self.trainer.fit_loop
        epoch, batch = cast(Any, loop.epoch_progress.current), cast(Any, loop.epoch_loop.batch_progress)
        epochs, batches = epoch.processed, 0
        if epoch.started > epoch.processed:  # within an epoch, or after its last batch but before its end
            epochs, batches = (epochs + 1, 0) if batch.is_last_batch else (epochs, batch.current.processed)
        return {"epoch": epochs, "batches": batches, "order": self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; called before the loaders are made."""
        self._resumed = state_dict

    def _position(self) -> tuple[int, int]:
        """The epoch to begin with, and how many of its batches to leave out."""
        if self._resumed is None:
            return 0, 0
        state, self._resumed = self._resumed, None
        theirs, ours = state["order"], self._order
        different = [name for name in ours if theirs.get(name) != ours[name]]
        if state["batches"] and different:
            sides = "; ".join(f"{name}: {theirs.get(name)} in the checkpoint, {ours[name]} here" for name in different)
            raise UserError(
                "--ckpt_path: the checkpoint was written within an epoch, whose remaining samples only the same "
                f"settings tell ({sides}). Use those, or a checkpoint from the end of an epoch."
            )
        return state["epoch"], state["batches"]

    @property
    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
