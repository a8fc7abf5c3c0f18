"""The nearest training image, against a search through all whole maps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from conftest import MakeBatch
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.evaluation import neighbours
from featinv_pl.evaluation.neighbours import Neighbours
from shard_sets import replace_member, write_set

SIZE, SHAPE = 90, (8, 4, 3)


def search(folder: Path, memory: int = 1 << 20, on_error: Any = "raise") -> Neighbours:
    shards = ShardSet(folder, "train", "--data.train", on_error=on_error)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=".")
    return Neighbours(trainer, shards, 0, torch.device("cpu"), memory)


def brute_force(queries: Tensor, maps: Tensor) -> Tensor:
    maps = maps.half().double()  # as they are stored
    return torch.stack([cosine_similarity(query.double()[None], maps, dim=1).mean((1, 2)) for query in queries])


@pytest.mark.parametrize(("memory", "grid"), [(2 * 8 * 12 * SIZE, (4, 3)), (2 * 8 * 9 * SIZE, (3, 3)), (0, (1, 1))])
def test_all_training_images_are_searched(
    memory: int, grid: tuple[int, int], make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly where whole maps fit into memory, or where every image is a candidate."""
    monkeypatch.setattr(neighbours, "COMPARED", 700)  # several parts, with candidates in each
    monkeypatch.setattr(neighbours, "CANDIDATES", 3 if grid == SHAPE[1:] else SIZE)
    training, queries = make_batch(SIZE, "train", SHAPE), make_batch(20, shape=SHAPE, seed=1)
    write_set(Path("train"), training, shard_size=40)
    found = search(Path("train"), memory)
    assert found.grid == grid
    nearest = brute_force(queries["features"], training["features"]).argmax(1)
    with torch.autocast("cpu", torch.bfloat16):  # a test in mixed precision finds the same
        images = found(queries)
    for name in ("images", "features", "logits"):
        expected: Any = training[name][nearest]
        torch.testing.assert_close(images[name], expected, rtol=1e-3, atol=1e-3)


def test_few_candidates_find_what_is_almost_as_near(make_batch: MakeBatch) -> None:
    """A map's own neighbour is one that differs from it by noise."""
    training, queries = make_batch(SIZE, "train", SHAPE), make_batch(20, shape=SHAPE, seed=1)
    queries["features"] = training["features"][:20] + 0.3 * queries["features"]
    write_set(Path("train"), training)
    found = search(Path("train"), memory=0)(queries)
    torch.testing.assert_close(found["images"], training["images"][:20], rtol=0, atol=1e-6)


def test_damaged_samples_are_skipped_where_the_set_skips(make_batch: MakeBatch) -> None:
    training = make_batch(5, "train", SHAPE)
    write_set(Path("train"), training)
    replace_member(Path("train"), 0, "features.npy", b"no")
    replace_member(Path("train"), 1, "png", b"no")
    found = search(Path("train"), on_error="skip")
    similar = brute_force(training["features"], training["features"])[:, 2:]
    torch.testing.assert_close(found(training)["images"], training["images"][2:][similar.argmax(1)])
