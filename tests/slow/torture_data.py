"""Interrupts and damages everything that shards go through, and counts what that does: `make torture-data`.

Kills are SIGKILLs of the public command in processes of its own, at random moments of its work.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.__main__ import main
from featinv_pl.data.feature_shards import FeatureShards
from featinv_pl.data.manifests import MANIFEST, index_path
from featinv_pl.errors import UserError
from featinv_pl.pretraining import Autoencoder, Classifier, NoisePredictor

HERE = Path(__file__).parent
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
STEPS = 60
PATIENCE_S = 120
SHARDS, SEEN = "shards/**/*", "seen-*.jsonl"  # what extraction and streaming write


@dataclass
class Figure:
    """One line of the table: what was done how often, and what went wrong."""

    what: str
    done: int
    wrong: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.what:60} {self.done:5} {self.wrong:6}  {self.note}"


class Recorder(Callback):
    """Appends a line for each batch: the step, the rank and the keys."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer, trainer.global_step, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._write(trainer, batch_idx, batch)

    def _write(self, trainer: Trainer, step: int, batch: Any) -> None:
        line = json.dumps([step, trainer.global_rank, batch["key"]]) + "\n"
        with Path(f"seen-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(line)


def make_networks(folder: Path) -> None:
    """A classifier and a prior, tiny and untrained."""
    torch.manual_seed(1)
    Classifier("test_resnet", 10, 32, {"output_stride": 8, "channels": [8, 8, 8, 8]}).save_pretrained(folder / "net")
    blocks = 4
    autoencoder = {
        "block_out_channels": [4, 4, 4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    Autoencoder(autoencoder).save_pretrained(folder / "autoencoder")
    unet = {
        "sample_size": 4,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    NoisePredictor(str(folder / "autoencoder"), unet).save_pretrained(folder / "prior")
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": "run",
    }
    extract = {
        "num_threads": 1,
        "trainer": {
            **trainer,
            "callbacks": [{"class_path": "ShardWriter", "init_args": {"folder": "shards", "shard_size": 64}}],
        },
        "model": {
            "class_path": "FeatureExtraction",
            "init_args": {"backbone": "net", "autoencoder": "prior/vae", "image_size": 32},
        },
        "data": {"class_path": "DigitsData", "init_args": {"sources": ["val", "train"], "batch_size": 8}},
    }
    checkpoint = {"dirpath": "run", "filename": "inversion", "enable_version_counter": False, "every_n_train_steps": 1}
    fit = {
        "seed_everything": 0,
        "num_threads": 1,
        "trainer": {
            **trainer,
            "max_steps": STEPS,
            "limit_val_batches": 0,
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": checkpoint},
                {"class_path": "torture_data.Recorder"},
            ],
        },
        "model": {
            "class_path": "FeatureInversion",
            "init_args": {
                "backbone": "net",
                "prior": "prior",
                "image_size": 32,
                "hidden_channels": 8,
                "sampler": {"steps": 1},
            },
        },
        "data": {
            "class_path": "FeatureShards",
            "init_args": {"train": "shards/train", "val": "shards/val", "batch_size": 16},
        },
    }
    for name, settings in {"extract": extract, "fit": fit}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def start(args: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start the public command in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    environment["FEATINV_IMPORTS"] = "torture_data"
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "featinv_pl", *args],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def work(folder: Path, where: str) -> set[tuple[str, int, int]]:
    """What shows whether a command has begun to write: names, times and sizes of files."""
    stats = ((path, path.stat()) for path in folder.glob(where) if path.is_file())
    return {(str(path), stat.st_mtime_ns, stat.st_size) for path, stat in stats}


def begin(args: list[str], folder: Path, where: str) -> subprocess.Popen[bytes]:
    """Start the public command and wait until it has begun to write."""
    before = work(folder, where)
    process = start(args, folder)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and work(folder, where) == before and time.monotonic() < deadline:
        time.sleep(0.002)
    return process


def finish(args: list[str], folder: Path, where: str = "*") -> float:
    """Run the public command to its end, and return the seconds from its first write on."""
    process = begin(args, folder, where)
    begun = time.monotonic()
    if process.wait(PATIENCE_S) != 0:
        raise RuntimeError(f"{args} failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    return time.monotonic() - begun


def killed(args: list[str], folder: Path, where: str, after: float) -> bool:
    """Run the public command and kill it so many seconds after its first write, unless it ends before."""
    process = begin(args, folder, where)
    try:
        if process.wait(after) != 0:
            raise RuntimeError(f"{args} failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def moment(more: bool, seconds: float, rng: random.Random) -> float:
    """When to kill, in seconds from the first write; past any end once there were enough kills."""
    return rng.uniform(0, 1) * seconds if more else PATIENCE_S


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, locks apart."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def workplace(root: Path, name: str) -> Path:
    """A folder with the networks and the configurations."""
    folder = root / name
    folder.mkdir()
    for path in (root / "networks").iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def alone_of(kills: int) -> int:
    """How many of the kills are of one process; the others are of two."""
    return round(kills * 0.7)


def torture_extraction(root: Path, kills: int, rng: random.Random) -> list[Figure]:
    """Kill extraction again and again until it is done; compare with one that nobody has killed."""
    reference = workplace(root, "extraction")
    command = ["predict", "--config", "extract.yaml"]
    seconds = finish(command, reference, SHARDS)
    expected = contents(reference / "shards")
    figures, alone = [], alone_of(kills)
    for what, more, count in (("1 process", [], alone), ("2 processes", TWO, kills - alone)):
        if not count:
            continue
        wrong = done = rounds = partly = 0
        while done < count:
            folder = workplace(root, f"killed-{len(more)}-{rounds}")
            rounds += 1
            while killed([*command, *more], folder, SHARDS, moment(done < count, seconds, rng)):
                done += 1
                partly += 0 < len(contents(folder / "shards")) < len(expected)
            wrong += contents(folder / "shards") != expected
            shutil.rmtree(folder)
        figures.append(
            Figure(f"kills of extraction, {what}", done, wrong, f"{partly} of them left some shards; {rounds} sets")
        )
    return figures


def lines(folder: Path, ranks: int) -> dict[tuple[int, int], list[list[str]]]:
    """The keys that each rank saw at each step, once for each time that it was taken."""
    seen: dict[tuple[int, int], list[list[str]]] = {}
    for rank in range(ranks):
        for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the kill came within the line
                step, _, keys = json.loads(line)
                seen.setdefault((step, rank), []).append(keys)
    return seen


def weights(folder: Path) -> str:
    """Digest of what was trained."""
    state = torch.load(folder / "run/inversion.ckpt", weights_only=True)["state_dict"]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def torture_streaming(root: Path, kills: int, rng: random.Random) -> list[Figure]:
    """Kill training again and again; every step must see what it sees in a run that nobody has killed."""
    figures, alone = [], alone_of(kills)
    for ranks, more, count in ((1, ["--data.num_workers=1"], alone), (2, TWO, kills - alone)):
        if not count:
            continue
        command = ["fit", "--config", "fit.yaml", *more]
        reference = workplace(root, f"streaming-{ranks}")
        (reference / "shards").symlink_to(root / "extraction/shards")
        seconds = finish(command, reference, SEEN)
        expected = {key: keys[-1] for key, keys in lines(reference, ranks).items()}
        lost = twice = done = rounds = resumed = 0
        while done < count:
            folder = workplace(root, f"streaming-{ranks}-{rounds}")
            (folder / "shards").symlink_to(root / "extraction/shards")
            rounds += 1
            while True:
                checkpoint = folder / "run/inversion.ckpt"
                resume = ["--ckpt_path", "run/inversion.ckpt"] if checkpoint.is_file() else []
                if not killed([*command, *resume], folder, SEEN, moment(done < count, seconds, rng)):
                    break
                done += 1
                resumed += bool(resume)
            seen = lines(folder, ranks)
            lost += sum(key not in seen for key in expected)
            twice += sum(any(keys != expected.get(key) for keys in taken) for key, taken in seen.items())
            lost += weights(folder) != weights(reference)
            shutil.rmtree(folder)
        figures.append(
            Figure(
                f"kills of streaming, {ranks} process{'es' * (ranks > 1)}",
                done,
                lost + twice,
                f"{resumed} resumed ones; same samples at all {STEPS} steps and same weights in {rounds} runs",
            )
        )
    return figures


def compare_ranks(root: Path) -> list[Figure]:
    """One process and two must see the same samples."""
    folder = workplace(root, "ranks")
    finish(["predict", "--config", "extract.yaml", *TWO], folder)
    differ = contents(folder / "shards") != contents(root / "extraction/shards")
    seen: list[list[str]] = []
    layouts = [(1, 0), (1, 3), (2, 0), (2, 3)]
    for ranks, workers in layouts:
        for path in folder.glob("seen-*"):
            path.unlink()
        more = [f"--data.num_workers={workers}", "--trainer.limit_val_batches=1.0", *(TWO if ranks == 2 else [])]
        finish(["validate", "--config", "fit.yaml", *more], folder)
        seen.append(sorted(key for taken in lines(folder, ranks).values() for keys in taken for key in keys))
    unlike = sum(keys != seen[0] or len(set(keys)) != len(keys) for keys in seen)
    return [
        Figure("sets extracted by 1 and by 2 processes", 2, int(differ), "byte for byte"),
        Figure("evaluations by 1 and 2 processes, 0 and 3 workers", len(layouts), unlike, "each sample exactly once"),
    ]


# Damage


def flip(path: Path, rng: random.Random) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    """Cut the end off."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero_block(path: Path, rng: random.Random) -> None:
    """What a disk that lost a block returns."""
    data = bytearray(path.read_bytes())
    used = [start for start in range(0, len(data) - 511, 512) if any(data[start : start + 512])]
    begin = rng.choice(used or [0])
    data[begin : begin + 512] = bytes(512)
    path.write_bytes(data)


def remove_block(path: Path, rng: random.Random) -> None:
    """Take a block out, so that all that follows lies elsewhere."""
    data = path.read_bytes()
    begin = rng.randrange(0, len(data), 512)
    path.write_bytes(data[:begin] + data[begin + 512 :])


def remove_file(path: Path, rng: random.Random) -> None:
    """As if it had never been copied."""
    path.unlink()


def append(path: Path, rng: random.Random) -> None:
    """Something behind the end."""
    path.write_bytes(path.read_bytes() + rng.randbytes(512))


def garbage(path: Path, rng: random.Random) -> None:
    """Other bytes of the same number."""
    path.write_bytes(rng.randbytes(path.stat().st_size))


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip,
    flip,
    flip,
    truncate,
    zero_block,
    remove_block,
    remove_file,
    append,
    garbage,
)


class HangError(BaseException):
    """Not an Exception, so that nothing takes it for damage."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise where something hangs."""

    def stop(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def torture_shards(root: Path, mutations: int, rng: random.Random) -> list[Figure]:
    """Damage one file of a set at a time; `verify` must say so, and reading must never give other values."""
    original = root / "extraction/shards/val"
    expected = read(original)
    undetected = wrong = hanging = tracebacks = refused = 0
    for number in range(mutations):
        folder = root / "mutated"
        shutil.copytree(original, folder)
        shard = rng.choice(sorted(folder.glob("*.tar")))
        path = rng.choice([shard, shard, shard, index_path(shard), folder / MANIFEST])
        before = contents(folder)
        while contents(folder) == before:
            DAMAGES[number % len(DAMAGES)](path, rng)
        try:
            with time_limit(20):
                undetected += verified(folder)
                try:
                    wrong += read(folder) != expected
                except UserError:
                    refused += 1
        except HangError:
            hanging += 1
        except Exception as error:
            print(f"{path.name}: {DAMAGES[number % len(DAMAGES)].__name__}: {error!r}")
            tracebacks += 1
        shutil.rmtree(folder)
    return [
        Figure("mutated sets: not noticed by `verify`", mutations, undetected),
        Figure("mutated sets: other values read", mutations, wrong, f"{refused} refused, the rest read unharmed"),
        Figure("mutated sets: hanging", mutations, hanging),
        Figure("mutated sets: tracebacks", mutations, tracebacks),
    ]


def verified(folder: Path) -> bool:
    """Whether the public command finds nothing wrong."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(["verify", str(folder)])
        except SystemExit as stop:
            return stop.code == 0
    return True


def read(folder: Path) -> list[str]:
    """Digests of all batches, as evaluation reads them, and of the provenance that goes with them."""
    data = FeatureShards(val=folder, batch_size=16)
    (loader,) = data.val_dataloader()
    values = [
        hashlib.sha256(
            b"".join(batch[name].numpy().tobytes() for name in ("images", "features", "logits", "latents", "labels"))
            + json.dumps(batch["key"]).encode()
        ).hexdigest()
        for batch in loader
    ]
    return [*values, json.dumps(data.manifests[str(folder)]["provenance"])]


def torture(kills: int, mutations: int, seed: int = 0) -> list[Figure]:
    """Do all of it, so many times."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "networks").mkdir()
        make_networks(root / "networks")
        return [
            *torture_extraction(root, kills, rng),
            *torture_streaming(root, kills, rng),
            *compare_ranks(root),
            *torture_shards(root, mutations, rng),
        ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of extraction, and as many of streaming")
    parser.add_argument("--mutations", type=int, default=200)
    options = parser.parse_args()
    figures = torture(options.kills, options.mutations)
    print(f"{'':60} {'times':>5} {'wrong':>6}")
    print("\n".join(map(str, figures)))
    sys.exit(any(figure.wrong for figure in figures))
