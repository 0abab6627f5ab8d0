"""Predictions for images, folders and patterns, and the contact sheet."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_sape2.trained.opening import TrainedModel
from timm_sape2.trained.prediction import ClassProbability, Prediction, contact_sheet, find_images, predict


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Folder of seven images of several formats, shapes and modes, in two folders, and a text."""
    folder = tmp_path_factory.mktemp('photos')
    random = np.random.default_rng(0)
    shapes = {
        'b.png': (40, 60, 3),
        'a.jpg': (64, 32, 3),
        'c.PNG': (1, 9, 3),
        'sub/d.webp': (33, 33, 3),
        'sub/g.png': (20, 20),
    }
    (folder / 'sub').mkdir()
    for name, shape in shapes.items():
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    Image.new('RGBA', (20, 30), (0, 0, 0, 0)).save(folder / 'sub' / 'e.png')
    Image.new('RGB', (20, 30)).save(folder / 'sub' / 'f.bmp')
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2', num_classes=4).eval()
    model.pretrained_cfg['label_names'] = ['ape', 'bee', 'cat', 'dog']
    return TrainedModel(model)


def names(paths):
    return [path.name for path in paths]


class TestFindImages:
    def test_files_folders_and_patterns(self, photos):
        assert names(find_images([str(photos / 'b.png')])) == ['b.png']
        assert names(find_images([str(photos / 'sub')])) == ['d.webp', 'e.png', 'f.bmp', 'g.png']
        assert len(find_images([str(photos)])) == 7
        assert names(find_images([str(photos / '*.p*')])) == ['b.png']
        assert names(find_images([str(photos / '**' / '*.png')])) == ['b.png', 'e.png', 'g.png']

    def test_each_once(self, photos):
        assert names(find_images([str(photos / 'b.png'), str(photos), str(photos / 'b.png')])).count('b.png') == 1

    @pytest.mark.parametrize('source', ['none.png', '*.gif', ''])
    def test_what_names_no_image(self, photos, source, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match='no image: '):
            find_images([str(photos), source])


class TestPredict:
    def test_by_the_definition(self, trained, photos):
        """The likeliest classes are those of the softmax over the logits of the transformed image."""
        (prediction,) = predict(trained, [photos / 'b.png'], top_k=2)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(trained.model))
        with torch.no_grad():
            expected = trained.model(transform(Image.open(photos / 'b.png'))[None]).softmax(-1)[0]
        best = expected.argsort(descending=True)[:2].tolist()
        assert prediction.image == str(photos / 'b.png')
        assert [entry.index for entry in prediction.classes] == best
        assert [entry.name for entry in prediction.classes] == [['ape', 'bee', 'cat', 'dog'][i] for i in best]
        assert prediction.classes[0].probability == pytest.approx(expected[best[0]].item(), abs=1e-6)

    def test_batches_and_the_number_of_classes_change_nothing(self, trained, photos):
        paths = find_images([str(photos)])
        whole, parts = predict(trained, paths, 9), predict(trained, paths, 9, batch_size=3)
        assert [prediction.image for prediction in whole] == list(map(str, paths))
        for one, other in zip(whole, parts, strict=True):
            assert [entry.index for entry in one.classes] == [entry.index for entry in other.classes]
            assert sum(entry.probability for entry in one.classes) == pytest.approx(1, abs=1e-5)
            assert len(one.classes) == 4

    def test_without_names(self, photos):
        model = TrainedModel(timm.create_model('test_vit_sape2', num_classes=3, in_chans=1).eval())
        (prediction,) = predict(model, [photos / 'a.jpg'], top_k=1)
        assert prediction.classes[0].name is None
        assert ClassProbability(2, None, 0.5).label == 'class 2'

    def test_images_of_pil_and_single_ones(self, trained, photos):
        """They are predicted as their files are, and keep their places."""
        files = [photos / 'b.png', photos / 'sub' / 'g.png']
        opened = [Image.open(file) for file in files]
        expected = [prediction.classes for prediction in predict(trained, files)]
        (alone,) = predict(trained, files[1:])  # a batch of one may round otherwise than one of two
        mixed = predict(trained, [opened[0], str(files[1])])
        assert [prediction.classes for prediction in mixed] == expected
        assert (mixed[0].image, mixed[1].image) == (opened[0], str(files[1]))
        for single in (opened[1], files[1], str(files[1]), iter(opened[1:])):
            (prediction,) = predict(trained, single)
            assert prediction.classes == alone.classes

    def test_one_line_a_prediction(self):
        classes = [ClassProbability(3, 'cat', 0.75), ClassProbability(1, None, 0.125)]
        assert str(Prediction('a/b.png', classes)) == 'a/b.png: cat 75.0%, class 1 12.5%'
        assert str(Prediction(Image.new('L', (20, 30)), classes[:1])) == 'image of 20x30: cat 75.0%'

    def test_a_model_of_timm_is_left_in_its_mode(self, trained, photos):
        model = timm.create_model('test_vit_sape2', num_classes=4, proj_drop_rate=0.5).train()
        model.load_state_dict(trained.model.state_dict())
        model.pretrained_cfg['label_names'] = ['ape', 'bee', 'cat', 'dog']
        model.blocks[0].eval()
        before = [module.training for module in model.modules()]
        assert predict(model, photos / 'b.png') == predict(trained, photos / 'b.png')
        with pytest.raises(ValueError, match='cannot be read'):
            predict(model, photos / 'notes.txt')
        assert [module.training for module in model.modules()] == before and set(before) == {True, False}

    def test_weights_of_another_type(self, trained, photos):
        model = copy.deepcopy(trained.model).bfloat16()
        (prediction,), (expected,) = predict(model, photos / 'b.png'), predict(trained, photos / 'b.png')
        by_index = {entry.index: entry.probability for entry in expected.classes}
        assert sum(entry.probability for entry in prediction.classes) == pytest.approx(1, abs=1e-5)
        for entry in prediction.classes:
            assert entry.probability == pytest.approx(by_index[entry.index], abs=0.02)

    def test_a_folder_in_place_of_a_model(self, trained, photos, tmp_path):
        timm.models.save_for_hf(trained.model, tmp_path, safe_serialization=True)
        (prediction,), (expected,) = predict(tmp_path, photos / 'b.png'), predict(trained, photos / 'b.png')
        assert [e.index for e in prediction.classes] == [e.index for e in expected.classes]
        assert prediction == predict(str(tmp_path), photos / 'b.png')[0]

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'num_classes': 0}, r'the model has no classes to predict: create it with num_classes=N'),
            ({'in_chans': 4}, r'the model takes images of 4 channels, but files of images have 1 or 3'),
        ],
    )
    def test_models_that_do_not_classify_images(self, photos, options, message):
        with pytest.raises(ValueError, match=message):
            predict(timm.create_model('test_vit_sape2', **options), photos / 'b.png')

    def test_what_is_neither_model_nor_image(self, trained, photos):
        with pytest.raises(ValueError, match=r'a model of timm, a checkpoint, .* is needed, not Linear'):
            predict(torch.nn.Linear(2, 2), photos / 'b.png')
        with pytest.raises(ValueError, match='nowhere is no checkpoint, no folder, no OWNER/NAME on the Hub and no'):
            predict('nowhere', photos / 'b.png')
        with pytest.raises(ValueError, match='an image is a file or an image of PIL, not ndarray'):
            predict(trained, [np.zeros((8, 8, 3), np.uint8)])

    @pytest.mark.parametrize('content', [b'', b'text', 'truncated'])
    def test_what_is_no_image(self, trained, photos, tmp_path, content):
        whole = (photos / 'b.png').read_bytes()
        (tmp_path / 'bad.png').write_bytes(whole[: len(whole) // 2] if content == 'truncated' else content)
        with pytest.raises(ValueError, match=r'bad.png cannot be read as an image: '):
            predict(trained, [photos / 'b.png', tmp_path / 'bad.png'])


def test_contact_sheet(trained, photos):
    """Seven images in rows of five; below an image, its name and its likeliest classes."""
    predictions = predict(trained, find_images([str(photos)]))
    sheet = contact_sheet(predictions)
    assert sheet.size == (5 * 170 + 10, 2 * (160 + 4 * 15 + 10) + 10)
    pixels = np.asarray(sheet.convert('L'))
    assert pixels[10:170, 10:170].std() > 10 and pixels[172:232, 10:170].min() < 128
    assert (pixels[240:, 400:] == 255).all()
    one = contact_sheet(predictions[:1], classes=1)
    assert one.size == (180, 160 + 2 * 15 + 10 + 10)
    assert Path(predictions[0].image).exists()
    opened = [Prediction(Image.open(entry.image), entry.classes) for entry in predictions[:1]]
    shown = np.asarray(contact_sheet(opened, classes=1))
    np.testing.assert_array_equal(shown[:172], np.asarray(one)[:172])


def test_a_contact_sheet_is_to_be_looked_at(trained, photos):
    predictions = predict(trained, [photos / 'b.png'])
    with pytest.raises(ValueError, match='a contact sheet has room for 1000 images, not for 1001'):
        contact_sheet(predictions * 1001)
