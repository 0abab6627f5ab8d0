"""The table of `timm-sape2 list --encodings`: what encodings state of themselves, and what they cost."""

import timm

from ..models.flops import count_flops, count_parameters
from ..positions import ENCODINGS, facts
from .table import print_table

REFERENCE = 'vit_small_pos_nope'


def show_encodings() -> None:
    """Print a table of all position encodings and of the models' default, two together."""
    rows = [('position', 'kind', 'translation', 'another grid', 'parameters', 'MFLOPs')]
    base_parameters, base_flops = measure_cost('nope')
    for position in [*ENCODINGS, 'learned+sape2']:
        parameters, flops = measure_cost(position)
        rows.append(
            (
                position,
                *facts(position),
                f'{parameters - base_parameters:,}',
                f'{(flops - base_flops) / 1e6:.3g}',
            )
        )
    print_table(rows)


def measure_cost(position: str) -> tuple[int, int]:
    """Return the parameters of the reference model and its FLOPs for one image."""
    model = timm.create_model(REFERENCE, position=position, device='meta').eval()
    return count_parameters(model), count_flops(model)
