"""LightningCLI with our models and data: a constructor's signature is its configuration."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.plugins.io import TorchCheckpointIO

# Imported so that a configuration can name these classes without their path.
import featinv_pl.data.images.datamodule
import featinv_pl.data.images.digits
import featinv_pl.data.shards.datamodule
import featinv_pl.evaluation.callback
import featinv_pl.runtime.averaging
import featinv_pl.tasks.extraction
import featinv_pl.tasks.inversion
import featinv_pl.tasks.pretraining
import featinv_pl.tasks.shard_writer  # noqa: F401
from featinv_pl.commands import COMMANDS
from featinv_pl.config import MODE, ConfigParser
from featinv_pl.data.workers import workers_explained
from featinv_pl.errors import UserError, options_spelled
from featinv_pl.evaluation.callback import BATCHES
from featinv_pl.mistakes import paths_explained
from featinv_pl.nets.weights import read_checkpoint
from featinv_pl.options import ended
from featinv_pl.runtime.changes import Changes
from featinv_pl.runtime.checkpoints import AtomicCheckpoints, BackgroundCheckpoints, find_checkpoint
from featinv_pl.runtime.finite import FiniteGuard
from featinv_pl.runtime.internals import CommandLine, drop_deprecated, savers, silence_tips, uploads
from featinv_pl.runtime.progress import Progress, Speed
from featinv_pl.runtime.ranks import join_ranks, ranks_together
from featinv_pl.runtime.resuming import RUN_ID, Resume
from featinv_pl.runtime.saving import MODEL, SaveConfig, claim, home, refuse_used, written_folders
from featinv_pl.runtime.stopping import SaveLast, Stop
from featinv_pl.runtime.tracking import check_route, describe, session, sweep_run
from featinv_pl.trust import allow_imports

SHELF = Path("runs")  # the folder of all runs, which names no group of them
EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # frozen networks stay so on purpose
    r".*does not have many workers",  # small data sets are read faster by the main process
    r"The number of training batches",  # epochs of small data sets are shorter than the logging interval
    r"Total length of `\w+` across ranks is zero",  # an extraction that lacked nothing but its manifest
    r"You're resuming from a checkpoint that ended before the epoch",  # which our data modules do exactly
    r"Checkpoint directory .* exists and is not empty",  # where it matters, the run is refused
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own use of torch
    r"(?s).*(JsonargparseDeprecationWarning|deprecated in v4\.49\.0)",  # Lightning's own use of jsonargparse
)


class FeatinvCLI(CommandLine):
    """Lightning's commands, with one progress line and checkpoints that are there."""

    run_id: str | None = None
    """The run at W&B that a checkpoint continues."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self.entered:  # what lasts as long as the command, such as claims on folders
            spelled = options_spelled(self._options)
            for explained in (paths_explained(), spelled, ranks_together(), workers_explained()):
                self.entered.enter_context(explained)
            try:
                super().__init__(*args, **kwargs)
            except MisconfigurationException as error:  # such as for a GPU that is not there
                raise UserError(f"`trainer`: {' '.join(str(error).split())}") from error

    @property
    def settings(self) -> Any:
        """The options of the command."""
        return self.config[self.config.subcommand]

    def _options(self) -> Iterator[str]:
        return _options_of(self.settings) if hasattr(self, "config") else iter(())  # before the line is parsed

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse a checkpoint that cannot be read, before Lightning tries to."""
        self.config = parser.parse_args(cast(list[str], args))
        settings, training = self.settings, self.config.subcommand == "fit"
        if settings.trainer.overfit_batches:
            raise UserError(
                "`overfit_batches`: each epoch takes other batches here, so it would not take the same few. Extract a "
                "small set (predict with --trainer.limit_predict_batches=N) and train on that."
            )
        if (run := sweep_run()) is not None:  # runs of a sweep must not overwrite each other
            settings.trainer.default_root_dir = str(Path(settings.trainer.default_root_dir or SHELF) / run)
        given = settings.get("ckpt_path")
        if given is None or given == "hpc":  # which Lightning finds where SLURM's plugin has left it
            return
        path = find_checkpoint(given, lambda: _checkpoint_places(settings.trainer))
        if path is None and not (training and given == "last"):
            raise UserError(f"`ckpt_path` {given}: there is no checkpoint yet. Run fit first, or give a file.")
        # `last` continues after every interruption; the first time there is nothing to continue from.
        settings.ckpt_path = None if path is None else str(path)
        if training and path is not None:
            self.run_id = read_checkpoint(path, "`ckpt_path`", map_location="meta").get(RUN_ID)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to the process rather than to a class."""
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of the networks. One is best for tiny networks, whose threads mostly wait for each "
            "other, and gives the same figures on every machine; null leaves the choice to torch.",
        )
        parser.add_argument(
            "--dry_run",
            "--plan",
            action="store_true",
            help="Of predict and test: print the hours that it takes, after a short trial, and write nothing.",
        )

    def before_instantiate_classes(self) -> None:
        """Settings of the process, and what only a command line can decide."""
        self.given = self.config.clone()
        settings, trainer = self.settings, self.settings.trainer
        join_ranks()
        if settings.dry_run:
            self._dry_run()
        if self.subcommand == "predict" and self.config.predict.return_predictions is None:
            # Lightning would keep every prediction until the end: all of ImageNet's features, in memory.
            self.config.predict.return_predictions = False
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        callbacks: list[Callback] = [Speed(), Resume(), Changes(settings.seed_everything)]
        if trainer.enable_progress_bar is not False:
            callbacks.append(Progress())
        if self.subcommand != "fit" or not _named(trainer.callbacks, "FiniteGuard"):
            callbacks.append(FiniteGuard())
        # Last: it saves what the others have made of the weights.
        self.trainer_defaults["callbacks"] = [*callbacks, Stop()]
        self._track()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a trainer that cannot lose what it has saved, unless a plugin says how to save."""
        self.config = self.given  # what is saved: in another folder it must not name this one
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # such as for devices that are not a number
            raise UserError(f"`trainer`: {' '.join(str(error).split())}") from error
        drop_deprecated(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpoints() if uploads(trainer) else BackgroundCheckpoints()
        cast(Any, trainer).callbacks.insert(0, SaveLast())  # first: before MovingAverage replaces the weights
        for saver in savers(trainer):
            if saver.dirpath is None:
                saver.dirpath = os.path.abspath(home(trainer))
        self._enter(trainer)
        return trainer

    def _enter(self, trainer: Trainer) -> None:
        """Claim the run's folder before anything is written there."""
        settings = self.settings
        if trainer.is_global_zero and not settings.dry_run:
            for folder in written_folders(trainer, self.datamodule, str(self.subcommand)):
                self.entered.enter_context(claim(folder))
        if self.subcommand == "fit" and not settings.trainer.fast_dev_run:  # which saves nothing
            refuse_used(trainer, settings.ckpt_path)

    def outcome(self) -> tuple[str, str] | None:
        """Where the results of the command are, and the command that follows, for the first process to tell."""
        settings, trainer, command = self.settings, self.trainer, str(self.subcommand)
        if not trainer.is_global_zero or settings.dry_run or settings.trainer.fast_dev_run:
            return None
        root, kind = home(trainer), type(self.model).__name__
        made = {type(one).__name__: one for one in cast(Any, trainer).callbacks}
        if command == "predict" and "ShardWriter" in made:
            folder = made["ShardWriter"].given or root  # in spawned processes alone it has one
            return f"{folder}", f"featinv-pl verify {folder}"
        if command == "test" and "Evaluation" in made:
            pictured = made["Evaluation"].num_images > 0
            above = os.path.relpath(root.absolute().parent)
            return f"{root}", f"featinv-pl report {above}" if pictured else f"featinv-pl export {root} OUT"
        if command == "validate" and "Evaluation" in made:
            test = f"featinv-pl test --config {root}/fit.yaml --ckpt_path {settings.ckpt_path or 'last'}"
            return f"{made['Evaluation'].root}", test
        if command != "fit":
            return None
        saved = [path for one in savers(trainer) if (path := one.best_model_path or one.last_model_path)]
        if kind == "FeatureInversion" and saved:
            path = os.path.relpath(saved[0])
            return f"{root} (checkpoint {path})", f"featinv-pl test --config {root}/fit.yaml --ckpt_path {path}"
        if "SavePretrained" in made:
            folder = made["SavePretrained"].folder or root / MODEL
            used = {
                "Classifier": "predict --config FILE --model.backbone",
                "NoisePredictor": "fit --config FILE --model.prior",
            }
            return f"{folder}", f"featinv-pl {used.get(kind, 'fit --config FILE --model.autoencoder')}={folder}"
        return f"{root}", f"featinv-pl validate --config {root}/fit.yaml --ckpt_path=last"

    def _track(self) -> None:
        """Prepare what W&B needs to know before the run begins."""
        trainer, model = self.settings.trainer, self.settings.model
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        for logger in _named(loggers, "WandbLogger"):
            check_route(logger)
            folder = home(trainer)
            if logger.init_args.save_dir == ".":  # the client's default
                logger.init_args.save_dir = str(folder)
            group = folder.relative_to(SHELF) if folder.is_relative_to(SHELF) else folder.absolute().name
            tags = [model.class_path.rpartition(".")[2], model.init_args.get("conditioning")]
            offline = logger.init_args.offline
            describe(str(self.subcommand), str(group), [tag for tag in tags if tag], offline, self.run_id)

    def _dry_run(self) -> None:
        """Let an extraction or a test do nothing but estimate itself."""
        trainer, command = self.settings.trainer, str(self.subcommand)
        found = _named(trainer.callbacks, {"predict": "ShardWriter", "test": "Evaluation"}.get(command, "none"))
        if not found:
            raise UserError(
                "`dry_run`: only test with an Evaluation, and predict with a ShardWriter, among `trainer.callbacks` "
                "can be estimated."
            )
        for one in found:
            one.init_args.dry_run = True
        if command == "test":
            trainer.callbacks, trainer.limit_test_batches = found, BATCHES
        trainer.logger, self.save_config_callback = False, None


def _named(objects: Any, name: str) -> list[Any]:
    """Those of a class, of objects (or a single one) as they are configured."""
    several = objects if isinstance(objects, list) else [objects]
    return [one for one in several if getattr(one, "class_path", "").endswith(f".{name}")]


def _options_of(settings: Any, prefix: str = "--") -> Iterator[str]:
    """The options that settings are given by; those of a list are of its classes."""
    for one in settings if isinstance(settings, list) else [settings]:
        given = vars(one) if isinstance(one, Namespace) else one if isinstance(one, dict) else {}
        for name, value in given.items():
            if name == "init_args":
                yield from _options_of(value, prefix)
            elif name != "class_path":
                yield f"{prefix}{name}"
                yield from _options_of(value, f"{prefix}{name}.")


def _checkpoint_places(trainer: Any) -> set[Path]:
    """The folders in which a configuration keeps its checkpoints."""
    folders = [saver.init_args.dirpath for saver in _named(trainer.callbacks, "ModelCheckpoint")]
    return {home(trainer), *(Path(folder) for folder in folders if folder)}


def _described(name: str) -> dict[str, str]:
    """The help of a command: a line of usage instead of a page, and an example."""
    command = COMMANDS[name]
    return {
        "description": f"{command.does[0].upper()}{command.does[1:]}.",
        "usage": f"featinv-pl {name} [--config FILE]... [--OPTION=VALUE]...",
        "epilog": f"--model.help=NAME explains the options of a class. Example: {command.example}",
    }


def train(args: list[str]) -> None:
    """Run one of Lightning's commands, given without the program's name."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    silence_tips()
    # Trades precision of float32 products for speed on GPUs with tensor cores, as Lightning recommends.
    torch.set_float32_matmul_precision("high")
    allow_imports()
    with session():
        cli = copy_context().run(  # jsonargparse leaves the parser in a context variable, and with it model and trainer
            FeatinvCLI,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            parser_class=ConfigParser,
            parser_kwargs={
                "parser_mode": MODE,
                "prog": "featinv-pl",
                **{one: _described(one) for one in args[:1] if one in COMMANDS},
            },
        )
        found = cli.outcome()
    if found:
        ended(*found)
