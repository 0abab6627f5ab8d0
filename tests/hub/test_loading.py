"""Loading from the Hub with `timm.create_model` and with `open_model`: what works, and what each error says."""

import json
from contextlib import suppress

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from timm_sape2.trained.opening import fingerprint, open_model

SIGN_IN = 'sign in with `hf auth login` or set HF_TOKEN'


@pytest.fixture
def published(hub, package):
    """Repository with the files of a package, which is returned too."""
    hub.put('owner/vit', {path.name: path.read_bytes() for path in package.iterdir()})
    return package


def error(name, **kwargs):
    with pytest.raises(ValueError) as raised:
        open_model(name, **kwargs)
    assert 'hf_' not in str(raised.value)
    return str(raised.value)


class TestLoads:
    @pytest.mark.parametrize('by', ['timm', 'open_model', 'open_model without prefix', 'open_model to train'])
    def test_with_timm_and_with_ours(self, published, package_model, by):
        if by == 'timm':
            model = timm.create_model('hf-hub:owner/vit', pretrained=True).eval()
        elif by == 'open_model to train':
            kwargs = json.loads((published / 'config.json').read_text())['model_args']
            model = open_model('owner/vit', 'test_vit_sape2', kwargs, to_train=True).model.eval()
        else:
            model = open_model('owner/vit' if 'without' in by else 'hf-hub:owner/vit').model
        images = torch.randn(2, 3, 32, 48)
        assert torch.equal(model(images), package_model(images))

    def test_offline_from_the_cache_in_a_fresh_process(self, hub, published, package_model, fresh_process):
        open_model('hf-hub:owner/vit')
        hub.stop()
        code = """
            import timm, timm_sape2
            from timm_sape2.trained.opening import fingerprint
            print(fingerprint(timm.create_model('hf-hub:owner/vit', pretrained=True)))
        """
        assert fresh_process(code, HF_HUB_OFFLINE='1') == fingerprint(package_model)

    @pytest.mark.parametrize('source', ['hf-hub:owner/vit', 'local-dir:{package}'])
    def test_other_size_classes_and_channels_at_once(self, published, package_model, source):
        source = source.format(package=published)
        model = timm.create_model(source, pretrained=True, img_size=(56, 40), num_classes=3, in_chans=1).eval()
        assert model(torch.randn(2, 1, 56, 40)).shape == (2, 3)
        trained = package_model.state_dict()
        for name, tensor in model.state_dict().items():
            if not name.startswith(('head', 'pos_embed', 'patch_embed.proj.weight')):
                assert torch.equal(tensor, trained[name]), name
        colors = trained['patch_embed.proj.weight'].sum(1, keepdim=True)
        torch.testing.assert_close(model.patch_embed.proj.weight, colors)
        assert model.pos_embed.shape == (1, 1 + 7 * 5, 32)

    def test_a_revision(self, hub, published, package_model):
        first = hub.repos['owner/vit'].refs['main']
        hub.put('owner/vit', {'config.json': b'{}'})
        model = open_model(f'hf-hub:owner/vit@{first}').model
        assert fingerprint(model) == fingerprint(package_model)

    def test_a_private_repository_with_its_token(self, hub, published):
        hub.repos['owner/vit'].private = True
        open_model('hf-hub:owner/vit')

    def test_warm_cache_and_the_server_gone(self, hub, published, package_model, no_waiting):
        open_model('hf-hub:owner/vit')
        hub.stop()
        model = open_model('hf-hub:owner/vit').model
        assert fingerprint(model) == fingerprint(package_model)

    def test_range_resume_after_a_cut_connection(self, hub, published, package_model, no_waiting, monkeypatch):
        monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 4096)
        timm.create_model('hf-hub:owner/vit')
        hub.log.clear()
        hub.cuts = 1
        with suppress(ValueError):  # older clients go on in the next call, newer ones at once
            open_model('hf-hub:owner/vit')
        model = open_model('hf-hub:owner/vit').model
        assert fingerprint(model) == fingerprint(package_model)
        ranges = [wanted for method, path, status, wanted in hub.log if path.startswith('/_cdn/')]
        assert ranges[0] is None and int(ranges[1].removeprefix('bytes=').removesuffix('-')) > 0


class TestErrors:
    def test_missing_repository(self, hub, monkeypatch):
        where = f'there is no such repository on {hub.url}, or'
        assert error('hf-hub:owner/none') == f'hf-hub:owner/none: {where} your token gives no access to it'
        monkeypatch.delenv('HF_TOKEN')
        assert error('hf-hub:owner/none') == f'hf-hub:owner/none: {where} it is private: {SIGN_IN}'

    def test_private_repository_without_token(self, hub, published, monkeypatch):
        hub.repos['owner/vit'].private = True
        monkeypatch.delenv('HF_TOKEN')
        where = f'there is no such repository on {hub.url}, or it is private'
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: {where}: {SIGN_IN}'

    def test_wrong_token(self, hub, published, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', 'hf_wrongSecretToken')
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: the Hub does not know your token: {SIGN_IN}'

    def test_missing_revision(self, published):
        message = 'no such revision (branch, tag or commit) in this repository'
        assert error('hf-hub:owner/vit@v9') == f'hf-hub:owner/vit@v9: {message}'

    @pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
    def test_missing_file(self, hub, published, name):
        del hub.repos['owner/vit'].files()[name]
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: the repository has no {name}'

    def test_no_name_of_a_repository(self, hub):
        assert error('hf-hub:owner/a/b') == 'hf-hub:owner/a/b: the name of a repository is OWNER/NAME'

    def test_cold_cache_and_the_server_gone(self, hub, published, no_waiting):
        hub.stop()
        message = f'not in the cache, and {hub.url} cannot be reached'
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: {message}'

    def test_cold_cache_offline(self, hub, published, monkeypatch):
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        message = 'not in the cache, and HF_HUB_OFFLINE is set; unset it to download'
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: {message}'

    def test_connection_that_is_always_cut(self, hub, published, no_waiting):
        timm.create_model('hf-hub:owner/vit')
        hub.cuts = 1000
        message = f'the connection to {hub.url} broke off; try again, what has arrived is kept'
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: {message}'

    def test_a_server_with_a_bad_day(self, hub, published, no_waiting):
        hub.failure = 500
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: not in the cache, and {hub.url} cannot be reached'

    def test_a_file_that_is_too_short(self, hub, published, no_waiting):
        timm.create_model('hf-hub:owner/vit')
        hub.tamper = lambda path, data: data[: len(data) // 2]
        assert error('hf-hub:owner/vit') == 'hf-hub:owner/vit: the Hub sent a file that is too short; try again'

    @pytest.mark.parametrize(
        'damage',
        [lambda data: data[:-100], lambda data: data[:60], lambda data: b'x' * 1000, lambda data: b''],
        ids=['end cut off', 'header cut off', 'garbage', 'empty'],
    )
    def test_truncated_and_garbage_weights(self, hub, published, damage):
        hub.put('owner/vit', {'model.safetensors': damage((published / 'model.safetensors').read_bytes())})
        reason = 'model.safetensors is truncated or no weights; `timm-sape2 hub verify` names the bad files'
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: {reason}'

    def test_wrong_architecture(self, hub, published):
        self.change_config(hub, published, architecture='vit_small_pos_learned')
        tables = [f'blocks.{block}.attn.position.sape2.{axis}_table' for block in (0, 1) for axis in ('column', 'row')]
        reason = f'The checkpoint does not fit, nothing was loaded; unexpected keys: {", ".join(tables)}.'
        loading = 'hf-hub:owner/vit does not load as vit_small_pos_learned'
        assert error('hf-hub:owner/vit') == f'{loading}: {reason}'

    def test_configuration_that_contradicts_itself(self, hub, published):
        self.change_config(hub, published, num_classes=7)
        reason = 'num_classes is 7, but 5 in pretrained_cfg'
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: config.json: {reason}'

    def test_weights_of_another_size(self, hub, published, package_model):
        other = timm.create_model('test_vit_sape2', num_classes=5)
        hub.put('owner/vit', {'model.safetensors': save(other.state_dict())})
        loading = 'hf-hub:owner/vit does not load as test_vit_sape2'
        assert error('hf-hub:owner/vit').startswith(f'{loading}: The checkpoint does not fit, nothing was loaded')

    def test_architecture_of_a_package_that_is_not_imported(self, hub, published):
        self.change_config(hub, published, architecture='vit_of_others', plugin='other_package')
        expected = "unknown architecture 'vit_of_others': import the package that registers it first"
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: {expected}'

    def test_unknown_model_args(self, hub, published):
        self.change_config(hub, published, model_args={'depht': 3})
        message = error('hf-hub:owner/vit')
        assert message.startswith('hf-hub:owner/vit: config.json: model_args do not build test_vit_sape2: ')
        assert "'depht'" in message

    def test_another_source_of_weights(self, hub, published):
        self.change_config(hub, published, pretrained_cfg={'file': '/etc/passwd'})
        message = "pretrained_cfg names another source of weights, 'file'; only the weights beside it are loaded"
        assert error('hf-hub:owner/vit') == f'hf-hub:owner/vit: config.json: {message}'

    @staticmethod
    def change_config(hub, package, **changes):
        config = json.loads((package / 'config.json').read_text())
        hub.put('owner/vit', {'config.json': json.dumps({**config, **changes}).encode()})


def test_one_flipped_byte_loads_unnoticed(hub, published, package_model):
    """Which is why there is `verify`."""
    hub.tamper = lambda path, data: data[:-1] + bytes([data[-1] ^ 1]) if path == 'model.safetensors' else data
    assert fingerprint(timm.create_model('hf-hub:owner/vit', pretrained=True)) != fingerprint(package_model)
