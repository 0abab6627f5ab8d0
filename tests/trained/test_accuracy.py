"""Accuracy as timm's validate.py computes it."""

import contextlib
import logging

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_sape2.data.digits import Digits
from timm_sape2.trained.accuracy import binomial_interval, evaluate, measure_accuracy
from timm_sape2.trained.confusion import Confusion
from timm_sape2.trained.opening import TrainedModel, fingerprint


class Answers(nn.Module):
    """Gives the logits of a table in the order in which images come, whatever they show."""

    num_classes = 3

    def __init__(self, logits, names=None):
        super().__init__()
        self.logits, self.next = logits, 0
        self.pretrained_cfg = {'input_size': (1, 8, 8), 'mean': (0.5,), 'std': (0.5,), 'label_names': names}

    def forward(self, images):
        self.next += len(images)
        return self.logits[self.next - len(images) : self.next]


class Images(torch.utils.data.Dataset):
    """Black images with the given targets, and names of the classes or not."""

    transform = None

    def __init__(self, targets, classes=None):
        self.targets = targets
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(Image.new('L', (8, 8))), self.targets[index]


LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
TARGETS = [0, 1, 2, 1, 2]


@pytest.mark.parametrize('batch_size', [1, 2, 3, 5, 100])
def test_by_hand(batch_size):
    """Three of five are right, whatever the batches are; the mean of the losses is that over images."""
    measured = measure_accuracy(TrainedModel(Answers(LOGITS)), Images(TARGETS), batch_size, workers=0)
    assert measured['top1'] == 60.0 and measured['top5'] == 100.0 and measured['num_images'] == 5
    assert measured['loss'] == pytest.approx(
        nn.functional.cross_entropy(LOGITS, torch.tensor(TARGETS)).item(), abs=1e-6
    )


@pytest.mark.parametrize('batch_size', [2, 100])
def test_what_the_images_are_taken_for(batch_size):
    confusion = Confusion(['a', 'b', 'c'])
    data, model = Images(TARGETS), TrainedModel(Answers(LOGITS))
    measured = measure_accuracy(model, data, batch_size, workers=0, confusion=confusion)
    assert confusion.counts.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert 100 * int(confusion.counts.trace()) / len(TARGETS) == measured['top1']


class TestEvaluate:
    def loader(self, **kwargs):
        return torch.utils.data.DataLoader(list(zip(LOGITS, TARGETS, strict=True)), batch_size=2, **kwargs)

    def test_by_hand(self):
        metrics = evaluate(nn.Identity(), self.loader())
        assert metrics['top1'] == pytest.approx(60) and metrics['top5'] == 100
        expected = nn.functional.cross_entropy(LOGITS, torch.tensor(TARGETS)).item()
        assert metrics['loss'] == pytest.approx(expected, abs=1e-6)

    def test_padding_of_a_distributed_sampler_does_not_count(self):
        loader = self.loader(sampler=torch.utils.data.SequentialSampler(TARGETS))
        loader.sampler.num_valid_samples = 3
        seen = []
        metrics = evaluate(nn.Identity(), loader, after_batch=lambda totals, *batch: seen.append(batch))
        assert metrics['top1'] == 100, 'the first three are right'
        assert [targets.tolist() for _, targets in seen] == [[0, 1], [2], []]
        assert torch.equal(torch.cat([output for output, _ in seen]), LOGITS[:3])

    def test_it_stops_and_the_loader_with_it(self):
        seen, closed = [], []

        def batches():
            try:
                yield from self.loader()
            finally:
                closed.append(True)

        class Loader:
            __iter__ = staticmethod(batches)

        def stop(totals, output, targets):
            seen.append(totals.num_samples)
            return True

        assert evaluate(nn.Identity(), Loader(), after_batch=stop) is None
        assert seen == [2] and closed == [True]

    def test_under_autocast(self):
        entered = []

        @contextlib.contextmanager
        def autocast():
            entered.append(True)
            yield

        evaluate(nn.Identity(), self.loader(), autocast=autocast)
        assert len(entered) == 3


@pytest.mark.parametrize(
    ('percent', 'num_images', 'interval'),
    [
        (60, 5, (23.07, 88.24)),  # 3 of 5, as in tables of the Wilson interval
        (50, 10, (23.66, 76.34)),
        (100, 10, (72.25, 100)),
        (0, 10, (0, 27.75)),
        (80, 10_000, (79.20, 80.77)),
    ],
)
def test_interval_of_an_accuracy(percent, num_images, interval):
    assert binomial_interval(percent, num_images) == pytest.approx(interval, abs=0.006)


def test_interval_is_in_the_measurement():
    measured = measure_accuracy(TrainedModel(Answers(LOGITS)), Images(TARGETS), workers=0)
    assert measured['top1_interval'] == binomial_interval(60, 5) and measured['input_size'] == [1, 8, 8]


def test_a_real_model_on_the_digits():
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2', img_size=16, patch_size=4, num_classes=10, in_chans=1).eval()
    measured = measure_accuracy(TrainedModel(model), Digits('validation'), 100, workers=0)
    assert measured['num_images'] == len(Digits('validation')) and 0 <= measured['top1'] <= measured['top5'] <= 100
    assert measured['fingerprint'] == fingerprint(model) and measured['versions']['timm'] == timm.__version__


def test_the_classes_must_be_those_of_the_model(caplog):
    def measure(classes, names=None):
        data = Images(TARGETS, classes)
        return measure_accuracy(TrainedModel(Answers(LOGITS, names)), data, workers=0)['top1']

    assert measure(['a', 'b', 'c'], ['a', 'b', 'c']) == 60.0
    assert not caplog.records
    assert measure(['a', 'b', 'c']) == 60.0
    assert 'The model has no names of its classes: those of the data must be in the order of training' in caplog.text
    with pytest.raises(ValueError, match='the data has 2 classes, the model 3'):
        measure(['a', 'b'])
    with pytest.raises(ValueError, match='the data has the classes of the model in another order'):
        measure(['a', 'c', 'b'], ['a', 'b', 'c'])
    with caplog.at_level(logging.WARNING):
        assert measure(['x', 'b', 'c'], ['a', 'b', 'c']) == 60.0
    assert "The data names 1 classes as the model does not, such as 'x'; only their order counts" in caplog.text


def test_no_images():
    with pytest.raises(ValueError, match='the data set has no images'):
        measure_accuracy(TrainedModel(Answers(LOGITS)), Images([]), workers=0)
