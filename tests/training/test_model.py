"""Models and optimizers are created as the flags say, or refused with the flag that is wrong."""

import pytest
import timm
import torch

from timm_sape2.training.arguments import parse_arguments
from timm_sape2.training.model import build_model, create_optimizer


def arguments(*flags):
    return parse_arguments(['--dataset', 'digits', '--model', 'test_vit_sape2', *flags], None)


def test_flags_and_model_kwargs_come_together():
    args = arguments('--img-size', '32', '48', '--in-chans', '1', '--num-classes', '7', '--drop-path', '0.2')
    args.model_kwargs = {'position': 'nope', 'depth': 3}
    model = build_model(args)
    assert (model.patch_embed.grid_size, model.in_chans, model.num_classes) == ((2, 3), 1, 7)
    assert len(model.blocks) == 3 and model.pos_embed is None
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_models_of_timm_that_take_any_size():
    model = build_model(arguments('--model', 'test_resnet', '--img-size', '48'))
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 1000)


def test_grad_checkpointing():
    assert build_model(arguments('--grad-checkpointing')).grad_checkpointing


@pytest.mark.parametrize('wrap', [lambda weights: weights, lambda weights: {'state_dict': weights}])
def test_initial_checkpoint(wrap, tmp_path):
    weights = timm.create_model('test_vit_sape2').state_dict()
    torch.save(wrap(weights), tmp_path / 'weights.pth')
    model = build_model(arguments('--initial-checkpoint', str(tmp_path / 'weights.pth')))
    assert all(torch.equal(weights[name], loaded) for name, loaded in model.state_dict().items())
    with pytest.raises(ValueError, match='--initial-checkpoint does not fit the model, --pretrained-path would adapt'):
        build_model(arguments('--initial-checkpoint', str(tmp_path / 'weights.pth'), '--num-classes', '3'))


@pytest.mark.parametrize(('num_classes', 'keeps_head'), [(4, True), (5, False)])
def test_pretrained_path(num_classes, keeps_head, tmp_path):
    """Weights of another size are adapted; the classifier is kept if the number of classes is the same."""
    source = timm.create_model('test_vit_sape2', num_classes=4, img_size=(32, 64))
    torch.nn.init.normal_(source.head.weight)
    args = arguments('--num-classes', '4', '--img-size', '32', '64')
    args.input_size = (3, 32, 64)
    torch.save({'state_dict': source.state_dict(), 'args': args}, tmp_path / 'weights.pth')
    flags = ('--pretrained-path', str(tmp_path / 'weights.pth'), '--img-size', '64', '32')
    model = build_model(arguments(*flags, '--num-classes', str(num_classes)))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.head.weight, source.head.weight) if keeps_head else len(model.head.weight) == 5
    assert not torch.equal(model.pos_embed, source.pos_embed), 'the same number of tokens, but another grid'


@pytest.mark.parametrize('flag', ['--pretrained-path', '--initial-checkpoint'])
def test_weights_of_another_encoding(flag, tmp_path):
    """Rotary and no encoding have the same weights: only the record of the run tells them apart."""
    path = tmp_path / 'weights.pth'
    args = arguments('--model-kwargs', 'position=rope')
    torch.save({'state_dict': build_model(args).state_dict(), 'args': args}, path)
    with pytest.raises(ValueError, match="it was trained with position='rope', not 'nope'"):
        build_model(arguments(flag, str(path), '--model-kwargs', 'position=nope'))
    assert build_model(arguments(flag, str(path), '--model-kwargs', 'position=rope')).position_name == 'rope'


def test_optimizer():
    model = build_model(arguments())
    args = arguments('--opt', 'lamb', '--lr', '0.3', '--opt-betas', '0.8', '0.9', '--opt-eps', '1e-3')
    optimizer = create_optimizer(args, model)
    assert type(optimizer).__name__ == 'Lamb'
    assert (optimizer.defaults['lr'], *optimizer.defaults['betas'], optimizer.defaults['eps']) == (0.3, 0.8, 0.9, 1e-3)
    scales = [group['lr_scale'] for group in create_optimizer(arguments('--layer-decay', '0.5'), model).param_groups]
    assert sorted(set(scales)) == [0.0625, 0.125, 0.25, 0.5, 1]


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--opt sgdd', 'sgdd'),
        ('--opt sgd --opt-eps 0.1', '--opt sgd has no --opt-eps'),
        ('--opt adamw --opt-betas 0.9', '--opt adamw takes 2 --opt-betas'),
    ],
)
def test_options_that_the_optimizer_does_not_have(flags, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(arguments(*flags.split()), torch.nn.Linear(2, 2))
