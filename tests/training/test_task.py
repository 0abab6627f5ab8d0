"""What a student learns from a teacher, on images that each sees as it was trained to."""

from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import PretrainedCfg, _registry

from timm_sape2.training.task import check_sizes, create_distillation, open_teacher

SIZES = dict(img_size=(16, 32), num_classes=3, patch_size=8)
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def vit(name='test_vit_sape2', **kwargs):
    model = timm.create_model(name, **{**SIZES, **kwargs})
    torch.nn.init.normal_(model.head.weight)
    return model


def distillation(kind, student, teacher, **options):
    loss = dict(loss_type='ce', smoothing=0.0)
    task = create_distillation(
        kind, student, teacher, HALF['mean'], HALF['std'], torch.device('cpu'), criterion_kwargs=loss, **options
    )
    task.trainable_module.train()
    return task


@pytest.fixture
def batch():
    return torch.randn(2, 3, 16, 32), torch.tensor([0, 2])


def test_logits_by_hand(batch):
    """0.3 cross-entropy + 0.7 T^2 KL(teacher, student) at T = 2; the teacher wants pixels * 10 + 1, not normalized."""
    images, targets = batch
    student, teacher = vit(), vit(depth=1)
    teacher.pretrained_cfg.update(mean=(-0.1, -0.1, -0.1), std=(0.1, 0.1, 0.1))
    result = distillation('logit', student, teacher, task_loss_weight=0.3, temperature=2.0)(images, targets)
    pixels = 0.25 * images + 0.5
    expected, logits = teacher((pixels + 0.1) / 0.1), student(images)
    wanted = (expected / 2).softmax(1)
    divergence = (wanted * (wanted.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(result['loss'], 0.3 * F.cross_entropy(logits, targets) + 0.7 * 4 * divergence)
    result['loss'].backward()
    assert all(weights.grad is None for weights in teacher.parameters())
    assert not teacher.training


def test_features_of_another_width_go_through_a_map(batch):
    student, teacher = vit(), vit(embed_dim=32, num_heads=2, num_classes=7)
    task = distillation('feature', student, teacher)
    task(*batch)['loss'].backward()
    assert task.trainable_module.projection.weight.shape == (32, 64)
    assert task.trainable_module.projection.weight.grad.abs().sum() > 0
    assert task.evaluated_module() is student
    state = task.get_checkpoint_state()
    assert state['state_dict'].keys() == student.state_dict().keys() and 'projection' in state['task_state']


def test_a_token_for_the_teacher(batch):
    student = vit('deit_tiny_distilled_patch16_224', embed_dim=32, num_heads=2, depth=1)
    task = distillation('token', student, vit(), distill_type='hard')
    task(*batch)['loss'].backward()
    assert student.head_dist.weight.grad.abs().sum() > 0
    assert task.evaluated_module()(batch[0]).shape == (2, 3)
    with pytest.raises(ValueError, match=r'PositionVisionTransformer does not have .set_distilled_training'):
        distillation('token', vit(), vit())


def test_gray_images(batch):
    """timm's own arithmetic would make three channels of one."""
    images, targets = batch
    student, teacher = vit(in_chans=1), vit(in_chans=1)
    task = create_distillation(
        'logit', student, teacher, (0.3,), (0.2,), torch.device('cpu'), criterion_kwargs={}, temperature=1.0
    )
    mean, std = (sum(teacher.pretrained_cfg[name]) / 3 for name in ('mean', 'std'))
    seen = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task(images[:, :1], targets)
    torch.testing.assert_close(seen[0], (images[:, :1] * 0.2 + 0.3 - mean) / std)


def test_teacher_of_a_run(tmp_path):
    teacher = vit()
    torch.save({'state_dict': teacher.state_dict()}, tmp_path / 'teacher.pth')
    with pytest.raises(ValueError, match='does not say which model it is of'):
        open_teacher(str(tmp_path / 'teacher.pth'), (3, 16, 32), 3)
    args = Namespace(model='test_vit_sape2', model_kwargs=SIZES, num_classes=3, input_size=(3, 16, 32))
    torch.save({'state_dict': teacher.state_dict(), 'args': args}, tmp_path / 'last.pth.tar')
    opened = open_teacher(str(tmp_path), (3, 32, 32), 3)
    assert torch.equal(opened.head.weight, teacher.head.weight) and opened.patch_embed.grid_size == (4, 4)
    with pytest.raises(ValueError, match=r'knows 3 classes, the data has 5: .* --kd-distill-type feature'):
        open_teacher(str(tmp_path), (3, 32, 32), 5)
    assert open_teacher(str(tmp_path), (3, 32, 32), None).num_classes == 3
    with pytest.raises(ValueError, match='takes 3 channels, the model 1'):
        open_teacher(str(tmp_path), (1, 32, 32), 3)


def test_teacher_by_name(tmp_path, monkeypatch):
    """Published weights at the size of the student, with the classifier that they have."""
    teacher = timm.create_model('test_vit', num_classes=6)
    torch.save(teacher.state_dict(), tmp_path / 'weights.pth')
    cfg = PretrainedCfg(
        file=str(tmp_path / 'weights.pth'),
        num_classes=6,
        input_size=(3, 160, 160),
        fixed_input_size=True,
        first_conv='patch_embed.proj',
        classifier='head',
    )
    monkeypatch.setitem(_registry._model_pretrained_cfgs, 'test_vit.r160_in1k', cfg)
    with pytest.raises(ValueError, match=r'--kd-model-name test_vit.r160_in1k knows 6 classes, the data has 3'):
        open_teacher('test_vit.r160_in1k', (3, 32, 48), 3)
    opened = open_teacher('test_vit.r160_in1k', (1, 32, 48), 6)
    assert torch.equal(opened.head.weight, teacher.head.weight)
    assert opened(torch.zeros(1, 1, 32, 48)).shape == (1, 6)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('test_vit_sape2', 'has no published weights: name a checkpoint or the folder of a run'),
        ('test_vitt', "--kd-model-name.*test_vit"),
        ('nowhere/last.pth.tar', 'nowhere/last.pth.tar'),
    ],
)  # fmt: skip
def test_no_such_teacher(source, message):
    with pytest.raises((ValueError, OSError), match=message):
        open_teacher(source, (3, 32, 32), 10)


def test_sizes_are_tried():
    model = vit().train()
    check_sizes(model, 3, [(16, 32)], 'it')
    assert model.training
    with pytest.raises(ValueError, match=r'--x does not take images of 32x16: .*the model takes 16x32'):
        check_sizes(model, 3, [(16, 32), (32, 16)], '--x')
    check_sizes(vit(dynamic_img_size=True), 3, [(24, 40)], 'it')
