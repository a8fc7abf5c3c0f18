"""Directions that others have found are read as they say, bound to the classifier, and measured on real images."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import Runs
from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import Concepts
from featinv_pl.explore.exploration import Origin, Samples
from featinv_pl.explore.external import Directions
from interrupts import Capture

ORIGIN = Origin(backbone="tiny", backbone_digest="d" * 64, layer="forward_features", feature_shape=[6, 3, 3])
MAPS = torch.rand(5, 6, 3, 3, generator=torch.Generator().manual_seed(1))
SAMPLES = Samples(MAPS.half(), torch.zeros(5), ["a"] * 5, ORIGIN, [])
ROWS = torch.rand(2, 6, generator=torch.Generator().manual_seed(2))


def read(tensors: dict[str, torch.Tensor], key: str | None = None, **metadata: str) -> Directions:
    save_file({name: one.clone().contiguous() for name, one in tensors.items()}, "file.safetensors", metadata)
    return Directions.read(Path("file.safetensors"), key)


@pytest.mark.parametrize("vectors", [ROWS, ROWS.T, ROWS[..., None, None], ROWS[0], ROWS[0, :, None, None]])
def test_vectors_are_read_in_rows_columns_and_maps(vectors: torch.Tensor) -> None:
    found = read({"w": vectors}).concepts(ORIGIN)
    number = 1 if vectors.ndim in (1, 3) else 2
    torch.testing.assert_close(found.directions, ROWS[:number, :, None, None])
    # The score is the projection, in units of the vector, averaged over locations.
    projected = torch.einsum("bchw,kc->bk", MAPS, ROWS[:number]) / 9 / ROWS[:number].square().sum(1)
    torch.testing.assert_close(found.score(MAPS, torch.ones(3, 3)), projected)
    assert found.note


def test_a_file_may_say_whose_it_is() -> None:
    said = {"backbone_digest": "d" * 64, "layer": "forward_features", "names": json.dumps(["stripes", "dots"])}
    found = read({"a": ROWS, "b": ROWS}, "b", **said).concepts(ORIGIN)
    assert (found.names, found.note) == (["stripes", "dots"], "")
    for name in ("layer", "backbone_digest"):
        with pytest.raises(UserError, match=f"is of {name} 'other', and the maps here are of"):
            read({"a": ROWS}, **{**said, name: "other"}).concepts(ORIGIN)


def test_an_autoencoder_is_read_with_its_encoder() -> None:
    weights = {"W_dec": ROWS, "W_enc": torch.randn(6, 2), "b_enc": torch.randn(2), "b_dec": torch.randn(6)}
    found = read(weights, "W_dec").measured(SAMPLES)
    centred = MAPS.half().float() - weights["b_dec"][:, None, None]
    expected = (torch.einsum("bchw,ck->bkhw", centred, weights["W_enc"]) + weights["b_enc"][:, None, None]).relu()
    contributed = torch.einsum("bkhw,kc->bkchw", expected, ROWS)
    for number in range(2):  # whatever the unit
        torch.testing.assert_close(found.part(MAPS.half().float(), number), contributed[:, number])
    active = [one[one > 0] for one in found.activations(MAPS.half().float()).unbind(1)]
    assert all(np.quantile(one, 0.99) == pytest.approx(1, abs=1e-4) for one in active if len(one))
    found.save(Path("sae"))
    torch.testing.assert_close(Concepts.load(Path("sae")).activations(MAPS), found.activations(MAPS))
    with pytest.raises(UserError, match="whose activation is a ReLU"):
        read({**weights, "threshold": torch.ones(2)}, "W_dec")
    with pytest.raises(UserError, match="does not fit 2 directions"):
        read({**weights, "b_enc": torch.ones(3)}, "W_dec").concepts(ORIGIN)


def test_vectors_are_measured_in_standard_deviations() -> None:
    scores = read({"w": ROWS}).measured(SAMPLES).score(MAPS.half().float(), torch.ones(3, 3))
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.std(0), torch.ones(2), atol=1e-4, rtol=0)


def test_command_converts_arrays_of_numpy(digit_shards: Path, inverter_folder: Path, picture: Path) -> None:
    """A bank of concepts as CRAFT has it, found by the command itself, is the same when it comes from outside."""
    shards, image = str(digit_shards / "train"), str(picture)
    main(["concepts", shards, "--num_concepts", "2", "--out", "own"])
    own = Concepts.load(Path("own"))
    np.savez("bank.npz", W=own.directions[..., 0, 0].numpy() * 3, U=np.ones(3))
    main(["concepts", shards, "--directions", "bank.npz", "--key", "W", "--method", "nmf", "--out", "given"])
    given = Concepts.load(Path("given"))
    torch.testing.assert_close(given.directions, own.directions, rtol=1e-3, atol=1e-5)
    assert given.origin == own.origin
    steered = ["steer", image, "--model", str(inverter_folder), "--strengths", "1"]
    main([*steered, "--concepts", "bank.npz", "--key", "W", "--out", "direct"])
    assert "only channels were compared" in Path("direct/steering.html").read_text()
    assert json.loads(Path("direct/steering.json").read_text())["concept"] == "direction 0"


def files() -> None:
    np.save("wide.npy", np.ones((2, 7), np.float32))
    np.save("words.npy", np.array(["a", "b"]))
    with Path("pickled.npy").open("wb") as file:
        np.lib.format.write_array(file, np.array([Runs(Path("ran"))], dtype=object))
    Path("pickle.npz").write_bytes(pickle.dumps(Runs(Path("ran"))))
    np.savez("two.npz", a=np.ones((2, 8)), b=np.ones(8))
    save_file({"w": torch.full((2, 8), torch.nan)}, "nan.safetensors")
    save_file({"w": torch.zeros(2, 8)}, "zero.safetensors")
    save_file({"w": torch.ones(2, 8)}, "odd.safetensors", {"method": "magic"})
    Path("cut.safetensors").write_bytes(Path("nan.safetensors").read_bytes()[:-9])
    Path("text.csv").write_text("1,2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.npy"], "--concepts: there is no file 'none.npy'"),
        (["wide.npy"], r"--key: an array of shape \[2, 7\] in 'wide.npy' does not fit; maps here are of"),
        (["words.npy"], "--key: the array of 'words.npy' is not of finite floating-point numbers"),
        (["pickled.npy"], "--concepts: 'pickled.npy' cannot be read"),
        (["pickle.npz"], "--concepts: 'pickle.npz' cannot be read"),
        (["two.npz"], "--key: 'two.npz' has a, b, and none of them was asked for"),
        (["two.npz", "--key", "c"], "--key: 'two.npz' has a, b, and c was asked for"),
        (["nan.safetensors"], "--key: the array of 'nan.safetensors' is not of finite"),
        (["zero.safetensors"], "--key: .* in 'zero.safetensors' has a direction that is zero"),
        (["odd.safetensors"], "--key: 'odd.safetensors' says that its directions are of method 'magic'"),
        (["cut.safetensors"], "--concepts: 'cut.safetensors' cannot be read"),
        (["text.csv"], "--concepts: "),
    ],
)
def test_command_refuses(
    options: list[str], message: str, inverter_folder: Path, picture: Path, capsys: Capture
) -> None:
    files()
    with pytest.raises(SystemExit):
        main(["steer", str(picture), "--model", str(inverter_folder), "--out", "out", "--concepts", *options])
    error = capsys.readouterr().err
    assert re.search(f"featinv-pl: error: {message}", error), error
    assert not Path("ran").exists()
    assert not Path("out").exists()
