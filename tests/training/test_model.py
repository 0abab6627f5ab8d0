"""Models and optimizers are created as the flags say, or refused with the flag that is wrong."""

import argparse
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.optim import optimizer_kwargs

from timm_sape2 import equip
from timm_sape2.positions import ENCODINGS
from timm_sape2.training.arguments import flags_of, parse_arguments
from timm_sape2.training.model import build_model, create_optimizer


def arguments(*flags):
    return parse_arguments(['--dataset', 'digits', '--model', 'test_vit_sape2', *flags], None)


def built(args):
    return build_model(**flags_of(build_model, args))


def test_flags_and_model_kwargs_come_together():
    args = arguments('--img-size', '32', '48', '--in-chans', '1', '--num-classes', '7', '--drop-path', '0.2')
    args.model_kwargs = {'position': 'nope', 'depth': 3}
    model = built(args)
    assert (model.patch_embed.grid_size, model.in_chans, model.num_classes) == ((2, 3), 1, 7)
    assert len(model.blocks) == 3 and model.pos_embed is None
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_models_of_timm_that_take_any_size():
    model = built(arguments('--model', 'test_resnet', '--img-size', '48'))
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 1000)


def test_grad_checkpointing():
    assert built(arguments('--grad-checkpointing')).grad_checkpointing


@pytest.mark.parametrize('wrap', [lambda weights: weights, lambda weights: {'state_dict': weights}])
def test_initial_checkpoint(wrap, tmp_path):
    weights = timm.create_model('test_vit_sape2').state_dict()
    torch.save(wrap(weights), tmp_path / 'weights.pth')
    model = built(arguments('--initial-checkpoint', str(tmp_path / 'weights.pth')))
    assert all(torch.equal(weights[name], loaded) for name, loaded in model.state_dict().items())
    with pytest.raises(ValueError, match='--initial-checkpoint does not fit the model, --pretrained-path would adapt'):
        built(arguments('--initial-checkpoint', str(tmp_path / 'weights.pth'), '--num-classes', '3'))


@pytest.mark.parametrize(('num_classes', 'keeps_head'), [(4, True), (5, False)])
def test_pretrained_path(num_classes, keeps_head, tmp_path):
    """Weights of another size are adapted; the classifier is kept if the number of classes is the same."""
    source = timm.create_model('test_vit_sape2', num_classes=4, img_size=(32, 64))
    torch.nn.init.normal_(source.head.weight)
    args = arguments('--num-classes', '4', '--img-size', '32', '64')
    args.input_size = (3, 32, 64)
    torch.save({'state_dict': source.state_dict(), 'args': args}, tmp_path / 'weights.pth')
    flags = ('--pretrained-path', str(tmp_path / 'weights.pth'), '--img-size', '64', '32')
    model = built(arguments(*flags, '--num-classes', str(num_classes)))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.head.weight, source.head.weight) if keeps_head else len(model.head.weight) == 5
    assert not torch.equal(model.pos_embed, source.pos_embed), 'the same number of tokens, but another grid'


@pytest.mark.parametrize('flag', ['--pretrained-path', '--initial-checkpoint'])
def test_weights_of_another_encoding(flag, tmp_path):
    """Rotary and no encoding have the same weights: only the record of the run tells them apart."""
    path = tmp_path / 'weights.pth'
    args = arguments('--model-kwargs', 'position=rope')
    torch.save({'state_dict': built(args).state_dict(), 'args': args}, path)
    with pytest.raises(ValueError, match="it was trained with position='rope', not 'nope'"):
        built(arguments(flag, str(path), '--model-kwargs', 'position=nope'))
    assert built(arguments(flag, str(path), '--model-kwargs', 'position=rope')).position_name == 'rope'


class TestPretrainedPathOfAnEquippedModel:
    """`--model vit_equipped` starts from a checkpoint of the base as timm has it, or of the equipped model."""

    @staticmethod
    def arguments(*flags, position='learned+sape2'):
        kwargs = ['--model-kwargs', 'base=test_vit', 'depth=2', f'position={position}']
        return arguments('--model', 'vit_equipped', '--img-size', '64', '--num-classes', '4', *kwargs, *flags)

    @pytest.fixture
    def base(self):
        model = timm.create_model('test_vit', img_size=64, num_classes=4, depth=2)
        torch.nn.init.normal_(model.head.weight)
        return model

    def files_of(self, source, folder, **args):
        """The weights alone, a checkpoint of timm's script, and the folder that timm writes for the Hub."""
        save_file(source.state_dict(), folder / 'weights.safetensors')
        args = argparse.Namespace(img_size=64, num_classes=4, **args)
        torch.save({'state_dict': source.state_dict(), 'args': args, 'epoch': 3}, folder / 'last.pth.tar')
        save_for_hf(source, folder / 'folder', safe_serialization=True)
        return [str(folder / name) for name in ('weights.safetensors', 'last.pth.tar', 'folder')]

    @pytest.mark.parametrize('changed', ['', '--num-classes 5', '--img-size 96 64', '--in-chans 1'])
    def test_of_the_base(self, base, tmp_path, changed):
        own = {'--num-classes 5': 'head.', '--img-size 96 64': 'pos_embed', '--in-chans 1': 'patch_embed.'}.get(changed)
        same = [key for key in base.state_dict() if own is None or not key.startswith(own)]
        for path in self.files_of(base, tmp_path, model='test_vit', model_kwargs={'depth': 2}):
            model = built(self.arguments('--pretrained-path', path, *changed.split()))
            state = model.state_dict()
            assert all(torch.equal(state[key], base.state_dict()[key]) for key in same)
            assert model.position_name == 'learned+sape2' and state['blocks.1.attn.position.sape2.row_table'].any()
            assert model.pretrained_cfg['architecture'] == 'vit_equipped'

    def test_of_the_equipped_model(self, base, tmp_path):
        source = equip(base, 'learned+sape2')
        args = dict(model='vit_equipped', model_kwargs={'base': 'test_vit', 'depth': 2, 'position': 'learned+sape2'})
        for path in self.files_of(source, tmp_path, **args):
            state = built(self.arguments('--pretrained-path', path)).state_dict()
            assert all(torch.equal(value, source.state_dict()[key]) for key, value in state.items())
            assert built(self.arguments('--pretrained-path', path, '--num-classes', '5')).num_classes == 5

    def test_of_another_encoding(self, base, tmp_path):
        source = equip(base, 'learned+rope')
        args = dict(model='vit_equipped', model_kwargs={'base': 'test_vit', 'depth': 2, 'position': 'learned+rope'})
        for path in self.files_of(source, tmp_path, **args)[1:]:  # weights alone do not say it
            with pytest.raises(ValueError, match=r"trained with position='learned\+rope', not 'learned\+sape2'"):
                built(self.arguments('--pretrained-path', path))

    def test_of_the_base_without_its_embeddings(self, base, tmp_path):
        path = self.files_of(base, tmp_path, model='test_vit', model_kwargs={'depth': 2})[1]
        with pytest.raises(
            ValueError, match=r"trained with position='learned', not 'sape2'; position='learned\+sape2'"
        ):
            built(self.arguments('--pretrained-path', path, position='sape2'))


def optimizer_of(model, *flags):
    args = arguments(*flags)
    return create_optimizer(model, opt_kwargs=args.opt_kwargs, **optimizer_kwargs(args))


def test_optimizer():
    model = built(arguments())
    optimizer = optimizer_of(model, '--opt', 'lamb', '--lr', '0.3', '--opt-betas', '0.8', '0.9', '--opt-eps', '1e-3')
    assert type(optimizer).__name__ == 'Lamb'
    assert (optimizer.defaults['lr'], *optimizer.defaults['betas'], optimizer.defaults['eps']) == (0.3, 0.8, 0.9, 1e-3)
    scales = [group['lr_scale'] for group in optimizer_of(model, '--layer-decay', '0.5').param_groups]
    assert sorted(set(scales)) == [0.0625, 0.125, 0.25, 0.5, 1]


def test_more_options_of_the_optimizer():
    optimizer = optimizer_of(built(arguments()), '--opt', 'adamw', '--opt-kwargs', 'amsgrad=True', 'foreach=False')
    assert (optimizer.defaults['amsgrad'], optimizer.defaults['foreach']) == (True, False)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--opt sgdd', 'sgdd'),
        ('--opt sgd --opt-eps 0.1', '--opt sgd has no --opt-eps'),
        ('--opt adamw --opt-betas 0.9', '--opt adamw takes 2 --opt-betas'),
        ('--opt muon --opt-kwargs ns_step=3', r"--opt muon has no --opt-kwargs ns_step \(did you mean 'ns_steps'\?\)"),
        ('--opt muon --opt-kwargs lr=3', '--opt-kwargs lr: use --lr'),
        ('--opt muon --opt-kwargs params=3', '--opt muon has no --opt-kwargs params'),
        ('--opt muon --opt-kwargs algo=adam', 'cannot create --opt muon with algo=.adam.: Invalid algo'),
    ],
)
def test_options_that_the_optimizer_does_not_have(flags, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(torch.nn.Linear(2, 2), *flags.split())


MATRICES = re.compile(r'(qkv|proj|fc1|fc2|head|pape\.coefficients)\.weight$')  # PaPE's is a linear map of tokens


@pytest.mark.parametrize(
    ('position', 'flags'),
    [*((name, '') for name in ENCODINGS), *(('sape2', flags) for flags in ('--weight-decay 0', '--layer-decay 0.7'))],
)
def test_muon_orthogonalizes_matrices_and_no_position_table(position, flags):
    """A table of 10 positions by 32 channels has the shape of a weight matrix, but its rows are looked up one by one.

    Muon says what it did with a parameter by the state that it keeps: momentum, or the two averages of AdamW.
    """
    model = timm.create_model('test_vit_sape2', position=position, num_classes=5)
    optimizer = optimizer_of(model, '--opt', 'muon', *flags.split(), '--opt-kwargs', 'ns_steps=3')
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    orthogonalized = {
        name for name, weights in model.named_parameters() if 'momentum_buffer' in optimizer.state[weights]
    }
    assert orthogonalized == {name for name, _ in model.named_parameters() if MATRICES.search(name)}
    assert all(group['ns_steps'] == 3 for group in optimizer.param_groups)


def test_muon_may_be_told_otherwise():
    model = built(arguments())
    groups = optimizer_of(model, '--opt', 'muon', '--opt-kwargs', 'fallback_no_weight_decay=False').param_groups
    assert not any(group.get('use_fallback') for group in groups)
