"""The panels as a saved view of wandb. This is the only file that imports wandb's workspace library.

Choice: the library is optional (requirements-dashboard.txt), because only the command ``dashboard`` needs it. The view
shows the runs of one group; pushed again, the same view is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lr2train.config import UserError
from lr2train.training.panels import PICTURES, SECTIONS, TABLES, Panel

_GPUS, _WIDTH, _HEIGHT, _PER_ROW = 8, 8, 6, 3  # the grid of wandb is 24 cells wide
_SYSTEM = (
    Panel("GPU utilization, percent", tuple(f"system/gpu.{number}.gpu" for number in range(_GPUS))),
    Panel("GPU memory, percent", tuple(f"system/gpu.{number}.memoryAllocated" for number in range(_GPUS))),
    Panel("CPU utilization, percent", ("system/cpu",)),
    Panel("Memory of the machine, percent", ("system/memory_percent",)),
)


def library() -> tuple[Any, Any]:
    """(workspaces, reports) of wandb's library.

    Raises:
        UserError: the library is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(
            f"dashboard needs wandb-workspaces, which cannot be imported ({error}); run `pip install -r "
            "requirements-dashboard.txt`"
        ) from error
    return workspaces, reports


def view_of(entity: str, project: str, group: str) -> Any:
    """The workspace that shows a group: sections of panels, then pictures, then the machine.

    Raises:
        UserError: the library is not installed.
    """
    workspaces, reports = library()
    contents = {name: SECTIONS.get(name, ()) for name in (*SECTIONS, *PICTURES)} | {"Machine": _SYSTEM}
    sections = [
        workspaces.Section(name=name, is_open=name != "Machine", panels=_panels(reports, name, panels))
        for name, panels in contents.items()
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"lr2train {group}",
        sections=sections,
        runset_settings=workspaces.RunsetSettings(filters=f"Metric('Group') == {group!r}"),
    )


def push(view: Any, url: str | None) -> str:
    """Save the view, in the place of the one at ``url`` where that exists; returns its address.

    Raises:
        Exception: wandb's own, where the network or the account refuses.
    """
    workspaces, _ = library()
    if url is not None:
        try:
            old = workspaces.Workspace.from_url(url)
            view._internal_name, view._internal_id = old._internal_name, old._internal_id
        except Exception:  # it was deleted, or lies in another project
            pass
    return view.save().url


def _panels(reports: Any, section: str, plots: tuple[Panel, ...]) -> list[Any]:
    """Curves, then pictures, then tables, side by side in rows."""
    made: list[Callable[[Any], Any]] = [
        lambda layout, one=one: reports.LinePlot(
            title=one.title, x="Step", y=list(one.keys), log_y=one.log_y or None, layout=layout
        )
        for one in plots
    ]
    if pictures := PICTURES.get(section):
        title = f"Pictures of the {section.lower()}"
        made.append(lambda layout: reports.MediaBrowser(title=title, media_keys=list(pictures), layout=layout))
    for table in TABLES.get(section, ()):
        made.append(lambda layout, table=table: reports.WeavePanelSummaryTable(table_name=table, layout=layout))
    return [make(_place(reports, number)) for number, make in enumerate(made)]


def _place(reports: Any, number: int) -> Any:
    column, row = number % _PER_ROW, number // _PER_ROW
    return reports.Layout(x=column * _WIDTH, y=row * _HEIGHT, w=_WIDTH, h=_HEIGHT)
