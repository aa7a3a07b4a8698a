"""A progress bar on stderr, so that stdout holds results only."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.console
import rich.progress

Item = TypeVar("Item")


def track(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """The items, with a bar of how many of `total` are done and how long the rest takes."""
    columns = (
        rich.progress.TextColumn("{task.description:<28}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        for item in items:
            yield item
            progress.advance(task)
