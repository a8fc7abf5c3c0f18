"""How a run meets Weights & Biases: online or offline, under which name, and with nothing private.

All of it goes to the client as environment variables, which processes that start later see too. Those that are set
already win, and so do arguments of the WandbLogger.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from signal import SIGINT, SIGTERM
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from featinv_pl.errors import UserError
from featinv_pl.runtime.stopping import Stopped

log = logging.getLogger(__name__)
ROUTE = ("base_url", "http_proxy", "https_proxy", "x_proxies", "insecure_disable_ssl")  # settings of the client
PRIVATE = {
    "WANDB_X_DISABLE_META": "true",  # user, command line, and paths of program and interpreter
    "WANDB_PROGRAM": "featinv-pl",  # which would be its path
    "WANDB_CONSOLE": "off",  # warnings of libraries name the folder that they are installed in
}


@contextmanager
def session() -> Iterator[None]:
    """Ends the run that a command has begun, as failed if an error ends the command, and leaves no variables behind."""
    before = _variables()
    code = 1
    try:
        yield
        code = 0
    except SIGTERMException as error:  # Lightning would exit with 0, as if the work were done
        code = 128 + (error.signal if isinstance(error, Stopped) else SIGTERM)
        sys.exit(code)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else code
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning would exit with 1, as if something were wrong
            code = 128 + SIGINT
        sys.exit(code)
    finally:
        if "wandb" in sys.modules:  # it is imported once the configuration is known to be right
            import wandb

            if wandb.run is not None and wandb.run.offline and "WANDB_SILENT" not in before:
                log.info("Logged offline. Upload: wandb sync %s", os.path.relpath(wandb.run.settings.sync_dir))
            wandb.finish(code)  # the next command of this process gets a run of its own,
            wandb.teardown(code)  # and its own variables
        for name in _variables():
            del os.environ[name]
        os.environ.update(before)


def sweep_run() -> str | None:
    """The id of this run, if an agent has started it."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


def check_route(logger: Any) -> None:
    """Refuse a WandbLogger's configuration that decides where the user's key is sent."""
    for place, value in logger.items():
        name = place.rpartition(".")[2]
        if isinstance(value, dict):
            check_route(value)
        elif name in ROUTE and value and os.environ.get(variable := f"WANDB_{name.upper()}") != str(value):
            raise UserError(
                f"`trainer.logger`: its settings send your W&B key by {name} '{value}', which only your environment "
                f"may decide. If you trust it, set {variable}={value}."
            )


@rank_zero_only
def describe(job: str, group: str, tags: Sequence[str], offline: bool, run_id: str | None) -> None:
    """Tell the client, before the run begins, what it would have to guess or to ask.

    The job is a command of Lightning, the group what belongs together, such as training and tests of one inverter;
    `offline` is what the configuration says, and `run_id` the run to continue, if any.
    """
    import wandb

    # LightningCLI overwrites the logger's own `resume="allow"` by nothing.
    told = {**PRIVATE, "WANDB_RESUME": "allow", "WANDB_JOB_TYPE": job, "WANDB_TAGS": ",".join(tags)}
    if not sweep_run():  # there the server names and groups
        told |= {"WANDB_RUN_GROUP": group, "WANDB_NAME": f"{group} {job}"}
    if run_id is not None:
        told["WANDB_RUN_ID"] = run_id
    if offline:
        os.environ["WANDB_MODE"] = "offline"
    if offline or not _has_key():
        told |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}  # one line at the end says all that the client would
    for name, value in told.items():
        os.environ.setdefault(name, value)
    wandb.teardown()  # it has read the variables as they were
    wandb.setup()


def _has_key() -> bool:
    """Whether the client would find a key, if it needs one, in the environment or in a netrc, without asking for it."""
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import authenticate_session

    settings = wandb.setup().settings
    if settings.mode != "online":
        return True  # the user's choice, which the client knows
    url = settings.base_url
    try:
        if authenticate_session(host=url, source="featinv-pl", prompt=False, update_session=False) is not None:
            return True
    except AuthenticationError as error:
        raise UserError(f"W&B: {error} Run `wandb login`, or correct the key.") from error
    if "WANDB_MODE" in os.environ:
        raise UserError(
            f"WANDB_MODE is online, but there is no key for {url}. Run `wandb login`, set WANDB_API_KEY, or leave "
            "WANDB_MODE out to log offline."
        )
    if "WANDB_SILENT" not in os.environ:
        log.info("W&B: there is no key (`wandb login` stores one), so the run is logged offline.")
    return False


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
