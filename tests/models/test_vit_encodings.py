"""The host takes encodings that it has never heard of, here two that use every hook."""

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from timm_sape2.positions import ENCODINGS, HostShape, PositionEncoding

CALLS = []


class Toy(PositionEncoding):
    """What both toys share: two ramps, a scale, and a note of every call."""

    def __init__(self, host, *, strength=0.5, device=None, dtype=None):
        super().__init__()
        self.strength = strength
        self.prefix = host.num_prefix_tokens
        self.block = -1 if host.block is None else host.block
        self.ramp = nn.Parameter(torch.empty(2, host.embed_dim, device=device, dtype=dtype))
        self.scale = nn.Linear(1, 1, bias=False, device=device, dtype=dtype)
        self.reset_parameters()
        self.note('host', host)

    def reset_parameters(self):
        nn.init.normal_(self.ramp)

    @torch.jit.unused
    def note(self, *call):
        CALLS.append(call)

    def set_grid(self, grid):
        self.note('set_grid', grid)


class TokenToy(Toy):
    """Adds a ramp to tokens and turns the image around after block 0."""

    def add_to_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if not torch.jit.is_scripting():
            self.note('add_to_tokens', tuple(tokens.shape), grid)
        rows = torch.arange(grid[0], device=tokens.device)[:, None, None] * self.ramp[0]
        columns = torch.arange(grid[1], device=tokens.device)[:, None] * self.ramp[1]
        return tokens + self.scale(tokens.square().mean()[None]) * (rows + columns).flatten(0, 1)

    def mix_tokens(self, tokens: Tensor, grid: tuple[int, int], block_index: int) -> Tensor | None:
        if not torch.jit.is_scripting():
            self.note('mix_tokens', tuple(tokens.shape), grid, block_index)
        return tokens.flip(1) if block_index == 0 else None


class AttentionToy(Toy):
    """Flips queries and lets tokens prefer themselves, by what all blocks share."""

    place = 'block'
    bias_has_prefix_tokens = True

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if not torch.jit.is_scripting():
            self.note('prepare', grid, self.block)
        return torch.eye(self.prefix + grid[0] * grid[1], device=device)

    def rotate(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not torch.jit.is_scripting():
            self.note('rotate', tuple(query.shape), tuple(key.shape), grid)
        return query.flip(3), key

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        if not torch.jit.is_scripting():
            self.note('attention_bias', tuple(query.shape), tuple(key.shape), tuple(value.shape), grid)
        assert shared is not None
        scale = self.strength * self.scale(query.square().mean()[None]) + self.ramp.square().sum()
        return scale * shared.to(query.dtype)


class WideToy(Toy):
    """Looks at the tokens of the block, and adds channels to queries, keys and values."""

    place = 'block'

    def look(self, tokens: Tensor, grid: tuple[int, int], shared: Tensor | None = None) -> Tensor | None:
        if not torch.jit.is_scripting():
            self.note('look', tuple(tokens.shape), grid, self.block)
        return (tokens @ self.ramp.t()).unsqueeze(1)

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        assert shared is not None
        return self.scale(query[..., :1]), shared[..., :1]

    def value_channels(self, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None) -> Tensor | None:
        return shared

    def add_to_output(
        self, output: Tensor, attended: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor:
        return output * attended.sum(3, keepdim=True)


BOTH = 'tokentoy+attentiontoy'


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(ENCODINGS, 'tokentoy', TokenToy)
    monkeypatch.setitem(ENCODINGS, 'attentiontoy', AttentionToy)
    monkeypatch.setitem(ENCODINGS, 'widetoy', WideToy)
    CALLS.clear()


@pytest.fixture
def x():
    return torch.randn(2, 3, 56, 72)


def naive_forward(model, x, strength=0.5):
    """The same model written out, for both toys with a class token and two registers."""
    coordinates, toy = torch.cartesian_prod(torch.arange(7.0), torch.arange(9.0)), model.position['tokentoy']
    tokens = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    tokens = tokens + toy.scale.weight.item() * tokens.square().mean() * (coordinates @ toy.ramp)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.reg_token.expand(2, -1, -1), tokens], dim=1)
    for i, block in enumerate(model.blocks):
        attn, toy = block.attn, block.attn.position['attentiontoy']
        query, key, value = attn.qkv(block.norm1(x)).reshape(2, 66, 3, 2, 16).permute(2, 0, 3, 1, 4)
        size = strength * toy.scale.weight.item() * query[:, :, 3:].square().mean() + toy.ramp.square().sum()
        query = torch.cat([query[:, :, :3], query[:, :, 3:].flip(3)], dim=2)
        weights = (query @ key.transpose(2, 3) / 4 + size * torch.eye(66)).softmax(-1)
        x = x + attn.proj((weights @ value).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        if i == 0:
            x = torch.cat([x[:, :3], x[:, 3:].flip(1)], dim=1)
    return model.norm(x)


@pytest.mark.parametrize('fused', [True, False])
def test_hooks_act_where_they_should(tiny_vit, x, fused):
    model = tiny_vit(BOTH, reg_tokens=2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    torch.testing.assert_close(model.forward_features(x), naive_forward(model, x))


@pytest.mark.parametrize('checkpointing', [False, True])
def test_hooks_get_patches_grid_and_block(tiny_vit, checkpointing):
    model = tiny_vit(BOTH, reg_tokens=2, dynamic_img_size=True)
    model.set_grad_checkpointing(checkpointing)
    host = HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=3, depth=2)
    hosts = [call[1] for call in CALLS if call[0] == 'host']
    assert hosts == [host, host._replace(block=0), host._replace(block=1)]
    for grid in ((5, 11), (1, 5)):
        CALLS.clear()
        model(torch.randn(2, 3, 8 * grid[0], 8 * grid[1]))
        patches = grid[0] * grid[1]
        tokens, heads = (2, patches, 32), (2, 2, patches, 16)
        expected = [('add_to_tokens', tokens, grid), ('prepare', grid, 0)]
        for i in range(2):
            expected += [('rotate', heads, heads, grid), ('attention_bias', heads, heads, heads, grid)]
            expected += [('mix_tokens', tokens, grid, i)]
        assert expected == CALLS


class FirstBlockToy(PositionEncoding):
    """A bias in the first block, and None, for nothing, in the others."""

    place = 'block'

    def __init__(self, host, *, device=None, dtype=None):
        super().__init__()
        self.is_first = host.block == 0

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        return torch.eye(query.shape[2]) if self.is_first else None


def test_a_bias_may_be_left_out(tiny_vit, x, monkeypatch):
    monkeypatch.setitem(ENCODINGS, 'firsttoy', FirstBlockToy)
    model = tiny_vit('firsttoy', reg_tokens=2)
    fused = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), fused)


def test_attention_by_itself_prepares_what_it_needs(tiny_vit):
    attention, tokens = tiny_vit(BOTH, reg_tokens=2).blocks[1].attn, torch.randn(2, 66, 32)
    CALLS.clear()
    alone = attention(tokens, (7, 9))
    assert {call for call in CALLS if call[0] == 'prepare'} == {('prepare', (7, 9), 1)}
    assert torch.equal(attention(tokens, (7, 9), shared={'attentiontoy': torch.eye(66)}), alone)


class TestWide:
    """Queries and keys of 16 + 1 channels, values of 16 + 2, computed from what the block reads."""

    def expected(self, model, tokens, mask):
        attn, toy = model.blocks[1].attn, model.blocks[1].attn.position['widetoy']
        query, key, value = attn.qkv(tokens).reshape(2, 66, 3, 2, 16).permute(2, 0, 3, 1, 4)
        seen = tokens[:, 3:] @ toy.ramp.t()
        logits = query @ key.transpose(2, 3) / 4
        logits[:, :, 3:, 3:] += toy.scale(query[:, :, 3:, :1]) * seen[:, None, None, :, 0]
        weights = logits.masked_fill(~mask, float('-inf')).softmax(-1)
        output = weights @ value
        output[:, :, 3:] *= weights[:, :, 3:, 3:] @ seen.sum(2)[:, None, :, None]
        return attn.proj(output.transpose(1, 2).flatten(2))

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('masked', [True, False])
    @torch.no_grad()
    def test_by_hand(self, tiny_vit, fused, masked):
        model, tokens = tiny_vit('widetoy', reg_tokens=2), torch.randn(2, 66, 32)
        model.blocks[1].attn.fused_attn = fused
        mask = torch.ones(66, 66, dtype=torch.bool).tril() if masked else torch.ones(66, 66, dtype=torch.bool)
        found = model.blocks[1].attn(tokens, (7, 9), attn_mask=mask if masked else None)
        torch.testing.assert_close(found, self.expected(model, tokens, mask))

    def test_block_and_its_input_are_known(self, tiny_vit, x):
        model = tiny_vit('widetoy', reg_tokens=2)
        CALLS.clear()
        model(x)
        assert [('look', (2, 63, 32), (7, 9), i) for i in range(2)] == CALLS

    def test_with_other_encodings(self, tiny_vit, x):
        """Fused attention is that of the naive path, whatever is added, rotated or widened beside it."""
        model = tiny_vit('widetoy+rope+axial_cope+attentiontoy+sape2', reg_tokens=2)
        fused = model(x)
        for block in model.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(model(x), fused)

    @pytest.mark.filterwarnings('ignore::FutureWarning')
    def test_scripts(self, tiny_vit, x):
        model = tiny_vit('widetoy+rope+sape2', reg_tokens=2)
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_intermediates_are_mixed_too(tiny_vit, x):
    model = tiny_vit(BOTH, reg_tokens=2)
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, naive_forward(model, x))
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), final[:, 3:])
    assert [call[3] for call in CALLS if call[0] == 'mix_tokens'] == [0, 1]


def test_set_input_size_tells_every_instance(tiny_vit):
    model = tiny_vit(BOTH)
    CALLS.clear()
    model.set_input_size((72, 56))
    assert CALLS == [('set_grid', (9, 7))] * 3


@pytest.mark.parametrize('combined', [BOTH, f'learned+{BOTH}', f'{BOTH}+sape2', f'learned+sape2+{BOTH}'])
def test_state_dict_names(tiny_vit, combined):
    state = tiny_vit(combined).state_dict()
    owners = ['position.tokentoy', *(f'blocks.{i}.attn.position.attentiontoy' for i in (0, 1))]
    names = {f'{owner}.{name}' for owner in owners for name in ('ramp', 'scale.weight')}
    if 'sape2' in combined:
        names |= {f'blocks.{i}.attn.position.sape2.{axis}_table' for i in (0, 1) for axis in ('row', 'column')}
    assert {name for name in state if 'position.' in name} == names
    assert ('pos_embed' in state) == ('learned' in combined)


def test_parameters_fall_into_groups(tiny_vit):
    model = tiny_vit(BOTH)
    scales = {
        'position.tokentoy': 0.125,
        'blocks.0.attn.position.attentiontoy': 0.25,
        'blocks.1.attn.position.attentiontoy': 0.5,
    }
    tables = {f'{name}.ramp' for name in scales}
    assert model.no_weight_decay() == tables | {'pos_embed', 'cls_token', 'reg_token', 'dist_token'}
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    found = {id(p): (group['lr_scale'], group['weight_decay']) for group in groups for p in group['params']}
    for name, scale in scales.items():
        toy = model.get_submodule(name)
        assert found[id(toy.ramp)] == (scale, 0.0) and found[id(toy.scale.weight)] == (scale, 0.05)


def test_tables_are_not_decayed_whatever_their_encoding_is_called(tiny_vit, monkeypatch):
    monkeypatch.setitem(ENCODINGS, 'token-toy', TokenToy)
    assert 'position.token-toy.ramp' in tiny_vit('token-toy').no_weight_decay()


def test_every_parameter_gets_a_gradient(tiny_vit, x):
    model = tiny_vit(BOTH, reg_tokens=2, global_pool='avg')
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize('other', ['sape2', 'learned', 'learned+sape2'])
def test_composes_with_other_encodings(tiny_vit, x, other):
    """With ramps and strength at 0 and flips undone, only the other encodings are left."""

    class SilentTokens(TokenToy):
        def mix_tokens(self, tokens: Tensor, grid: tuple[int, int], block_index: int) -> Tensor | None:
            return tokens * 1

    class SilentAttention(AttentionToy):
        def rotate(
            self, query: Tensor, key: Tensor, grid: tuple[int, int], shared: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            return query, key

    ENCODINGS.update(tokentoy=SilentTokens, attentiontoy=SilentAttention)
    both = tiny_vit(f'{BOTH}+{other}', position_args={'attentiontoy': {'strength': 0.0}}, reg_tokens=2)
    alone = tiny_vit(other, reg_tokens=2)
    alone.load_state_dict({k: v for k, v in both.state_dict().items() if 'toy.' not in k})
    ramps = [parameter for name, parameter in both.named_parameters() if name.endswith('toy.ramp')]
    with torch.no_grad():
        for ramp in ramps:
            ramp.zero_()
    torch.testing.assert_close(both(x), alone(x))
    for ramp in ramps:
        with torch.no_grad():
            ramp.normal_()
        assert (both(x) - alone(x)).abs().max() > 1e-3
        with torch.no_grad():
            ramp.zero_()


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_scripts(tiny_vit):
    model = tiny_vit(f'{BOTH}+sape2', reg_tokens=2, dynamic_img_size=True)
    scripted = torch.jit.script(model)
    for size in ((56, 72), (40, 8)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(scripted(x), model(x))


def test_unknown_option_lists_its_own(tiny_vit):
    with pytest.raises(ValueError, match=r"option 'weight' of position encoding 'tokentoy'. Valid options: strength\."):
        tiny_vit('tokentoy', position_args={'tokentoy': {'weight': 1}})


def test_patch_dropout_is_refused_by_name(tiny_vit):
    message = r"patch_drop_rate=0.5 removes patches, but position encoding 'attentiontoy', 'sape2'"
    with pytest.raises(ValueError, match=message):
        tiny_vit('learned+attentiontoy+sape2', patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="position encoding 'tokentoy' needs the whole grid"):
        tiny_vit('tokentoy', patch_drop_rate=0.5)
