"""Every private timm name that this package needs, in one place."""

from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._input import get_pretrained_grid_size as get_pretrained_grid_size
