"""What encodings state of themselves is found by experiment, with random models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from timm_sape2.models.vit import PositionVisionTransformer
from timm_sape2.positions import ENCODINGS, PositionEncoding, facts

CANVAS = (7, 9)
CONTENT = (3, 4)
TINY: dict[str, Any] = dict(
    patch_size=1, embed_dim=32, depth=2, num_heads=2, num_classes=0, class_token=False, global_pool='avg'
)
TRANSLATION = {
    'nope': 'none',
    'learned': 'absolute',
    'sincos': 'absolute',
    'relbias': 'relative',
    'cpe': 'relative inside',
    'rope': 'relative',
    'rope_mixed': 'relative',
    'liere': 'absolute',
    'alibi': 'relative',
    'lookhere': 'relative',
    'fire': 'relative',
    'pape': 'relative',
    'shaw': 'relative inside',
    'cope': 'content-based',
    'axial_cope': 'content-based',
    'sape2': 'content-based',
    'learned+sape2': 'absolute',
    'learned+rope': 'absolute',
    'relbias+rope': 'relative',
    'rope+cpe': 'relative inside',
    'rope+sape2': 'content-based',
}


def add_encoding(monkeypatch, place, **hooks):
    members = hooks | {'__init__': initialise, 'place': place}
    monkeypatch.setitem(ENCODINGS, 'toy', type('Toy', (PositionEncoding,), members))


def initialise(self, host, *, device=None, dtype=None):
    PositionEncoding.__init__(self)


def is_independent_of_grid(position: str) -> bool:
    """Tell whether a state dict has the same shapes for two image sizes."""
    models = [PositionVisionTransformer(grid, position=position, **TINY) for grid in ((7, 9), (14, 14))]
    first, second = ({name: value.shape for name, value in model.state_dict().items()} for model in models)
    return first == second


@torch.no_grad()
def describe_translation(position: str) -> str:
    """Find out what moving content does to its features, with a random model in float64.

    There is no class token. Patches of content lie on an otherwise empty canvas that no token attends to, clear of its
    border. 'none': patches in another order keep their features. 'relative': they keep them when all are moved alike.
    'content-based': they do not, and another colour of the canvas changes them too, so positions come from what lies
    around. 'absolute': they do not, and the canvas is of no account, or the features of an image of one colour tell
    places apart. An encoding that is relative, yet tells places apart in an image of one colour, does so at the border
    and is 'relative inside'.

    Args:
        position: Names of encodings joined by '+'.

    Returns:
        One of the words above.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = random_model(position)
        content = torch.randn(1, 3, *CONTENT, dtype=torch.float64)
        order = torch.randperm(content[0, 0].numel())
    shuffled = content.flatten(2)[:, :, order].reshape(content.shape)
    features = features_at(model, content, (1, 1))
    if are_equal(features_at(model, shuffled, (1, 1)), features[:, order]):
        return 'none'
    is_relative = are_equal(features_at(model, content, (3, 4)), features)
    plain = model.forward_features(torch.ones(1, 3, *CANVAS, dtype=torch.float64))
    tells_places = not are_equal(plain, plain[:, :1].expand_as(plain))
    if is_relative:
        return 'relative inside' if tells_places else 'relative'
    sees_canvas = not are_equal(features_at(model, content, (1, 1), canvas=1.0), features)
    return 'content-based' if sees_canvas and not tells_places else 'absolute'


def random_model(position: str) -> PositionVisionTransformer:
    """Create a small model of single pixels as patches, with large random weights so that positions matter."""
    model = PositionVisionTransformer(CANVAS, position=position, dtype=torch.float64, **TINY).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Tell whether features are equal up to rounding (of positions in float32); they differ by 0.1 and more if not."""
    return torch.allclose(first, second, rtol=0, atol=1e-4)


def features_at(
    model: PositionVisionTransformer, content: Tensor, place: tuple[int, int], canvas: float = 0.0
) -> Tensor:
    """Return the features (1, N, C) of content (1, 3, H, W) at a place on the canvas; the rest is not attended to."""
    rows, columns = (slice(start, start + size) for start, size in zip(place, content.shape[2:], strict=True))
    image = content.new_full((1, 3, *CANVAS), canvas)
    image[:, :, rows, columns] = content
    is_content = torch.zeros(CANVAS, dtype=torch.bool)
    is_content[rows, columns] = True
    is_content = is_content.flatten()
    return model.forward_features(image, attn_mask=is_content.expand(1, 1, len(is_content), -1))[:, is_content]


class TestTranslation:
    @pytest.mark.parametrize(('position', 'expected'), TRANSLATION.items())
    def test_is_what_the_equations_say(self, position, expected):
        assert describe_translation(position) == expected == facts(position)[1]

    def test_no_encoding_is_left_out(self):
        assert set(ENCODINGS) <= set(TRANSLATION)

    def test_the_row_of_a_patch_is_absolute(self, monkeypatch):
        def add_row(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
            return tokens + torch.arange(grid[0]).repeat_interleave(grid[1])[:, None]

        add_encoding(monkeypatch, 'model', add_to_tokens=add_row)
        assert describe_translation('toy') == 'absolute'

    def test_the_distance_of_rows_is_relative(self, monkeypatch):
        def penalty(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared=None) -> Tensor:
            row = torch.arange(grid[0]).repeat_interleave(grid[1])
            return -(row[:, None] - row).abs().to(query.dtype)

        add_encoding(monkeypatch, 'block', attention_bias=penalty)
        assert describe_translation('toy') == 'relative'

    def test_attention_to_like_patches_knows_no_positions(self, monkeypatch):
        def likeness(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared=None) -> Tensor:
            return query @ query.transpose(2, 3)

        add_encoding(monkeypatch, 'block', attention_bias=likeness)
        assert describe_translation('toy') == 'none'

    def test_random_numbers_of_the_caller_are_left_alone(self):
        state = torch.get_rng_state()
        describe_translation('sape2')
        assert torch.equal(torch.get_rng_state(), state)


def test_only_learned_embeddings_and_relative_bias_depend_on_the_grid():
    assert {name for name in ENCODINGS if not is_independent_of_grid(name)} == {'learned', 'relbias'}
    assert {name for name in ENCODINGS if facts(name)[2] == 'resampled'} == {'learned', 'relbias'}
    assert facts('rope+relbias')[2] == 'resampled'


@pytest.mark.parametrize('name', ENCODINGS)
def test_learned_encodings_have_parameters(name):
    counts = [
        sum(p.numel() for p in PositionVisionTransformer(CANVAS, position=position, **TINY).parameters())
        for position in ('nope', name)
    ]
    assert (counts[1] > counts[0]) == (ENCODINGS[name].kind == 'learned')
    assert (ENCODINGS[name].kind == 'none') == (name == 'nope')
