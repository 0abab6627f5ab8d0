"""The seam between a study and what runs it."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit: TypeAlias = dict[str, Any]
Row: TypeAlias = dict[str, Any]


class Study(ABC):
    """Units of work, each of which gives rows of one table, and a report of that table.

    A unit is a mapping of factors to plain values, such as `{'encoding': 'rope', 'seed': 0}`. Units do not depend on
    one another, so several processes can share them, and one that is finished is never done again. All that the units
    have in common, and that must be the same when a study is resumed, is the `configuration`.

    The constructor checks everything that it can, before any work, and raises a ValueError for what is wrong.

    Args:
        arguments: The study's own arguments, parsed.
        flags: The rest of the command line, flags of train.py.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str]
    examples: ClassVar[str]
    takes_flags: ClassVar[bool] = True
    """Flags that the study does not know are those of train.py."""

    one_process: ClassVar[bool] = False
    """The units must not run beside each other, as for measurements of time."""

    configuration: dict[str, Any]
    units: list[Unit]

    @abstractmethod
    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None: ...

    @staticmethod
    @abstractmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the study's own arguments to its parser."""

    @abstractmethod
    def run(self, unit: Unit, folder: Path) -> list[Row]:
        """Do the work of a unit.

        Args:
            unit: One of `units`.
            folder: Folder of the study, for files such as checkpoints.

        Returns:
            Rows of the table, of plain values and with the factors of the unit in them.
        """

    @abstractmethod
    def report(self, rows: list[Row]) -> str:
        """Return the results as Markdown, from the rows of all units that are finished."""

    @staticmethod
    @abstractmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        """Return figures by name, from the rows and the configuration that the files of a study have."""
