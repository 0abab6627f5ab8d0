"""The position encodings side by side: what they state of themselves, and what they cost."""

from typing import NamedTuple

import timm

from .._table import text_table
from ..positions import all_encodings, facts
from .flops import count_flops, count_parameters

REFERENCE = 'vit_small_pos_nope'


class EncodingRow(NamedTuple):
    """A position encoding, or several that are joined."""

    position: str
    """Its name, as `position=` takes it."""

    kind: str
    """'learned', 'fixed', or 'none' for no encoding."""

    translation: str
    """What moving content does to its features, see `PositionEncoding.translation`."""

    other_grids: str
    """What becomes of its parameters on another grid: 'as it is' or 'resampled'."""

    parameters: int
    """Parameters that it adds to vit_small at 224x224 with patches of 16."""

    flops: int
    """FLOPs that it adds there for one image, 2 for a multiply-accumulate."""


class EncodingTable(list[EncodingRow]):
    """A list of rows that shows itself as a table."""

    def __repr__(self) -> str:
        rows = [('position', 'kind', 'translation', 'another grid', 'parameters', 'MFLOPs')]
        rows += [(*row[:4], f'{row.parameters:,}', f'{row.flops / 1e6:.3g}') for row in self]
        return text_table(rows)


def encodings() -> EncodingTable:
    """Return the table of all position encodings and of the models' default, two together.

    This is what `timm-sape2 list --encodings` prints.

    Example:
        >>> [row.position for row in timm_sape2.encodings() if row.parameters == 0]
        ['nope', 'sincos', 'rope', 'alibi', 'lookhere']
    """
    base_parameters, base_flops = measure_cost('nope')
    table = EncodingTable()
    for position in [*all_encodings(), 'learned+sape2']:
        parameters, flops = measure_cost(position)
        table.append(EncodingRow(position, *facts(position), parameters - base_parameters, flops - base_flops))
    return table


def measure_cost(position: str) -> tuple[int, int]:
    """Return the parameters of the reference model and its FLOPs for one image."""
    model = timm.create_model(REFERENCE, position=position, device='meta').eval()
    return count_parameters(model), count_flops(model)
