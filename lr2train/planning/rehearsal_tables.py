"""A rehearsal as tables on a terminal; ``rehearsal.json`` holds the same figures unrounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lr2train.planning.tables import amount, console, flops
from lr2train.planning.timeline import KINDS

_SHOWN = 8  # lines that hold the peak


def show(result: dict[str, Any]) -> None:
    """Print the result of ``rehearse`` to stdout."""
    out = console()
    out.print(_head(result))
    out.print(_phases(result["memory"]))
    out.print(_verdict(result["memory"]))
    out.print(_holders(result["memory"]))
    out.print(_traffic(result["traffic"]))
    out.print(_work(result["work"]))
    out.print(_looks(result["looks"]))
    out.print(_times(result["time"]))
    out.print(_bound(result))
    if result["settings"]:
        out.print(_settings(result))
        for one in result["settings"]:
            if one["refused"]:
                out.print(f"  - {one['setting']} is refused: {one['refused']}", markup=False)
    out.print("[bold]assumptions[/bold]")
    for line in result["assumptions"]:
        out.print(f"  - {line}", markup=False)


def _table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _head(result: dict[str, Any]) -> str:
    model, mesh = result["model"], result["parallel"]
    served = ", ".join(f"{window}: {title}" for window, title in mesh["strategies"].items())
    return (
        f"[bold]{model['name']}[/bold], {amount(model['parameters'])} parameters in {model['layers']} layers; "
        f"rank 0 of {mesh['gpus']} = dp {mesh['dp']} x sp {mesh['sp']}, ZeRO-{mesh['zero_stage']}; "
        f"attention by {mesh['kernel']} ({served}). {mesh['recompute']}.\n"
    )


def _phases(memory: dict[str, Any]) -> Table:
    table = _table("peak memory of each phase, GiB", ("phase",), (*KINDS, "total"))
    for one in memory["phases"]:
        name = f"{one['phase']} {one['micro_batch']}".strip()
        table.add_row(name, *(f"{one[kind]:.2f}" for kind in KINDS), f"[bold]{one['gib']:.2f}[/bold]")
    return table


def _verdict(memory: dict[str, Any]) -> str:
    at = memory["at"]
    where = f"{at['module'] or 'outside the model'}, {at['line']}"
    host = (
        f" Host memory for the offloaded states: {memory['host_gib_per_node']:.1f} GiB a node."
        if memory["host_gib_per_node"]
        else ""
    )
    fits = "[bold green]fits[/bold green]" if memory["fits"] else "[bold red]does not fit[/bold red]"
    article = "the" if at["micro_batch"] == "first" else "a"
    when = (
        f"the {at['phase']} of {article} {at['micro_batch']} micro-batch" if at["micro_batch"] else f"the {at['phase']}"
    )
    return (
        f"peak [bold]{memory['peak_gib']:.2f} GiB[/bold] in {when}: {where}, where {at['gib']:.2f} GiB are allocated\n"
        f"{memory['total_gib']:.2f} GiB with {memory['runtime_gib']:g} of CUDA, NCCL and cuBLAS: {fits} in "
        f"{memory['gpu_gib']:g} GiB, of which a tenth stays free.{host}\n"
    )


def _holders(memory: dict[str, Any]) -> Table:
    table = _table("lines that hold the peak", ("kind", "line", "module"), ("tensors", "GiB"))
    for one in memory["holders"][:_SHOWN]:
        table.add_row(one["kind"], one["line"], one["module"], str(one["tensors"]), f"{one['gib']:.2f}")
    return table


def _traffic(traffic: list[dict[str, Any]]) -> Table:
    title = "sent by the rank for one micro-batch, recomputation included, GiB"
    table = _table(title, ("micro-batch", "by", "collectives"), ("inside the node", "between nodes"))
    for one in traffic:
        links = one["inside_node_gib"], one["between_nodes_gib"]
        if one["micro_batch"] != "first" and sum(links) >= 0.0005:
            sizes = (f"{gib:.3f}" if gib else "0" for gib in links)
            table.add_row(one["micro_batch"] or "update", one["by"], ", ".join(one["collectives"]), *sizes)
    return table


def _work(work: list[dict[str, Any]]) -> Table:
    classes = list(dict.fromkeys(name for one in work for name in one["flops"]))
    title = "FLOPs of one micro-batch and calls of attention's kernel, recomputation included"
    table = _table(title, ("micro-batch",), (*classes, "forward calls", "again", "backward"))
    for one in work:
        counts = (flops(one["flops"].get(name, 0.0)) for name in classes)
        table.add_row(one["micro_batch"], *counts, *(str(n) for n in one["kernel_calls"].values()))
    return table


def _looks(looks: list[dict[str, Any]]) -> str:
    inside = sum(one["times"] for one in looks if one["phase"] in ("forward", "backward"))
    after = sum(one["times"] for one in looks if one["phase"] == "update")
    lines = "".join(f"\n  - {one['line']} ({one['phase']}): {one['times']}" for one in looks)
    return (
        f"the host waits for the device {inside} times in forward and backward passes, and {after} times at the update"
        f"{lines}\n"
    )


def _times(times: list[dict[str, Any]]) -> Table:
    names = ("s a step, at least", "without overlap", "tokens/s/GPU", "MFU at most")
    table = _table("bounds of the time, by kind of GPU", ("GPU",), names)
    for one in times:
        figures = (
            f"{one['step_s']:.3g}",
            f"{one['step_without_overlap_s']:.3g}",
            f"{one['tokens_per_s_per_gpu']:,.0f}",
        )
        table.add_row(one["gpu"], *figures, f"{one['mfu_at_most']:.0%}")
    return table


def _bound(result: dict[str, Any]) -> Table:
    mine = next(one for one in result["time"] if one["gpu"] == result["gpu"])
    classes = list(dict.fromkeys(name for part in mine["parts"] for name in part["compute_s"]))
    table = _table(
        f"where the time goes on {mine['gpu']}, ms",
        ("part",),
        ("in a step", *classes, "memory-bound", "links", "total"),
    )
    for part in mine["parts"]:
        compute = (f"{1e3 * part['compute_s'].get(name, 0.0):,.1f}" for name in classes)
        links = sum(link["seconds"] for link in part["links"])
        figures = (f"{1e3 * x:,.1f}" for x in (part["memory_bound_s"], links, part["seconds"]))
        table.add_row(part["micro_batch"] or "update", f"{part['in_a_step']:g}", *compute, *figures)
    return table


def _settings(result: dict[str, Any]) -> Table:
    title = f"settings, estimated from few layers: against the config as it is, {result['gpu']}"
    table = _table(title, ("setting",), ("peak GiB", "change", "s a step", "change"))
    for one in result["settings"]:
        if one["refused"]:
            table.add_row(one["setting"], *["-"] * 4)
            continue
        table.add_row(
            one["setting"],
            f"{one['peak_gib']:.2f}",
            f"{one['peak_change_gib']:+.2f}",
            f"{one['step_s']:.3g}",
            f"{one['step_change']:+.1%}",
        )
    return table
