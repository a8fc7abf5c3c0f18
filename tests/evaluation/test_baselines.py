"""The floor, the stored regression, and the nearest training image, against a search through all whole maps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cosine_similarity

from conftest import MakeBatch
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.evaluation import baselines
from featinv_pl.evaluation.baselines import IDENTITY, Floor, Neighbours, _read
from shard_sets import replace_member, write_set

SIZE, SHAPE = 90, (8, 4, 3)


def search(folder: Path, on_error: Any = "raise") -> Neighbours:
    shards = ShardSet(folder, "train", "--data.train", on_error=on_error)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=".")
    return Neighbours(trainer, shards, 0, torch.device("cpu"))


def brute_force(queries: Tensor, maps: Tensor) -> Tensor:
    maps = maps.half().double()  # as they are stored
    return torch.stack([cosine_similarity(query.double()[None], maps, dim=1).mean((1, 2)) for query in queries])


@pytest.mark.parametrize(("memory", "grid"), [(2 * 8 * 12 * SIZE, (4, 3)), (2 * 8 * 9 * SIZE, (3, 3)), (0, (1, 1))])
def test_all_images_are_searched(
    memory: int, grid: tuple[int, int], make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly where whole maps fit into memory, or where every image is a candidate."""
    monkeypatch.setattr(baselines, "MEMORY", memory)
    monkeypatch.setattr(baselines, "COMPARED", 700)  # several parts, with candidates in each
    monkeypatch.setattr(baselines, "CANDIDATES", 3 if grid == SHAPE[1:] else SIZE)
    training, queries = make_batch(SIZE, "train", SHAPE), make_batch(20, shape=SHAPE, seed=1)
    write_set(Path("train"), training, shard_size=40)
    found = search(Path("train"))
    assert found.grid == grid
    nearest = brute_force(queries["features"], training["features"]).argmax(1)
    with torch.autocast("cpu", torch.bfloat16):  # a test in mixed precision finds the same
        images = found(queries)
    for name in ("images", "features", "logits"):
        expected: Any = training[name][nearest]
        torch.testing.assert_close(images[name], expected, rtol=1e-3, atol=1e-3)


def test_few_candidates_find_what_is_almost_as_near(make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map's own neighbour is one that differs from it by noise."""
    training, queries = make_batch(SIZE, "train", SHAPE), make_batch(20, shape=SHAPE, seed=1)
    queries["features"] = training["features"][:20] + 0.3 * queries["features"]
    write_set(Path("train"), training)
    monkeypatch.setattr(baselines, "MEMORY", 0)
    found = search(Path("train"))(queries)
    torch.testing.assert_close(found["images"], training["images"][:20], rtol=0, atol=1e-6)


def test_damaged_samples_are_skipped_where_the_set_skips(make_batch: MakeBatch) -> None:
    training = make_batch(5, "train", SHAPE)
    write_set(Path("train"), training)
    replace_member(Path("train"), 0, "features.npy", b"no")
    replace_member(Path("train"), 1, "png", b"no")
    found = search(Path("train"), on_error="skip")
    similar = brute_force(training["features"], training["features"])[:, 2:]
    torch.testing.assert_close(found(training)["images"], training["images"][2:][similar.argmax(1)])


def test_the_floor_is_another_image_and_the_same_in_every_batch(make_batch: MakeBatch) -> None:
    batch: Any = make_batch(40)
    samples: Any = [{**{name: value[row] for name, value in batch.items()}, "labels": 0} for row in range(40)]
    floor = Floor(samples)
    partners = floor(batch)["images"]
    for row in range(40):
        assert not torch.equal(partners[row], batch["images"][row])
        one: Any = {"key": batch["key"][row : row + 1], "features": batch["features"][row : row + 1]}
        assert torch.equal(floor(one)["images"][0], partners[row])


def test_a_regression_is_found_under_its_own_identity_only() -> None:
    path, weights = Path("regression.safetensors"), {"weight": torch.randn(3)}
    assert _read(path, "one") is None
    path.write_bytes(save(weights, {IDENTITY: "one"}))
    assert torch.equal((_read(path, "one") or {})["weight"], weights["weight"])
    assert _read(path, "other") is None
    path.write_bytes(path.read_bytes()[:-1])
    assert _read(path, "one") is None
