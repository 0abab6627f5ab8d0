"""Learned absolute position embeddings."""

from .base import PositionEncoding


class LearnedPosition(PositionEncoding):
    """Learned absolute embeddings, `x_i + e_i` before the first block (arXiv 2010.11929, equation 1).

    The parameter is timm's own `pos_embed`, (1, P + N, C), which keeps its name and place so that checkpoints of plain
    timm vision transformers fit. Prefix tokens have entries of their own (none with `no_embed_class=True`). At another
    grid the patch entries are resampled bicubically with antialiasing; prefix entries stay as they are.
    """

    has_learned_embedding = True
