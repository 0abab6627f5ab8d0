"""Every private timm name that this package needs, in one place."""

from timm.layers.pos_embed_sincos import init_random_2d_freqs as init_random_2d_freqs
from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._hub import save_config_for_hf as save_config_for_hf
