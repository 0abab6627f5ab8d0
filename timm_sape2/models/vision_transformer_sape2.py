"""Models registered with timm: SaPE2 vision transformers, and the same transformer with other position encodings."""

from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from .convert import checkpoint_filter_fn
from .vit import PositionVisionTransformer

HUB_CONFIGS = Path(__file__).parents[2] / 'hub_configs'  # in a checkout
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


def _cfg_32(**kwargs: Any) -> dict[str, Any]:
    return _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, mean=CIFAR_MEAN, std=CIFAR_STD, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        'vit_tiny_sape2.untrained': _cfg(),
        'vit_small_sape2.untrained': _cfg(),
        'vit_base_sape2.untrained': _cfg(),
        'vit_large_sape2.untrained': _cfg(),
        'vit_compact_sape2_patch4_32.untrained': _cfg_32(),
        'vit_tiny_sape2_patch4_32.untrained': _cfg_32(),
        'vit_small_sape2_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_nope.untrained': _cfg(),
        'vit_small_pos_learned.untrained': _cfg(),
        'vit_small_pos_sincos.untrained': _cfg(),
        'vit_small_pos_relbias.untrained': _cfg(),
        'vit_small_pos_cpe.untrained': _cfg(),
        'vit_small_pos_rope.untrained': _cfg(),
        'vit_small_pos_rope_mixed.untrained': _cfg(),
        'vit_small_pos_cope.untrained': _cfg(),
        'vit_small_pos_sape2.untrained': _cfg(),
        'vit_compact_pos_nope_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_learned_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_sincos_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_relbias_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_cpe_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_rope_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_rope_mixed_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_cope_patch4_32.untrained': _cfg_32(),
        'vit_compact_pos_sape2_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_nope_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_learned_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_sincos_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_relbias_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_cpe_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_rope_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_rope_mixed_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_cope_patch4_32.untrained': _cfg_32(),
        'vit_small_pos_sape2_patch4_32.untrained': _cfg_32(),
        'test_vit_sape2.untrained': _cfg(input_size=(3, 64, 64), crop_pct=0.95),
    }
)

TINY = dict(embed_dim=192, depth=12, num_heads=3)
SMALL = dict(embed_dim=384, depth=12, num_heads=6)
BASE = dict(embed_dim=768, depth=12, num_heads=12)
LARGE = dict(embed_dim=1024, depth=24, num_heads=16)
COMPACT = dict(embed_dim=128, depth=6, num_heads=4, mlp_ratio=2.0)  # 0.82 M parameters, trains on a laptop


def check_has_weights(variant: str, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> None:
    """Raise the RuntimeError that timm raises where there are no weights to load, but say where there are some."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if cfg.has_weights or cfg.state_dict:
        return
    folders = [file.parent for file in sorted(HUB_CONFIGS.glob('*/model.safetensors'))]
    there = [f"timm.create_model('local-dir:{folder}', pretrained=True)" for folder in folders]
    raise RuntimeError(
        f"No pretrained weights exist for {variant}. 'hf-hub:OWNER/NAME' and 'local-dir:FOLDER' as names load some"
        + (f', such as those that ship here: {"; ".join(there)}.' if there else '.')
    )


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PositionVisionTransformer:
    if pretrained:
        check_has_weights(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        PositionVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


@register_model
def vit_tiny_sape2(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-Ti/16 with SaPE2 and learned absolute position embeddings (arXiv 2505.09466)."""
    model_args = dict(patch_size=16, position='learned+sape2', **TINY)
    return _create('vit_tiny_sape2', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_sape2(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with SaPE2 and learned absolute position embeddings (arXiv 2505.09466)."""
    model_args = dict(patch_size=16, position='learned+sape2', **SMALL)
    return _create('vit_small_sape2', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_sape2(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-B/16 with SaPE2 and learned absolute position embeddings (arXiv 2505.09466)."""
    model_args = dict(patch_size=16, position='learned+sape2', **BASE)
    return _create('vit_base_sape2', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_large_sape2(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-L/16 with SaPE2 and learned absolute position embeddings (arXiv 2505.09466)."""
    model_args = dict(patch_size=16, position='learned+sape2', **LARGE)
    return _create('vit_large_sape2', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_sape2_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with SaPE2 and learned absolute position embeddings (arXiv 2505.09466)."""
    model_args = dict(patch_size=4, position='learned+sape2', **COMPACT)
    return _create('vit_compact_sape2_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_tiny_sape2_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-Ti/4 at 32x32 with SaPE2 and learned absolute position embeddings (arXiv 2505.09466)."""
    model_args = dict(patch_size=4, position='learned+sape2', **TINY)
    return _create('vit_tiny_sape2_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_sape2_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with SaPE2 and learned absolute position embeddings (arXiv 2505.09466)."""
    model_args = dict(patch_size=4, position='learned+sape2', **SMALL)
    return _create('vit_small_sape2_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_nope(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 without position encoding."""
    model_args = dict(patch_size=16, position='nope', **SMALL)
    return _create('vit_small_pos_nope', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_learned(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with learned absolute position embeddings."""
    model_args = dict(patch_size=16, position='learned', **SMALL)
    return _create('vit_small_pos_learned', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_sincos(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with fixed sinusoidal position embeddings."""
    model_args = dict(patch_size=16, position='sincos', **SMALL)
    return _create('vit_small_pos_sincos', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_relbias(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with relative position bias."""
    model_args = dict(patch_size=16, position='relbias', **SMALL)
    return _create('vit_small_pos_relbias', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_cpe(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with conditional position encoding."""
    model_args = dict(patch_size=16, position='cpe', **SMALL)
    return _create('vit_small_pos_cpe', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_rope(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with axial rotary position encoding."""
    model_args = dict(patch_size=16, position='rope', **SMALL)
    return _create('vit_small_pos_rope', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_rope_mixed(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with mixed rotary position encoding."""
    model_args = dict(patch_size=16, position='rope_mixed', **SMALL)
    return _create('vit_small_pos_rope_mixed', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_cope(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with contextual position encoding (CoPE)."""
    model_args = dict(patch_size=16, position='cope', **SMALL)
    return _create('vit_small_pos_cope', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_sape2(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/16 with SaPE2 alone."""
    model_args = dict(patch_size=16, position='sape2', **SMALL)
    return _create('vit_small_pos_sape2', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_nope_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 without position encoding."""
    model_args = dict(patch_size=4, position='nope', **COMPACT)
    return _create('vit_compact_pos_nope_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_learned_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with learned absolute position embeddings."""
    model_args = dict(patch_size=4, position='learned', **COMPACT)
    return _create('vit_compact_pos_learned_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_sincos_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with fixed sinusoidal position embeddings."""
    model_args = dict(patch_size=4, position='sincos', **COMPACT)
    return _create('vit_compact_pos_sincos_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_relbias_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with relative position bias."""
    model_args = dict(patch_size=4, position='relbias', **COMPACT)
    return _create('vit_compact_pos_relbias_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_cpe_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with conditional position encoding."""
    model_args = dict(patch_size=4, position='cpe', **COMPACT)
    return _create('vit_compact_pos_cpe_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_rope_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with axial rotary position encoding."""
    model_args = dict(patch_size=4, position='rope', **COMPACT)
    return _create('vit_compact_pos_rope_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_rope_mixed_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with mixed rotary position encoding."""
    model_args = dict(patch_size=4, position='rope_mixed', **COMPACT)
    return _create('vit_compact_pos_rope_mixed_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_cope_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with contextual position encoding (CoPE)."""
    model_args = dict(patch_size=4, position='cope', **COMPACT)
    return _create('vit_compact_pos_cope_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_compact_pos_sape2_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Compact ViT/4 at 32x32 with SaPE2 alone."""
    model_args = dict(patch_size=4, position='sape2', **COMPACT)
    return _create('vit_compact_pos_sape2_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_nope_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 without position encoding."""
    model_args = dict(patch_size=4, position='nope', **SMALL)
    return _create('vit_small_pos_nope_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_learned_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with learned absolute position embeddings."""
    model_args = dict(patch_size=4, position='learned', **SMALL)
    return _create('vit_small_pos_learned_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_sincos_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with fixed sinusoidal position embeddings."""
    model_args = dict(patch_size=4, position='sincos', **SMALL)
    return _create('vit_small_pos_sincos_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_relbias_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with relative position bias."""
    model_args = dict(patch_size=4, position='relbias', **SMALL)
    return _create('vit_small_pos_relbias_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_cpe_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with conditional position encoding."""
    model_args = dict(patch_size=4, position='cpe', **SMALL)
    return _create('vit_small_pos_cpe_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_rope_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with axial rotary position encoding."""
    model_args = dict(patch_size=4, position='rope', **SMALL)
    return _create('vit_small_pos_rope_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_rope_mixed_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with mixed rotary position encoding."""
    model_args = dict(patch_size=4, position='rope_mixed', **SMALL)
    return _create('vit_small_pos_rope_mixed_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_cope_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with contextual position encoding (CoPE)."""
    model_args = dict(patch_size=4, position='cope', **SMALL)
    return _create('vit_small_pos_cope_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_pos_sape2_patch4_32(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """ViT-S/4 at 32x32 with SaPE2 alone."""
    model_args = dict(patch_size=4, position='sape2', **SMALL)
    return _create('vit_small_pos_sape2_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def test_vit_sape2(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Tiny ViT with SaPE2 and learned absolute position embeddings, for tests."""
    model_args = dict(patch_size=16, embed_dim=64, depth=3, num_heads=2, position='learned+sape2')
    return _create('test_vit_sape2', pretrained, **dict(model_args, **kwargs))
