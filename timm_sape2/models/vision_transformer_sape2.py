"""Models registered with timm: SaPE2 vision transformers, and the same transformer with other position encodings."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)

from .._names import close_names
from .._shipped import WEIGHTS, shipped
from ..positions import ENCODINGS
from .convert import checkpoint_filter_fn
from .equip import SOURCES, equip
from .vit import PositionVisionTransformer

LABELS = ('label_names', 'label_descriptions')
# What a name says of its weights holds neither for a model without weights nor for one with others.
WITHOUT_WEIGHTS = {'file': None, 'tag': 'untrained', **dict.fromkeys(LABELS)}
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


TINY = dict(embed_dim=192, depth=12, num_heads=3)
SMALL = dict(embed_dim=384, depth=12, num_heads=6)
BASE = dict(embed_dim=768, depth=12, num_heads=12)
LARGE = dict(embed_dim=1024, depth=24, num_heads=16)
COMPACT = dict(embed_dim=128, depth=6, num_heads=4, mlp_ratio=2.0)  # 0.82 M parameters, trains on a laptop

# the same transformer with each position encoding: name, arguments, configuration, description
COMPARED: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]], str]] = {
    'vit_small_pos_{}': (dict(patch_size=16, **SMALL), _cfg, 'ViT-S/16'),
    'vit_compact_pos_{}_patch4_32': (dict(patch_size=4, **COMPACT), _cfg_32, 'Compact ViT/4 at 32x32'),
    'vit_small_pos_{}_patch4_32': (dict(patch_size=4, **SMALL), _cfg_32, 'ViT-S/4 at 32x32'),
}


def _shipped_cfgs() -> dict[str, PretrainedCfg]:
    """What config.json says of the weights that come with the package, by model and tag."""
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    cfgs = {}
    for weights in sorted(shipped().glob(f'*/{WEIGHTS}')):
        config = json.loads(weights.with_name('config.json').read_text(encoding='utf-8'))
        said: dict[str, Any] = {key: value for key, value in config['pretrained_cfg'].items() if key in known}
        said |= {'label_names': config.get('label_names'), 'file': str(weights)}
        said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
        cfgs[weights.parent.name] = PretrainedCfg(**said)
    return cfgs


SHIPPED = _shipped_cfgs()

default_cfgs = generate_default_cfgs(
    {
        **SHIPPED,
        'vit_tiny_sape2.untrained': _cfg(),
        'vit_small_sape2.untrained': _cfg(),
        'vit_base_sape2.untrained': _cfg(),
        'vit_large_sape2.untrained': _cfg(),
        'vit_compact_sape2_patch4_32.untrained': _cfg_32(),
        'vit_tiny_sape2_patch4_32.untrained': _cfg_32(),
        'vit_small_sape2_patch4_32.untrained': _cfg_32(),
        'vit_equipped.untrained': _cfg(),
        'test_vit_sape2.untrained': _cfg(input_size=(3, 64, 64), crop_pct=0.95),
        **{f'{form.format(name)}.untrained': cfg() for form, (_, cfg, _) in COMPARED.items() for name in ENCODINGS},
    }
)


def check_has_weights(variant: str, pretrained_cfg: Any, overlay: Mapping[str, Any] | None) -> None:
    """Raise the RuntimeError that timm raises where there are no weights to load, but say where there are some."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(overlay or {}))
    if cfg.has_weights or cfg.state_dict:
        return
    there = [f"timm.create_model('{name}', pretrained=True)" for name in SHIPPED]
    raise RuntimeError(
        f"No pretrained weights exist for {variant}. 'hf-hub:OWNER/NAME' and 'local-dir:FOLDER' as names load some"
        + (f', and so do those that come with timm_sape2: {"; ".join(there)}.' if there else '.')
    )


def _create(
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PositionVisionTransformer:
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg)
    is_shipped = not cfg.source and cfg.file in {shipped_cfg.file for shipped_cfg in SHIPPED.values()}
    if is_shipped and (not pretrained or any(overlay.get(source) for source in SOURCES)):
        overlay = {**WITHOUT_WEIGHTS, **overlay}
    if pretrained:
        check_has_weights(variant, pretrained_cfg, overlay)
    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        PositionVisionTransformer,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
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
def test_vit_sape2(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
    """Tiny ViT with SaPE2 and learned absolute position embeddings, for tests."""
    model_args = dict(patch_size=16, embed_dim=64, depth=3, num_heads=2, position='learned+sape2')
    return _create('test_vit_sape2', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_equipped(
    pretrained: bool = False,
    base: str = 'vit_tiny_patch16_224',
    position: str = 'learned+sape2',
    position_args: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> PositionVisionTransformer:
    """Any plain vision transformer of timm, `base`, with another position encoding; see `timm_sape2.equip`.

    With `pretrained`, the weights are those that the configuration or its overlay names (a checkpoint of the base or of
    the equipped model), else those of the base.
    """
    architecture, _ = split_model_name_tag(base)
    if not is_model(architecture) or architecture == 'vit_equipped':
        close = close_names(architecture, list_models('*vit*', exclude_filters='vit_equipped'))
        raise ValueError(f'base={base!r} is not a vision transformer of timm{close}.')
    cfg = resolve_pretrained_cfg('vit_equipped', pretrained_cfg, pretrained_cfg_overlay)
    if cfg.tag == 'untrained':
        cfg = _cfg_of_base(base, cfg, pretrained)
    has_weights = bool(cfg.has_weights or cfg.state_dict)

    def build(**model_args: Any) -> PositionVisionTransformer:
        base_pretrained = pretrained and not has_weights
        model = timm.create_model(base, pretrained=base_pretrained, cache_dir=cache_dir, **model_args)
        return equip(model, position, position_args)

    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        build,
        'vit_equipped',
        pretrained and has_weights,
        pretrained_cfg=cfg.to_dict(),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        cache_dir=cache_dir,
        **kwargs,
    )


def _cfg_of_base(base: str, cfg: PretrainedCfg, pretrained: bool) -> PretrainedCfg:
    """The configuration of a base without its weights, and with what `cfg` has been told beyond its defaults."""
    default = dataclasses.asdict(get_pretrained_cfg('vit_equipped.untrained') or PretrainedCfg())
    told = {key: value for key, value in dataclasses.asdict(cfg).items() if value != default[key]}
    cfg_of_base = get_pretrained_cfg(base) or PretrainedCfg()
    of_weights = SOURCES if pretrained else (*SOURCES, *LABELS)
    without_weights = {key: getattr(PretrainedCfg(), key) for key in of_weights}
    return dataclasses.replace(cfg_of_base, **{**without_weights, 'tag': None, **told, 'architecture': 'vit_equipped'})


def _compared(name: str, position: str, model_args: Mapping[str, Any], description: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **kwargs: Any) -> PositionVisionTransformer:
        return _create(name, pretrained, **{**model_args, 'position': position, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'{description} with position={position!r}, for comparisons.'
    return create


for _form, (_args, _, _description) in COMPARED.items():
    for _position in ENCODINGS:
        _name = _form.format(_position)
        globals()[_name] = register_model(_compared(_name, _position, _args, _description))
