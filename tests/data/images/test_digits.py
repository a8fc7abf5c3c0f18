"""The fixed split of the digits, and its sources."""

from typing import cast

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from featinv_pl.data.images.corruptions import corrupt
from featinv_pl.data.images.digits import DigitImages, DigitsData, digit_images, digits, split_indices
from featinv_pl.data.order import Batches
from featinv_pl.errors import UserError

SIZES = {"train": 1337, "val": 100, "clean": 360, "hard": 60}


def test_split_is_a_stratified_partition_in_random_order() -> None:
    parts = split_indices()
    assert {name: len(DigitImages(name)) for name in SIZES} == SIZES
    assert sorted(np.concatenate([parts[name] for name in ("train", "val", "clean")])) == list(range(1797))
    for name in ("train", "val", "clean"):
        expected = np.bincount(digits().target) / 1797 * SIZES[name]
        assert np.abs(np.bincount(digits().target[parts[name]]) - expected).max() <= 1
        assert set(digits().target[parts[name][:60]]) == set(range(10))
    hard = set(parts["hard"].tolist())
    assert parts["hard"].tolist() == [index for index in parts["clean"].tolist() if index in hard]


def test_hard_is_hard_for_a_classifier_that_did_not_choose_it() -> None:
    parts = split_indices()
    data, target = digits().data, digits().target
    nearest = KNeighborsClassifier(1).fit(data[parts["train"]], target[parts["train"]])
    accuracy = {name: nearest.score(data[parts[name]], target[parts[name]]) for name in ("clean", "hard")}
    assert accuracy["clean"] > 0.95
    assert accuracy["hard"] < accuracy["clean"] - 0.05


def test_sample_shows_its_digit_with_its_label() -> None:
    images = DigitImages("val")
    for item in (0, 17, 99):
        sample, index = images[item], split_indices()["val"][item]
        assert sample[1:5] == (digits().target[index], str(digits().target[index]), "val", f"{index:04d}")
        assert sample.images.shape == (3, 32, 32)
        assert sample.images.min() == 0
        small = sample.images.float().mean(0).view(8, 4, 8, 4).mean((1, 3)).numpy()
        assert np.corrcoef(small.ravel(), digits().images[index].ravel())[0, 1] > 0.98


def test_corrupted_is_the_clean_set_with_noise_of_each_image_alone() -> None:
    clean, noisy = DigitImages("clean"), DigitImages("corrupted/gaussian_noise/3", limit=6)
    for item in (0, 5):
        index = int(clean[item].key)
        assert noisy[item].key == clean[item].key
        pixels = noisy[item].images.permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, corrupt(digit_images()[index], "gaussian_noise", 3, seed=index))


@pytest.mark.parametrize("source", ["test", "clean/contrast/1", "corrupted", "corrupted/contrast/much"])
def test_refuses_a_source(source: str) -> None:
    with pytest.raises(UserError, match=f"'{source}' is not a source of digits"):
        DigitsData(sources=["clean", source])
    with pytest.raises(UserError, match="no corruption 'sepia'"):
        DigitsData(sources=["corrupted/sepia/3"])


def test_predict_reads_sources_one_after_the_other_and_limits_the_corrupted() -> None:
    data = DigitsData(sources=["hard", "corrupted/contrast/1"], limit=50, batch_size=32)
    batches = [batch for loader in data.predict_dataloader() for batch in loader]
    names = ["hard", "hard", "corrupted/contrast/1", "corrupted/contrast/1"]
    assert [batch["source"] for batch in batches] == [
        [name] * n for name, n in zip(names, (32, 28, 32, 18), strict=True)
    ]
    assert batches[0]["images"].shape == (32, 3, 32, 32)
    assert batches[0]["labels"].dtype == torch.int64
    assert batches[0]["key"] == [f"{index:04d}" for index in split_indices()["hard"][:32]]


def test_training_shuffles_whole_batches_and_validation_does_not() -> None:
    data = DigitsData(batch_size=100)
    loader, epochs = data.train_dataloader(), []
    for epoch in range(2):
        cast(Batches, loader.sampler).set_epoch(epoch)
        epochs.append([key for batch in loader for key in batch["key"]])
    assert len(epochs[0]) == 1300
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) == 1300
    ((val,),) = data.val_dataloader()
    assert val["key"] == [f"{index:04d}" for index in split_indices()["val"]]
