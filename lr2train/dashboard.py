"""dashboard: push the panels of lr2train to wandb, as a saved view of a run's project.

    lr2train dashboard run=first
    lr2train dashboard run=first logger.entity=my-team

The view shows search, training and evaluation of the run's group (``logger.group``) side by side: losses of both
windows, speed, memory, the search's generations, pictures, tables and the machine. Pushed again, the view is replaced.
Needs the network, a login and requirements-dashboard.txt. TensorBoard needs no command: its files hold the same panels
(tab Custom Scalars).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lr2train import io, progress, ranks
from lr2train.cli.door import main
from lr2train.config import Config, UserError
from lr2train.training import wandb_view
from lr2train.training.wandb_sink import default_entity, identity_file

_VERBS = ("train", "search", "evaluate")
_KEPT = "dashboard.json"


def dashboard(config: Config) -> str:
    """Run the verb; returns the address of the view.

    Raises:
        UserError: several ranks were started; the run was not recorded on wandb; the library is missing; or wandb
            refuses.
    """
    ranks.refuse_ranks("dashboard")
    folder = _folder(config)
    told = _recorded(folder)
    wandb_view.library()
    kept = folder / _KEPT
    try:
        entity = config.logger.entity or told["entity"] or default_entity()
        view = wandb_view.view_of(entity, told["project"], config.logger.group or told["group"])
        url = wandb_view.push(view, io.read_json(kept)["url"] if kept.exists() else None)
    except UserError:
        raise
    except Exception as error:  # of wandb: no network, no login, no permission
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the view of run={config.run} cannot be saved on wandb ({reason}); run `wandb login`, or name another "
            "logger.entity"
        ) from error
    io.write_json(kept, {"url": url, "project": told["project"], "group": told["group"]})
    progress.say("dashboard", url)
    return url


def _folder(config: Config) -> Path:
    if not config.run:
        raise UserError("run is empty; set run=<name of a run that was started with logger=wandb>")
    return Path(config.runs_folder) / config.run


def _recorded(folder: Path) -> dict[str, Any]:
    """Where a run is on wandb, as its first verb that was recorded tells."""
    for verb in _VERBS:
        if (file := identity_file(folder, verb)).exists():
            return io.read_json(file)
    raise UserError(f"{folder} has no run on wandb; start its training, search or evaluation with logger=wandb")


if __name__ == "__main__":
    main("dashboard", dashboard)
