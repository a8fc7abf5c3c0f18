"""Shard sets as batches: shuffled for training, exactly once for evaluation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from conftest import MakeBatch
from featinv_pl.data.order import ShuffledBatches
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import MANIFEST
from featinv_pl.data.shards.reader import BatchReader
from featinv_pl.errors import UserError
from featinv_pl.sampling.noise import generator
from shard_sets import flip, write_set

SIZE = 21
ALL = [f"0-{number}" for number in range(SIZE)]


@pytest.fixture
def folder(make_batch: MakeBatch, tmp_path: Path) -> Path:
    """Twenty-one samples in six shards."""
    write_set(tmp_path / "train", make_batch(SIZE, source="train"), shard_size=4)
    return tmp_path / "train"


def on_rank(data: FeatureShards, rank: int, world_size: int) -> FeatureShards:
    """As Lightning does when a trainer takes hold of the data."""
    data.trainer = cast(Trainer, SimpleNamespace(global_rank=rank, world_size=world_size))
    return data


def keys(loader: DataLoader[Any]) -> list[str]:
    return [key for batch in loader for key in batch["key"]]


def epoch(loader: DataLoader[Any], number: int) -> list[str]:
    cast(ShuffledBatches, loader.sampler).set_epoch(number)
    return keys(loader)


# Training


def test_training_order_follows_from_seed_epoch_and_rank(folder: Path) -> None:
    loader, again, other = (FeatureShards(train=folder, batch_size=7, seed=n).train_dataloader() for n in (3, 3, 4))
    torch.manual_seed(1)
    orders = [epoch(loader, number) for number in range(3)]
    assert sorted(orders[0]) == sorted(ALL) != orders[0]
    torch.manual_seed(2)
    assert [epoch(again, 1), epoch(again, 0)] == orders[1::-1]
    assert len({*map(tuple, (*orders, epoch(other, 0), epoch(other, 1)))}) == 5
    data = [on_rank(FeatureShards(train=folder, batch_size=1), rank, 4) for rank in range(4)]
    ranks = [epoch(one.train_dataloader(), 1) for one in data]
    assert {len(rank) for rank in ranks} == {SIZE // 4}
    assert len({key for rank in ranks for key in rank}) == SIZE - SIZE % 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_draw_what_a_step_needs(folder: Path, num_workers: int) -> None:
    """As the step itself would: from a generator for each sample and epoch."""
    torch.manual_seed(5)
    data = on_rank(FeatureShards(train=folder, batch_size=4, num_workers=num_workers), 0, 1)
    cast(Any, data.trainer).lightning_module = SimpleNamespace(num_timesteps=77)
    loader = data.train_dataloader()
    cast(ShuffledBatches, loader.sampler).set_epoch(2)
    batch = next(iter(loader))
    assert tuple(batch["drawn"]) == (5, 2, 77)
    assert batch["key"] == epoch(FeatureShards(train=folder, batch_size=4).train_dataloader(), 2)[:4]
    for number, key in enumerate(batch["key"]):
        rng = generator(5, 2, key)
        assert torch.equal(batch["noise"][:, number], torch.randn((2, 4, 4, 4), generator=rng))
        assert batch["timesteps"][number] == torch.randint(77, (), generator=rng)
        assert batch["chances"][number] == torch.rand((), generator=rng)
    assert "noise" not in next(iter(FeatureShards(train=folder, batch_size=4).train_dataloader()))


def test_training_reads_a_few_shards_at_a_time() -> None:
    assert sorted(ShuffledBatches([1] * 40, 1, 0, 1, seed=0).order(0)) == list(range(40))
    order = ShuffledBatches([4] * 40, 1, 0, 1, seed=0).order(0).tolist()
    groups = [{index // 4 for index in order[start : start + 64]} for start in (0, 64, 128)]
    assert [len(group) for group in groups] == [16, 16, 8]
    assert groups[0] not in (set(range(16)), set(range(24, 40)))
    assert [index // 4 for index in order[:8]] != sorted(index // 4 for index in order[:8])


@pytest.mark.parametrize(("start", "num_workers"), [(0, 0), (1, 2), (4, 0), (5, 0)])
def test_training_goes_on_within_an_epoch(folder: Path, start: int, num_workers: int) -> None:
    whole, rest = (FeatureShards(train=folder, batch_size=4, num_workers=num_workers) for _ in range(2))
    expected = epoch(whole.train_dataloader(), 3) + epoch(whole.train_dataloader(), 4)
    order = {"samples": SIZE, "batch_size": 4, "processes": 1, "seed": 0}
    rest.load_state_dict({"epoch": 3, "batches": start, "order": order})
    loader = rest.train_dataloader()
    assert len(loader) == SIZE // 4  # Lightning adds the batches that it has seen
    assert keys(loader) + epoch(loader, 4) == expected[start * 4 :]


def test_what_is_left_of_an_epoch_needs_the_same_settings(folder: Path) -> None:
    order = {"samples": SIZE, "batch_size": 7, "processes": 2, "seed": 0}
    data = FeatureShards(train=folder, batch_size=4)
    data.load_state_dict({"epoch": 1, "batches": 2, "order": order})
    with pytest.raises(UserError, match="batch_size: 7 in the checkpoint, 4 here; processes: 2 in the checkpoint, 1"):
        data.train_dataloader()
    data.load_state_dict({"epoch": 1, "batches": 0, "order": order})
    assert keys(data.train_dataloader()) == epoch(FeatureShards(train=folder, batch_size=4).train_dataloader(), 1)


def test_training_leaves_images_out_and_the_last_part_of_a_batch(folder: Path, make_batch: MakeBatch) -> None:
    data = FeatureShards(train=folder, batch_size=8)
    batches = list(data.train_dataloader())
    assert batches[0]["features"].dtype == torch.float16  # as it is stored: what workers hand over is half as large
    batches = [data.on_after_batch_transfer(batch, 0) for batch in batches]
    assert [len(batch["key"]) for batch in batches] == [8, 8]
    assert batches[0].keys() == {"features", "logits", "moments", "labels", "source", "key"}
    expected, indices = make_batch(SIZE), [int(key.split("-")[1]) for key in batches[1]["key"]]
    assert torch.equal(batches[1]["features"], expected["features"][indices].half().float())
    assert torch.equal(batches[1]["labels"], expected["labels"][indices])


# Evaluation


@pytest.mark.parametrize("world_size", [1, 4])
def test_evaluation_sees_each_sample_once(folder: Path, world_size: int) -> None:
    for rank in range(world_size):
        data = on_rank(FeatureShards(val=folder, test={"clean": folder}, batch_size=4), rank, world_size)
        ((val,), (test,)) = data.val_dataloader(), data.test_dataloader()
        assert keys(val) == keys(test) == ALL[rank::world_size]


def test_sources_are_named_by_the_user(folder: Path, make_batch: MakeBatch, tmp_path: Path) -> None:
    for name in ("fog/1", "fog/3"):
        write_set(tmp_path / "c" / name, make_batch(2, source=f"other/{name}"))
    data = FeatureShards(val=folder, test={"clean": folder, "imagenet-c": tmp_path / "c"}, batch_size=32)
    assert list(data.evaluated("fit")) == list(data.evaluated("validate")) == ["val"]
    assert list(data.evaluated("test")) == ["clean", "imagenet-c/fog/1", "imagenet-c/fog/3"]
    batches = [batch for loader in data.test_dataloader() for batch in loader]
    assert [set(batch["source"]) for batch in batches] == [{source} for source in data.evaluated("test")]
    assert FeatureShards(test={"clean": folder}).evaluated("fit") == {}
    assert set(data.manifests) == {str(folder), str(tmp_path / "c/fog/1"), str(tmp_path / "c/fog/3")}
    assert data.manifests[str(folder)]["source"] == "train"


# What will not do


def test_what_will_not_do_is_named(folder: Path) -> None:
    data = FeatureShards(batch_size=4)
    assert data.val_dataloader() == []
    for name, makes in {"train": data.train_dataloader, "test": data.test_dataloader}.items():
        with pytest.raises(UserError, match=f"`data.{name}`"):
            makes()
    with pytest.raises(UserError, match="`batch_size` must be at least 1, and is 0"):
        FeatureShards(train=folder, batch_size=0)
    FeatureShards(train=folder, batch_size=SIZE).train_dataloader()
    with pytest.raises(UserError, match="11 is more than the 10 training samples of a process"):
        on_rank(FeatureShards(train=folder, batch_size=11), 0, 2).train_dataloader()
    (folder / MANIFEST).unlink()
    for name in ("train", "val"):
        with pytest.raises(UserError, match=rf"`data\.{name}`: '{folder}' has no {MANIFEST}"):
            FeatureShards(**cast(Any, {name: folder}))


def test_a_test_set_that_is_missing_is_skipped_or_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By `test`: training does without."""
    sets: dict[str, Path | str] = {"here": folder, "gone": Path("nowhere"), "away": Path("elsewhere")}
    data = FeatureShards(test=sets, batch_size=4)
    assert [batch["source"][0] for (loader,) in [data.test_dataloader()] for batch in loader] == ["here"] * 6
    assert caplog.messages == [
        f"{name}: left out, for there is no folder '{sets[name]}'. Check the path, or extract features first."
        for name in ("gone", "away")
    ]
    assert data.left_out.keys() == {"gone", "away"}
    with pytest.raises(UserError, match=r"^`data.test`: gone: left out, .*'nowhere'.*; away: left out, .*'elsewhere'"):
        FeatureShards(test={"gone": "nowhere", "away": "elsewhere"}).test_dataloader()
    refusing = FeatureShards(train=folder, test=sets, batch_size=4, missing="refuse")
    assert len(keys(refusing.train_dataloader())) == 20
    with pytest.raises(UserError, match=r"^`data.test.gone`: there is no folder 'nowhere'"):
        refusing.test_dataloader()
    (folder / MANIFEST).unlink()  # unfinished is not missing
    with pytest.raises(UserError, match=rf"^`data.test.here`: '{folder}' has no {MANIFEST}"):
        FeatureShards(test=sets).test_dataloader()


def test_counts_what_it_skips(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(folder / "train-00001.tar", 600)
    flip(folder / "train-00003.tar", 700)
    (folder / "train-00005.tar").unlink()  # holds one sample
    data = FeatureShards(val=folder, batch_size=4, on_error="skip")
    (loader,) = data.val_dataloader()
    seen = [key for batch in loader for key in data.on_after_batch_transfer(batch, 0)["key"]]
    assert sorted(set(ALL) - set(seen)) == ["0-12", "0-20", "0-4"]
    data.teardown("validate")
    printed = caplog.messages[-1]
    assert printed.startswith("3 damaged samples were skipped:")
    for fragment in ("'000000004' of the shard", "'000000012' of the shard", "train-00005.tar' is missing"):
        assert fragment in printed
    assert data.val is not None
    with pytest.raises(UserError, match="All 1 samples of a batch are damaged"):
        BatchReader(data.val)[[4]]
    with pytest.raises(UserError, match="is missing"):
        FeatureShards(val=folder)
