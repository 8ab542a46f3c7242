"""The plan on the console."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.console import Console
from rich.table import Table

from otl.formats.files import size
from otl.wording import printable

WORST = 10  # files shown of each warning; plan.json has all
MEGA, GIGA = 1e6, 1e9


def show(plan: dict[str, Any], console: Console | None = None, *, told: Collection[str] = ()) -> None:
    """Print tables of images, weights and memory, and the warnings.

    Args:
        told: messages that are left out, because they are said elsewhere.
    """
    console = console or Console()
    console.print(
        f"[bold]{plan['family']}[/] from {plan['checkpoint']}, {plan['method']}, {plan['precision']}, "
        f"{', '.join(map(str, plan['resolutions'])) + ' px' if plan['resolutions'] else 'given buckets'}, "
        f"batches of {plan['batch_size']}" + (f" on each of {plan['ranks']} ranks" if plan["ranks"] > 1 else "")
    )
    console.print(buckets(plan))
    if len(plan["concepts"]) > 1 or plan["images_waiting"]:
        console.print(concepts(plan))
    console.print(
        f"{plan['images_used']} of {plan['images_total']} images in the first epoch, "
        + (f"{plan['images_waiting']} in later ones, " if plan["images_waiting"] else "")
        + (f"{plan['images_to_draw']} of all still to be drawn, " if plan["images_to_draw"] else "")
        + f"{plan['images_dropped']} dropped, {plan['images_validation']} held out, "
        f"{plan['images_cached']} to be cached; "
        f"{plan['steps_per_epoch']} steps an epoch, [bold]{plan['total_steps']} steps in all[/]"
    )
    if plan["captions"]["cached"]:
        console.print(f"{plan['captions']['distinct']} texts to encode, each once")
    if plan["inpaint"]:
        masks = plan["inpaint"]
        console.print(f"masks: {masks['masks']}; {masks['files']} of {masks['images']} images have a mask file")
    console.print(weights(plan))
    console.print(memory(plan))
    needs = plan["disk"]
    console.print(
        f"On the disk {size(needs['total'])} (an estimate): {needs['checkpoints']} checkpoints of "
        f"{size(needs['checkpoint'])}, {needs['results']} x {size(needs['result'])} of results, "
        f"{needs['drawings']} x {size(needs['drawing'])} of pictures, {size(needs['cache'])} of cache"
        + (f", {size(needs['class_images'])} of class images" if needs["class_images"] else ""),
        highlight=False,
    )
    for warning in plan["warnings"]:
        if warning["message"] in told:
            continue
        console.print(f"[yellow]{warning['about']}[/]: {warning['message']}", highlight=False)
        for file in warning["files"][:WORST]:
            console.print(f"  {printable(file)}", highlight=False, markup=False)
        if len(warning["files"]) > WORST:
            console.print(f"  and {len(warning['files']) - WORST} more, in plan.json")


def buckets(plan: dict[str, Any]) -> Table:
    table = Table("bucket (height x width)", "images", "batches", title="Images", title_justify="left")
    for bucket in plan["buckets"]:
        table.add_row(f"{bucket['height']} x {bucket['width']}", str(bucket["images"]), str(bucket["batches"]))
    return table


def concepts(plan: dict[str, Any]) -> Table:
    columns = ["concept", "type", "images", "seen an epoch", "share", "loss weight"]
    table = Table(*columns, title="Concepts", title_justify="left")
    for row in plan["concepts"]:
        seen = [f"{row['seen']:g}", f"{row['share']:.1%}", f"{row['loss_weight']:g}"]
        table.add_row(row["name"], row["type"], str(row["images"]), *seen)
    return table


def weights(plan: dict[str, Any]) -> Table:
    """Of each part; in millions, so that no number is cut off where a line has 80 characters."""
    columns = ["part", "dtype", "millions", "GB", "trained", "added", "added, MB"]
    title = "Weights of the checkpoint, and what the method adds; parameters in millions"
    table = Table(*columns, title=title, title_justify="left")
    for row in plan["weights"]:
        own, trained, added = (f"{row[name] / MEGA:,.3f}" for name in ("parameters", "trained", "added"))
        gigabytes, megabytes = f"{row['bytes'] / GIGA:.2f}", f"{row['added_bytes'] / MEGA:.1f}"
        table.add_row(row["part"], row["dtype"], own, gigabytes, trained, added, megabytes)
    return table


def memory(plan: dict[str, Any]) -> Table:
    needs = plan["memory"]
    kinds = ["weights", "gradients", "optimizer", "activations", "total"]
    table = Table(*kinds, title="Memory of a step, GB (an estimate)", title_justify="left")
    table.add_row(*[f"{needs[kind] / GIGA:.2f}" for kind in kinds])
    return table
