"""`timm-sape2 visualize` draws the model, the images and the patches that were asked for."""

import argparse
import base64
import io
import json
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_sape2.__main__ import main
from timm_sape2.hub.package import write_package
from timm_sape2.studies.bias_maps import of_images
from timm_sape2.studies.bias_maps.biases import attention_biases
from timm_sape2.studies.bias_maps.drawing import draw_bias_maps
from timm_sape2.studies.bias_maps.head_grid import draw_head_grid
from timm_sape2.trained.opening import open_model

MODEL = 'vit_compact_pos_sape2_patch4_32'


@pytest.fixture
def photo(tmp_path):
    """An image of noise, 32 pixels high and wide."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


@pytest.fixture
def trained():
    """A model whose biases are not small."""
    model = timm.create_model(MODEL, position='learned+sape2', depth=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'position.' in name or 'qkv.weight' in name:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture
def run_folder(tmp_path, trained):
    """The folder of a run of train.py."""
    kwargs = {'position': 'learned+sape2', 'depth': 3}
    args = argparse.Namespace(
        model=MODEL,
        model_kwargs=kwargs,
        num_classes=10,
        in_chans=None,
        img_size=None,
        input_size=(3, 32, 32),
        mean=[0.5],
    )
    folder = tmp_path / 'run'
    folder.mkdir()
    torch.save({'state_dict': trained.state_dict(), 'args': args}, folder / 'last.pth.tar')
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: lists of maps and of enlarged patches."""
    calls = []

    def draw(maps, patches):
        calls.append((maps, patches))
        return draw_bias_maps(maps, patches)

    monkeypatch.setattr(of_images, 'draw_bias_maps', draw)
    return calls


def refusal(capsys, *flags):
    """Return the message of a command that is refused."""
    with pytest.raises(SystemExit) as leaving:
        main(['visualize', *map(str, flags)])
    assert leaving.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    return error.removeprefix('timm-sape2: error: ')


def test_a_run_of_train(photo, run_folder, trained, drawn, tmp_path):
    """Model, arguments and preparation of images come from the checkpoint; the block is the last that is trained."""
    output = tmp_path / 'new' / 'maps.png'
    flags = [str(photo), '--checkpoint', str(run_folder), '--patch', '2', '5', '--patch', '7', '0']
    main(['visualize', *flags, '--output', str(output)])
    assert Image.open(output).format == 'PNG'
    assert [path.name for path in output.parent.iterdir()] == ['maps.png']

    (((bias_map,), patches),) = drawn
    assert patches == [(2, 5), (7, 0)]
    assert bias_map.title.splitlines()[1] == 'block 1, mean of 4 heads'
    pixels = np.asarray(Image.open(photo)) / 255
    np.testing.assert_allclose(bias_map.image, pixels, atol=1e-6)
    std = trained.pretrained_cfg['std']
    images = torch.tensor((pixels - 0.5) / std, dtype=torch.float32).permute(2, 0, 1).unsqueeze(0)
    expected = attention_biases(trained, images)[1][0].mean(0)
    np.testing.assert_allclose(bias_map.bias, expected, atol=1e-4)


def test_a_folder_as_it_is_published(photo, run_folder, trained, drawn, tmp_path):
    """config.json and safetensors, as on the Hub, give the maps of the checkpoint that they were made from."""
    published = tmp_path / 'published'
    write_package(published, open_model(str(run_folder)), 'owner/vit')
    for source in (published, run_folder):
        main(['visualize', str(photo), '--checkpoint', str(source), '--output', str(tmp_path / 'maps.png')])
    (((first,), _), ((second,), _)) = drawn
    np.testing.assert_array_equal(first.bias, second.bias)


def test_it_is_a_study_too(photo, run_folder, drawn, tmp_path):
    main(['study', 'visualize', str(photo), '--checkpoint', str(run_folder), '--output', str(tmp_path / 'maps.png')])
    assert len(drawn) == 1


def test_images_blocks_and_heads_are_lines(photo, run_folder, drawn, tmp_path):
    other = tmp_path / 'other.png'
    Image.new('L', (20, 50)).save(other)
    flags = ['--checkpoint', str(run_folder), '--block', '0', '1', '--head', 'mean', '3']
    main(['visualize', str(photo), str(other), *flags, '--output', str(tmp_path / 'maps.png')])
    ((maps, _),) = drawn
    assert [bias_map.title.split('/')[-1] for bias_map in maps] == [
        f'{name}.png\nblock {block}, {head}'
        for name in ('photo', 'other')
        for block in (0, 1)
        for head in ('mean of 4 heads', 'head 3')
    ]


def test_all_heads(photo, run_folder, trained, monkeypatch, tmp_path):
    """A line of heads for every block, in a grid."""
    calls = []

    def draw(maps, patches):
        calls.append((maps, patches))
        return draw_head_grid(maps, patches)

    monkeypatch.setattr(of_images, 'draw_head_grid', draw)
    flags = ['--checkpoint', str(run_folder), '--head', 'mean', 'all', '--block', '0', '1', '--patch', '2', '5']
    main(['visualize', str(photo), *flags, '--output', str(tmp_path / 'maps.png')])
    assert Image.open(tmp_path / 'maps.png').format == 'PNG'
    (((*maps,), patches),) = calls
    assert patches == [(2, 5)]
    assert [head_maps.title.split('/')[-1] for head_maps in maps] == ['photo.png\nblock 0', 'photo.png\nblock 1']
    std = trained.pretrained_cfg['std']
    images = torch.tensor((maps[0].image - 0.5) / std, dtype=torch.float32).permute(2, 0, 1).unsqueeze(0)
    for block, head_maps in enumerate(maps):
        names = [name for name, _ in head_maps.heads]
        assert names == ['mean of 4 heads', 'head 0', 'head 1', 'head 2', 'head 3']
        expected = attention_biases(trained, images)[block][0]
        for (_, bias), heads in zip(head_maps.heads, [expected.mean(0), *expected], strict=True):
            np.testing.assert_allclose(bias, heads, atol=1e-4)


def test_what_is_not_seen_has_no_number(photo, drawn, tmp_path):
    """The heads of LookHere look in one direction, and the colours are for what they see."""
    flags = ['--model', 'vit_compact_pos_lookhere_patch4_32', '--head', '0', 'mean']
    main(['visualize', str(photo), *flags, '--output', str(tmp_path / 'maps.png')])
    one, mean = (bias_map.bias for bias_map in drawn[0][0])
    assert np.isnan(one).any() and -20 < np.nanmin(one) < 0
    assert np.isfinite(mean).all(), 'the last head sees all'


def data_of(page):
    """What a page has to show."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    return json.loads(data)


def test_a_page(photo, run_folder, trained, tmp_path, monkeypatch):
    """All heads of all blocks whose bias has an effect; it needs no matplotlib."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    output = tmp_path / 'new' / 'page.html'
    other = tmp_path / 'other.png'
    Image.new('L', (20, 50)).save(other)
    main(['visualize', str(photo), str(other), '--checkpoint', str(run_folder), '--html', '--output', str(output)])
    assert [path.name for path in output.parent.iterdir()] == ['page.html']
    data = data_of(output)
    assert (data['model'], data['position'], data['trained']) == (MODEL, 'learned+sape2', True)
    assert (data['blocks'], data['heads'], data['grid']) == ([0, 1], 4, [8, 8])
    assert [image['name'].split('/')[-1] for image in data['images']] == ['photo.png', 'other.png']
    assert data['start'] == {'block': 1, 'head': -1, 'patch': [4, 4]}

    pixels = np.asarray(Image.open(photo)) / 255
    picture = base64.b64decode(data['images'][0]['picture'].split(',')[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture))), np.asarray(Image.open(photo)))
    std = trained.pretrained_cfg['std']
    images = torch.tensor((pixels - 0.5) / std, dtype=torch.float32).permute(2, 0, 1).unsqueeze(0)
    expected = torch.cat(list(attention_biases(trained, images, [0, 1]).values())).flatten(2).numpy()
    low, high = np.array(data['maps'][0]['ranges']).transpose(2, 0, 1)[..., None]
    codes = np.frombuffer(base64.b64decode(data['maps'][0]['codes']), np.uint8).reshape(expected.shape)
    tolerance = 0.002 * (expected.max(-1) - expected.min(-1))[..., None] + 1e-4
    assert (np.abs(low + (high - low) / 254 * codes - expected) <= tolerance).all()


def test_what_a_page_opens_with(photo, run_folder, tmp_path):
    output = tmp_path / 'page.html'
    flags = ['--checkpoint', str(run_folder), '--html', '--output', str(output)]
    main(['visualize', str(photo), *flags, '--block', '0', '--head', '3', 'mean', '--patch', '2', '5'])
    data = data_of(output)
    assert (data['blocks'], data['start']) == ([0], {'block': 0, 'head': 3, 'patch': [2, 5]})


def test_a_page_of_an_untrained_model_says_so(photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(['visualize', str(photo), '--model', MODEL, '--html'])
    assert data_of(tmp_path / 'bias_maps.html')['trained'] is False


def test_no_page(photo, run_folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / 'page.html'
    output.write_text('earlier')
    page = ['--html', '--output', output]
    error = refusal(capsys, photo, '--model', 'vit_compact_pos_learned_patch4_32', *page)
    assert error.startswith("position='learned' has no attention bias; encodings with one: ") and 'sape2' in error
    error = refusal(capsys, photo, '--checkpoint', run_folder, '--html', '--output', tmp_path / 'page.png')
    assert error == f'--output must end in .html, not {tmp_path / "page.png"}'
    monkeypatch.setattr(of_images, 'attention_biases', lambda *_: pytest.fail('nothing is computed before'))
    error = refusal(capsys, photo, '--model', 'vit_small_sape2', '--img-size', 576, *page)
    assert error == 'the page would have 148 MB, more than 100: choose fewer images or blocks'
    assert output.read_text() == 'earlier'


def test_weights_alone_at_another_size(photo, trained, drawn, tmp_path):
    """A file that says nothing of its model; SaPE2 goes to a grid of 7x9."""
    save_file(trained.state_dict(), tmp_path / 'weights.safetensors')
    flags = ['--model', MODEL, '--model-kwargs', 'position=learned+sape2', 'depth=3', '--img-size', '28', '36']
    weights = ['--checkpoint', str(tmp_path / 'weights.safetensors')]
    main(['visualize', str(photo), *flags, *weights, '--patch', '6', '8', '--output', str(tmp_path / 'maps.png')])
    assert drawn[0][0][0].bias.shape == (7, 9, 7, 9)
    assert drawn[0][0][0].image.shape == (28, 36, 3)


def test_options_that_weights_alone_do_not_say(photo, drawn, tmp_path):
    """They are given, and nothing is there to compare them with."""
    options = {'sape2': {'target': 'q'}}
    model = timm.create_model(MODEL, position_args=options)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    flags = ['--model', MODEL, '--model-kwargs', f'position_args={options}'.replace(' ', '')]
    weights = ['--checkpoint', str(tmp_path / 'weights.safetensors')]
    main(['visualize', str(photo), *flags, *weights, '--output', str(tmp_path / 'maps.png')])
    assert len(drawn) == 1


def test_dynamic_size(photo, drawn, tmp_path):
    flags = ['--model', MODEL, '--model-kwargs', 'dynamic_img_size=True', '--img-size', '28', '36']
    main(['visualize', str(photo), *flags, '--patch', '6', '8', '--output', str(tmp_path / 'maps.png')])
    assert drawn[0][0][0].bias.shape == (7, 9, 7, 9)


def test_gray_images(photo, drawn, tmp_path):
    flags = ['--model', MODEL, '--model-kwargs', 'in_chans=1', '--output', str(tmp_path / 'maps.png')]
    main(['visualize', str(photo), *flags])
    image = drawn[0][0][0].image
    assert image.shape == (32, 32, 3) and (image[..., 0] == image[..., 2]).all()


def test_warnings(photo, run_folder, tmp_path, caplog):
    """Untrained weights, and a block whose bias was never trained."""
    output = ['--output', str(tmp_path / 'maps.png')]
    main(['visualize', str(photo), '--model', MODEL, *output])
    assert 'The model is untrained, so the maps mean nothing' in caplog.text
    caplog.clear()
    main(['visualize', str(photo), '--checkpoint', str(run_folder), *output])
    assert 'WARNING' not in caplog.text
    main(['visualize', str(photo), '--checkpoint', str(run_folder), '--block', '2', *output])
    assert 'The bias of block 2 was not trained' in caplog.text


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--block 3', 'no bias in block 3: there is one in the blocks 0 to 2'),
        ('--head 4', "no head 4: heads go from 0 to 3, or 'all', or their 'mean'"),
        ('--head 1 median', "no head median: heads go from 0 to 3, or 'all', or their 'mean'"),
        ('--patch 8 0', 'no patch 8 0: rows go from 0 to 7, columns from 0 to 7'),
        ('--patch 0 8', 'no patch 0 8: rows go from 0 to 7, columns from 0 to 7'),
        ('--patch -1 0', "argument --patch: must be a whole number, 0 or more, not '-1'"),
        ('--img-size 30', f'{{run}}/last.pth.tar does not load as {MODEL}: '),
        ('--img-size 8 8 8', '--img-size takes a side, or a height and a width, not 3 numbers'),
        ('--model-kwargs depth', "argument --model-kwargs: must be KEY=VALUE, not 'depth'"),
        ('--output maps.pdf', '--output must end in .png, not maps.pdf'),
        (
            '--model-kwargs position=learned',
            f'{{run}}/last.pth.tar does not load as {MODEL}: '
            "it was trained with position='learned+sape2', not 'learned'",
        ),
        (
            """--model-kwargs position_args={'sape2':{'target':'q'}}""",
            f"{{run}}/last.pth.tar does not load as {MODEL}: it was trained with sape2 target='k', not 'q'",
        ),
    ],
)
def test_bad_input(photo, run_folder, tmp_path, capsys, flags, message):
    output = tmp_path / 'maps.png'
    error = refusal(capsys, photo, '--checkpoint', run_folder, '--output', output, *flags.split())
    assert error.startswith(message.replace('{run}', str(run_folder)))
    assert not output.exists()


def test_bad_files(photo, run_folder, tmp_path, capsys):
    text, cut, empty = (tmp_path / name for name in ('text.png', 'cut.png', 'empty'))
    text.write_text('no picture')
    cut.write_bytes(photo.read_bytes()[:-600])
    empty.mkdir()
    missing, reason = tmp_path / 'missing.png', ' cannot be read as an image:'
    assert refusal(capsys, '--model', MODEL) == 'the following arguments are required: IMAGE'
    assert refusal(capsys, missing, '--model', MODEL) == f'{missing}{reason} No such file or directory'
    assert refusal(capsys, empty, '--model', MODEL) == f'{empty}{reason} Is a directory'
    assert refusal(capsys, photo, text, '--model', MODEL).startswith(f'{text}{reason} cannot identify image file')
    assert refusal(capsys, photo, cut, '--model', MODEL).startswith(f'{cut}{reason} ')
    assert refusal(capsys, photo, '--checkpoint', empty) == f'local-dir:{empty}: no config.json in the folder'
    assert refusal(capsys, photo, '--checkpoint', missing).startswith(f'{missing} is no checkpoint, no folder')
    assert refusal(capsys, photo, '--checkpoint', text) == f'{text} is truncated or no checkpoint'
    error = refusal(capsys, photo, '--model', MODEL, '--output', text / 'maps.png')
    assert error.startswith(f'cannot write to the output folder {text}')


def test_bad_models(photo, run_folder, tmp_path, capsys):
    assert refusal(capsys, photo) == 'which model? Give --checkpoint PATH, or --model NAME for an untrained one'
    weights = tmp_path / 'weights.pth'
    torch.save(timm.create_model('vit_compact_pos_learned_patch4_32').state_dict(), weights)
    assert refusal(capsys, photo, '--checkpoint', weights).endswith(
        'does not say which model it is of: add --model NAME'
    )
    error = refusal(capsys, photo, '--checkpoint', weights, '--model', MODEL)
    assert error.startswith(f'{weights} does not load as {MODEL}: The checkpoint does not fit')
    error = refusal(capsys, photo, '--checkpoint', weights, '--model', 'vit_compact_pos_learned_patch4_32')
    assert error.startswith("position='learned' has no attention bias; encodings with one: ")
    assert 'sape2' in error
    error = refusal(capsys, photo, '--model', 'test_resnet')
    assert error.startswith('the model has no exchangeable position encoding; encodings with one: ')
    assert refusal(capsys, photo, '--model', 'vit_nowhere').startswith('unknown --model vit_nowhere')


def test_an_earlier_picture_survives_an_error(photo, run_folder, tmp_path, capsys):
    output = tmp_path / 'maps.png'
    output.write_bytes(b'earlier')
    refusal(capsys, photo, '--checkpoint', run_folder, '--patch', 9, 9, '--output', output)
    assert output.read_bytes() == b'earlier'


def test_without_matplotlib(monkeypatch, photo, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert refusal(capsys, photo, '--model', MODEL) == "plots need matplotlib: pip install 'timm_sape2[studies]'"
