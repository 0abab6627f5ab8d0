"""Learned absolute position embeddings."""

from .base import PositionEncoding


class LearnedPosition(PositionEncoding):
    """Learned absolute embeddings, `x_i + e_i` before the first block (arXiv 2010.11929, equation 1).

    The (P + N) * C parameters are timm's own `pos_embed`, (1, P + N, C), which keeps its name and place so that
    checkpoints of plain timm vision transformers fit. Prefix tokens have entries of their own (none, and N * C
    parameters, with `no_embed_class=True`). At another grid the patch entries are resampled bicubically with
    antialiasing, by `set_input_size`, on loading, and in every forward with `dynamic_img_size=True`; prefix entries
    stay as they are.
    """

    kind = 'learned'
    translation = 'absolute'
    other_grids = 'resampled'

    has_learned_embedding = True
