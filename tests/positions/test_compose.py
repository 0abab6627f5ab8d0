"""Names and options of encodings."""

import itertools

import pytest
import torch

from timm_sape2.positions import ENCODINGS, HostShape, Positions, parse_position, valid_options

PAIRS = [
    ('learned', 'sincos'),
    ('learned', 'cpe'),
    ('learned', 'rope'),
    ('learned', 'relbias'),
    ('learned', 'sape2'),
    ('sincos', 'axial_cope'),
    ('cpe', 'rope_mixed'),
    ('cpe', 'alibi'),
    ('cpe', 'shaw'),
    ('rope', 'liere'),
    ('rope', 'sape2'),
    ('rope', 'shaw'),
    ('relbias', 'cope'),
    ('lookhere', 'axial_cope'),
    ('fire', 'shaw'),
    ('shaw', 'axial_cope'),
    ('pape', 'sape2'),
]
HOST = HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1)


def test_names_are_joined_by_plus_and_keep_their_order():
    assert parse_position('sape2+learned', {'sape2': {'target': 'q'}}) == {'sape2': {'target': 'q'}, 'learned': {}}


def test_options_are_the_keyword_arguments_of_the_encoding():
    assert valid_options('sape2') == [
        'target',
        'gating',
        'gate_source',
        'axes',
        'num_positions',
        'distance',
        'distance_scale',
        'recompute',
        'initial_std',
    ]
    assert valid_options('learned') == []


def test_an_encoding_is_built_where_its_hooks_are_called():
    options = parse_position('learned+sape2')
    assert list(Positions(options, HOST._replace(block=0))) == ['sape2']
    assert list(Positions(options, HOST)) == []


@pytest.mark.parametrize(
    ('position', 'position_args', 'message'),
    [
        ('sape3', None, "Unknown position encoding 'sape3'.*Valid names.*nope, learned, .*, sape2"),
        ('learned+', None, "Unknown position encoding ''"),
        ('', None, "Unknown position encoding ''"),
        (None, None, 'position must be a string'),
        ('sape2+sape2', None, 'names an encoding twice'),
        ('nope+sape2', None, 'combines "nope"'),
        ('learned', {'sape2': {}}, "options for 'sape2', but position is 'learned'"),
        ('sape2', {'sape2': {'targets': 'q'}}, "Unknown option 'targets'.*Valid options: target, gating"),
        ('learned', {'learned': {'std': 1}}, "Unknown option 'std'.*Valid options: none"),
        ('sape2', {'sape2': {'device': 'cpu'}}, "Unknown option 'device'"),
        ('sape2', {'sape2': 'q'}, 'must be a mapping'),
        ('sape2', 'target=q', 'position_args must be a mapping'),
    ],
)
def test_bad_names_and_options(position, position_args, message):
    with pytest.raises(ValueError, match=message):
        parse_position(position, position_args)


def test_pairs_are_of_all_encodings_and_of_all_hooks_that_results_meet_in():
    hooks = ('add_to_tokens', 'mix_tokens', 'rotate', 'attention_bias', 'logit_channels')

    def acts_in(name: str) -> set[str]:
        learned = {'add_to_tokens'} if ENCODINGS[name].has_learned_embedding else set()  # by timm
        return learned | {hook for hook in hooks if ENCODINGS[name].overrides(hook)}

    met = {frozenset(both) for pair in PAIRS for both in itertools.product(*map(acts_in, pair))}
    of_one_encoding = {frozenset({'mix_tokens'})}
    assert met >= {frozenset(both) for both in itertools.product(hooks, hooks)} - of_one_encoding
    assert {name for pair in PAIRS for name in pair} == set(ENCODINGS) - {'nope'}


@pytest.mark.parametrize('pair', PAIRS, ids='+'.join)
def test_any_two_encodings_go_together(tiny_vit, pair):
    model, images = tiny_vit('+'.join(pair), reg_tokens=2, global_pool='avg'), torch.randn(2, 3, 56, 72)
    model(images).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    reversed_order = tiny_vit('+'.join(pair[::-1]), reg_tokens=2, global_pool='avg')
    reversed_order.load_state_dict(model.state_dict())
    torch.testing.assert_close(reversed_order(images), model(images))
    for name in pair:
        alone = tiny_vit(name, reg_tokens=2, global_pool='avg')
        alone.load_state_dict({key: value for key, value in model.state_dict().items() if key in alone.state_dict()})
        assert (alone(images) - model(images)).abs().max() > 1e-4


@pytest.mark.parametrize('name', ENCODINGS)
def test_state_dict_depends_on_the_image_size_only_where_it_is_resampled(tiny_vit, name):
    def shapes_at(size):
        return {key: value.shape for key, value in tiny_vit(name, img_size=size).state_dict().items()}

    shapes = shapes_at((56, 72))
    for size in ((72, 56), (8, 40), (112, 112)):
        others = shapes_at(size)
        differing = {key for key in shapes if shapes[key] != others[key]}
        assert shapes.keys() == others.keys()
        expected = {
            'learned': {'pos_embed'} if size != (72, 56) else set(),
            'relbias': {f'blocks.{i}.attn.position.relbias.bias_table' for i in range(2)},
        }
        assert differing == expected.get(name, set())


@pytest.mark.parametrize('name', ENCODINGS)
def test_every_encoding_says_what_a_user_asks(name):
    documentation = ENCODINGS[name].__doc__
    assert 'refix tokens' in documentation
    assert 'grid' in documentation
    assert 'parameter' in documentation
