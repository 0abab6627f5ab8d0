"""The page with biases: what is in it, and what a browser shows when the pointer moves."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch

from timm_sape2.positions import ENCODINGS
from timm_sape2.positions.base import BIAS_HOOKS
from timm_sape2.studies.bias_maps.biases import attention_biases
from timm_sape2.studies.bias_maps.of_images import SeenImage
from timm_sape2.studies.bias_maps.page import (
    bias_page,
    check_page_size,
    encoded_bias,
    model_name,
    sign_of_bias,
)

ROWS, COLUMNS, BLOCKS, HEADS = 7, 9, 2, 2
BROWSER_FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
WIDE, PHONE = {'width': 1280, 'height': 900}, {'width': 390, 'height': 844}


def page_images(model, *names):
    """Noise, a different image for every name, with its biases in both blocks."""
    images = torch.randn(len(names), 3, 56, 72)
    biases = attention_biases(model, images, [0, 1])
    bias = torch.stack([biases[0], biases[1]], 1).numpy()
    shown = images.sigmoid().permute(0, 2, 3, 1).numpy()
    return [SeenImage(name, *one) for name, *one in zip(names, shown, bias, strict=True)]


def data_of(page):
    """What a page has to show."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(data)


def decoded(encoded):
    """The numbers that the page computes from codes, (blocks, heads, N * N), NaN for patches that are not seen."""
    low, high = np.array(encoded['ranges']).transpose(2, 0, 1)[..., None]
    codes = np.frombuffer(base64.b64decode(encoded['codes']), np.uint8).reshape(*low.shape[:2], -1)
    return np.where(codes == 255, np.nan, low + (high - low) / 254 * codes)


class TestContent:
    def test_numbers_are_kept_to_a_fraction_of_their_range(self):
        bias = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 2, 2)).astype(np.float32)
        bias[1] *= 100
        kept = decoded(encoded_bias(bias))
        flat = bias.reshape(2, 3, 16)
        tolerance = 0.002 * (flat.max(-1) - flat.min(-1))[..., None]
        assert (np.abs(kept - flat) <= tolerance).all()

    def test_lowest_and_highest_are_exact(self):
        bias = np.array([0.0, 0.1, 0.2, 7.3]).reshape(1, 1, 1, 2, 1, 2)
        kept = decoded(encoded_bias(bias))[0, 0]
        assert kept[0] == 0 and kept[3] == pytest.approx(7.3, abs=1e-12)

    def test_a_constant(self):
        assert (decoded(encoded_bias(np.full((1, 1, 1, 2, 1, 2), 0.5))) == 0.5).all()

    def test_what_is_not_seen_leaves_the_range_alone(self):
        kept = decoded(encoded_bias(np.array([0.0, -1e4, -1.0, -5e3]).reshape(1, 1, 1, 2, 1, 2)))[0, 0]
        np.testing.assert_allclose(kept, [0, np.nan, -1, np.nan])

    @pytest.mark.parametrize(('numbers', 'sign'), [([0, 2], 'more'), ([-2, 0], 'less'), ([-1, 3], 'both')])
    def test_sign(self, numbers, sign):
        assert sign_of_bias([encoded_bias(np.reshape(np.float32(numbers), (1, 1, 1, 1, 1, 2)))]) == sign

    def test_it_needs_no_other_file(self, tiny_vit):
        model = tiny_vit()
        page = bias_page(model, page_images(model, 'a'), [0, 1])
        assert not re.findall(r'https?:|<link|<iframe|@import|(?:src|href)="(?!data:)|fetch\(|import\(', page)

    def test_names_are_no_markup(self, tiny_vit):
        model = tiny_vit()
        page = bias_page(model, page_images(model, '</script><b>x'), [0, 1])
        assert data_of(page)['images'][0]['name'] == '</script><b>x'

    def test_the_same_bias_is_there_once(self, tiny_vit):
        for position, count in (('alibi', 1), ('sape2', 2)):
            model = tiny_vit(position)
            data = data_of(bias_page(model, page_images(model, 'a', 'b'), [0, 1]))
            assert len(data['maps']) == count
            assert any('same in these images' in text for text in data['words']) == (count == 1)
            assert any('every image has its own' in text for text in data['words']) == (count == 2)

    def test_words_of_sape2(self, tiny_vit):
        model = tiny_vit('learned+sape2')
        data = data_of(bias_page(model, page_images(model, 'a'), [0, 1]))
        assert data['effect'] == 'dark means more attention, white that nothing is added.'
        assert data['words'][0].startswith('The bias of SaPE2 is a distance')
        assert 'their row and their column' in data['words'][0]
        assert 'What learned does to tokens, queries or keys is not in it.' in data['words']

    def test_words_of_its_variants(self, tiny_vit):
        model = tiny_vit('sape2', position_args={'sape2': {'distance': 'squared', 'axes': 'y'}})
        first, *others = data_of(bias_page(model, page_images(model, 'a'), [0, 1]))['words']
        assert 'is a squared distance' in first and 'along their column.' in first
        assert not any('is not in it' in text for text in others)

    @pytest.mark.parametrize('position', [name for name, e in ENCODINGS.items() if e.overrides(*BIAS_HOOKS)])
    def test_words_of_every_encoding(self, tiny_vit, position):
        model = tiny_vit(position)
        data = data_of(bias_page(model, page_images(model, 'a'), [0, 1]))
        is_distance = position == 'sape2'
        assert (data['words'][0] == f'Shown is the position bias of {position}.') != is_distance
        assert any('distance' in text for text in data['words']) == is_distance
        assert data['sign'] == {'alibi': 'less', 'lookhere': 'less', 'sape2': 'more'}.get(position, data['sign'])
        assert ('Gray' in data['effect']) == (position == 'lookhere')

    def test_words_of_a_sum(self, tiny_vit):
        model = tiny_vit('sape2+alibi')
        data = data_of(bias_page(model, page_images(model, 'a'), [0, 1]))
        assert data['words'][0] == 'Shown is the position bias of sape2 and alibi, summed.'

    def test_words_of_the_last_block(self, tiny_vit):
        """Only the class token is read after it, so a bias between patches has no effect in it."""
        model = tiny_vit('sape2')
        images = page_images(model, 'a')
        texts = data_of(bias_page(model, images, [0, 1]))['words']
        assert any(text.startswith('Block 1 is last: only the class token') for text in texts)
        first_block = [SeenImage(name, image, bias[:1]) for name, image, bias in images]
        texts = data_of(bias_page(model, first_block, [0]))['words']
        assert any(text.startswith('Block 1 is left out: only the class token') for text in texts)
        model = tiny_vit('sape2', global_pool='avg')
        texts = data_of(bias_page(model, page_images(model, 'a'), [0, 1]))['words']
        assert not any('class token' in text for text in texts)

    def test_what_it_opens_with(self, tiny_vit):
        model = tiny_vit()
        images = page_images(model, 'a')
        assert data_of(bias_page(model, images, [0, 1]))['start'] == {'block': 1, 'head': -1, 'patch': [3, 4]}
        start = data_of(bias_page(model, images, [0, 1], head=0, patch=(0, 8)))['start']
        assert start == {'block': 1, 'head': 0, 'patch': [0, 8]}

    def test_names_of_models(self, tiny_vit):
        model = tiny_vit()
        assert model_name(model) == 'test_vit_sape2'
        model.pretrained_cfg = {'architecture': 'vit_x', 'tag': 'cifar10'}
        assert model_name(model) == 'vit_x.cifar10'

    def test_more_than_a_browser_can_open(self):
        check_page_size(2, 12, 12, (14, 14))
        with pytest.raises(ValueError, match=r'would have 1040 MB, more than 100: choose fewer images or blocks'):
            check_page_size(2, 24, 16, (28, 36))


@pytest.fixture(scope='module')
def browser():
    """A Chromium without a window."""
    reason = "the page is tested in a browser with playwright: pip install 'timm_sape2[dev]'"
    playwright = pytest.importorskip('playwright.sync_api', reason=reason)
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('no Chromium or Chrome here to test the page in')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
        yield browser
        browser.close()


def pixels_of(canvas):
    """Colours of a canvas with a pixel for every patch, (rows, columns, 3)."""
    script = 'c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]'
    return np.reshape(canvas.evaluate(script), (ROWS, COLUMNS, 4))[..., :3]


class Opened:
    """A page in a browser, as a person has it."""

    def __init__(self, page, images):
        self.page = page
        self.images = images

    def patch(self, kind, index, row, column):
        """The middle of a patch of the image ('picture') or of the map ('map'), in pixels of the window."""
        box = self.page.locator(f'.{kind}').nth(index).bounding_box()
        return box['x'] + box['width'] * (column + 0.5) / COLUMNS, box['y'] + box['height'] * (row + 0.5) / ROWS

    def point(self, kind, index, row, column):
        self.page.mouse.move(*self.patch(kind, index, row, column))

    def readout(self, index=0):
        """Lines below an image."""
        return self.page.locator('.readout').nth(index).inner_text().splitlines()

    def query(self, index=0):
        """The patch that attends, as its frame stands in the image and in the map."""
        frames = self.page.locator('.panel').nth(index).locator('.frame.query')
        places = frames.evaluate_all(
            'frames => frames.map(f => ["row", "column"].map(n => f.style.getPropertyValue(`--${n}`)))'
        )
        assert places[0] == places[1]
        row, column = map(int, places[0])
        assert self.readout(index)[0].startswith(f'From row {row}, column {column}')
        return row, column

    def number(self, index=0):
        """The bias that is read out."""
        bias = re.search('bias (.*?),', self.readout(index)[1])[1]
        return float(bias.replace('\N{MINUS SIGN}', '-'))

    def pixels(self, index=0):
        """Colours of the map, (rows, columns, 3)."""
        return pixels_of(self.page.locator('.map canvas').nth(index))

    def bias(self, query, index=0, blocks=slice(None), heads=slice(None)):
        """What the map of a query must be, (rows, columns)."""
        bias = self.images[index].bias[blocks, heads].reshape(-1, ROWS, COLUMNS, ROWS, COLUMNS)
        return bias.mean(0, dtype=float)[query]

    def control(self, name):
        """What a slider says."""
        return self.page.locator(f'#{name}-name').inner_text()


@pytest.fixture
def opened(browser, tiny_vit, tmp_path):
    """Function that opens a page of a model in a window; there must be no error and no request."""
    contexts, troubles = [], []

    def open_page(position='learned+sape2', names=('deer.png', 'horse.png'), window=WIDE, **settings):
        model = tiny_vit(position)
        images = page_images(model, *names)
        file = tmp_path / 'page.html'
        file.write_text(bias_page(model, images, [0, 1]), encoding='utf-8')
        context = browser.new_context(viewport=window, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on('request', lambda request: troubles.append(request.url))
        page.on('console', lambda message: troubles.append(message.text))
        page.on('pageerror', lambda error: troubles.append(str(error)))
        page.goto(file.as_uri())
        assert troubles.pop(0) == file.as_uri()
        return Opened(page, images)

    yield open_page
    for context in contexts:
        context.close()
    assert [trouble for trouble in troubles if not trouble.startswith('data:image/png')] == []


class TestBrowser:
    def test_pointing_at_a_patch_shows_its_map(self, opened):
        view = opened()
        assert view.query() == (3, 4)
        before = view.pixels()
        for row, column in ((0, 0), (5, 7), (6, 8)):
            view.point('picture', 0, row, column)
            assert view.query() == (row, column)
            bias = view.bias((row, column), blocks=1)
            assert view.number() == pytest.approx(bias.max(), rel=0.01)
            key = np.unravel_index(bias.argmax(), bias.shape)
            assert 'most to row {}, column {}: '.format(*key) in view.readout()[1]
            pixels = view.pixels()
            assert (pixels[row, column] == 255).all(), 'white is no bias, and SaPE2 has none to the patch itself'
            brightness = pixels.sum(-1)
            order = bias.ravel().argsort()
            assert (np.diff(brightness.ravel()[order]) <= 3).all(), 'dark is more'
            assert brightness.min() < 500 and (pixels != before).any()
            before = pixels

    def test_pointing_at_the_map_reads_its_numbers(self, opened):
        view = opened()
        view.point('picture', 0, 2, 5)
        view.page.mouse.click(*view.patch('picture', 0, 2, 5))
        bias = view.bias((2, 5), blocks=1)
        for row, column in ((6, 0), (2, 5), (0, 8)):
            view.point('map', 0, row, column)
            assert view.number() == pytest.approx(bias[row, column], abs=0.01 * bias.max())
            factor = np.exp(bias[row, column])
            assert float(view.readout()[1].split()[-1]) == pytest.approx(factor, rel=0.1)
            assert ('to itself' in view.readout()[1]) == ((row, column) == (2, 5))
        view.page.mouse.move(1, 1)
        assert view.readout()[1].startswith('most to')

    def test_a_click_keeps_the_patch(self, opened):
        view = opened()
        view.page.mouse.click(*view.patch('picture', 0, 1, 1))
        view.point('picture', 0, 5, 5)
        assert view.query() == (1, 1) and view.readout()[0].endswith('(kept)')
        view.page.keyboard.press('Escape')
        view.point('picture', 0, 5, 6)
        assert view.query() == (5, 6) and not view.readout()[0].endswith('(kept)')
        for _ in range(2):
            view.page.mouse.click(*view.patch('picture', 0, 2, 2))
        view.point('picture', 0, 4, 4)
        assert view.query() == (4, 4), 'a second click lets it go'

    def test_two_images(self, opened):
        view = opened()
        left, right = (view.page.locator('.panel').nth(index).bounding_box() for index in (0, 1))
        assert left['y'] == right['y'] and left['x'] + left['width'] <= right['x']
        assert view.page.locator('figcaption').all_inner_texts() == ['deer.png', 'horse.png']
        view.point('picture', 0, 1, 2)
        assert view.query(0) == view.query(1) == (1, 2)
        for index in (0, 1):
            assert view.number(index) == pytest.approx(view.bias((1, 2), index, blocks=1).max(), rel=0.01)
        view.page.keyboard.press('l')
        view.point('picture', 1, 6, 3)
        assert (view.query(0), view.query(1)) == ((1, 2), (6, 3))
        view.page.keyboard.press('l')
        assert view.query(0) == (6, 3), 'that of the image that was pointed at'

    @pytest.mark.parametrize('how', ['slider', 'keys'])
    def test_blocks_and_heads(self, opened, how):
        view = opened()
        assert (view.control('block'), view.control('head')) == ('1', 'mean of 2')

        def expect(block, head, blocks, heads):
            assert (view.control('block'), view.control('head')) == (block, head)
            bias = view.bias((3, 4), blocks=blocks, heads=heads)
            assert view.number() == pytest.approx(bias.max(), rel=0.01)

        def press(name, key, of_slider):
            if how == 'slider':
                view.page.locator(f'#{name}').press(of_slider)
            else:
                view.page.keyboard.press(key)

        every = slice(None)
        expect('1', 'mean of 2', 1, every)
        press('head', 'h', 'ArrowRight')
        expect('1', '0', 1, 0)
        press('head', 'h', 'ArrowRight')
        expect('1', '1', 1, 1)
        press('block', 'Shift+B', 'ArrowLeft')
        expect('0', '1', 0, 1)
        press('block', 'Shift+M', 'Home')
        expect('mean of 2', '1', every, 1)
        press('head', 'm', 'Home')
        expect('mean of 2', 'mean of 2', every, every)
        press('block', 'b', 'ArrowRight')
        expect('0', 'mean of 2', 0, every)
        assert view.query() == (3, 4), 'the arrows of a slider move no patch'

    def test_keys_go_round(self, opened):
        view = opened()
        seen = []
        for _ in range(BLOCKS + 1):
            view.page.keyboard.press('b')
            seen.append(view.control('block'))
        assert seen == ['mean of 2', '0', '1']
        view.page.keyboard.press('Shift+H')
        assert view.control('head') == '1'

    def test_arrows_move_the_patch_up_to_the_edge(self, opened):
        view = opened(names=['deer.png'])
        view.page.keyboard.press('ArrowDown')
        view.page.keyboard.press('ArrowLeft')
        assert view.query() == (4, 3)
        assert view.number() == pytest.approx(view.bias((4, 3), blocks=1).max(), rel=0.01)
        for _ in range(ROWS):
            view.page.keyboard.press('ArrowUp')
        assert view.query() == (0, 3)
        for _ in range(COLUMNS):
            view.page.keyboard.press('ArrowRight')
        assert view.query() == (0, 8)

    def test_arrows_move_that_of_the_image_in_focus(self, opened):
        view = opened()
        view.page.locator('#together').uncheck()
        view.page.locator('.picture').nth(1).focus()
        view.page.keyboard.press('ArrowRight')
        assert (view.query(0), view.query(1)) == ((3, 4), (3, 5))

    def test_scale(self, opened):
        view = opened()
        ends = view.page.locator('#ends div')

        def highest():
            return float(ends.last.locator('b').inner_text().replace('+', ''))

        means = [image.bias[1].mean(0).max() for image in view.images]
        assert ends.first.inner_text().split() == ['0', 'nothing', 'added']
        assert highest() == pytest.approx(max(means), rel=0.01)
        view.page.keyboard.press('s')
        assert highest() == pytest.approx(max(image.bias.max() for image in view.images), rel=0.01)

    def test_the_map_over_the_image(self, opened):
        view = opened()
        tint = view.page.locator('.tint').first
        assert not tint.is_visible()
        view.page.locator('#tint').check()
        assert tint.is_visible()
        assert (pixels_of(tint) == view.pixels()).all()

    def test_more_and_less(self, opened):
        view = opened('relbias', names=['deer.png'])
        view.page.mouse.click(*view.patch('picture', 0, 2, 5))
        bias, pixels = view.bias((2, 5), blocks=1), view.pixels()
        red, _, blue = pixels.transpose(2, 0, 1)
        strong = np.abs(bias) > 0.1 * np.abs(bias).max()
        assert (bias[strong] < 0).any() and (bias[strong] > 0).any()
        assert ((red > blue) == (bias > 0))[strong].all()
        assert 'red means more attention, blue less' in view.page.locator('.lead').inner_text()
        row, column = np.unravel_index(bias.argmin(), bias.shape)
        view.point('map', 0, row, column)
        assert view.number() == pytest.approx(bias.min(), rel=0.02)

    def test_what_is_not_looked_at(self, opened):
        view = opened('lookhere', names=['deer.png'])
        for index, hides in ((0, True), (1, True)):
            view.page.locator('#head').fill(str(index + 1))
            unseen = view.bias((3, 4), blocks=1, heads=index) < -1e3
            assert unseen.any() == hides
            assert ((view.pixels() == 128).all(-1) == unseen).all()
        view.page.mouse.click(*view.patch('picture', 0, 3, 4))
        row, column = np.argwhere(unseen)[0]
        view.point('map', 0, row, column)
        assert view.readout()[1].endswith('no attention at all')
        view.page.keyboard.press('m')
        heads = view.images[0].bias[1, :, 3, 4]
        assert ((view.pixels() == 128).all(-1) == (heads < -1e3).all(0)).all()

    def test_a_phone(self, opened):
        view = opened(window=PHONE, has_touch=True, is_mobile=True)
        assert view.page.evaluate('document.documentElement.scrollWidth') <= PHONE['width']
        for kind in ('picture', 'map'):
            box = view.page.locator(f'.{kind}').first.bounding_box()
            assert box['y'] + box['height'] < PHONE['height'], 'seen without scrolling'
            assert box['width'] / COLUMNS > 16, 'a finger hits a patch'
        view.page.touchscreen.tap(*view.patch('picture', 0, 5, 1))
        assert view.query() == (5, 1)
        view.page.touchscreen.tap(*view.patch('picture', 0, 1, 6))
        assert view.query() == (1, 6)
        view.page.touchscreen.tap(*view.patch('map', 0, 0, 0))
        bias = view.bias((1, 6), blocks=1)
        assert view.number() == pytest.approx(bias[0, 0], abs=0.01 * bias.max())

    def test_dark_and_light(self, opened):
        def brightness(view):
            script = 'getComputedStyle(document.body).backgroundColor'
            return sum(map(int, re.findall(r'\d+', view.page.evaluate(script))[:3]))

        light, dark = opened(color_scheme='light'), opened(color_scheme='dark')
        assert brightness(dark) < 150 < 600 < brightness(light)
        for view, name in ((light, 'Dark'), (dark, 'Light')):
            assert view.page.locator('#theme').inner_text() == name
            view.page.locator('#theme').click()
        assert brightness(light) < 150 < 600 < brightness(dark)

    def test_a_name_that_looks_like_markup(self, opened):
        view = opened(names=['</script><b>x</b>.png'])
        assert view.page.locator('figcaption').inner_text() == '</script><b>x</b>.png'
