"""Pushing a checkpoint: what arrives, what it replaces, what is refused before anything is sent."""

import json

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_file_of_safetensors

from timm_sape2.__main__ import main
from timm_sape2.hub import package as package_module
from timm_sape2.hub.push import push_folder
from timm_sape2.trained.opening import open_model

REPO = 'owner/vit_tiny.test'
SIGN_IN = 'sign in with `hf auth login` or set HF_TOKEN'


# Before, the client learned of Xet from the answer of the LFS server.
SINCE_2 = pytest.mark.skipif(int(huggingface_hub.__version__.split('.')[0]) < 2, reason='another protocol')


def push(*arguments):
    return main(['hub', 'push', *map(str, arguments)])


def sent(hub):
    """Methods and paths of requests that change something."""
    return [(method, path) for method, path, *_ in hub.log if method in ('POST', 'PUT')]


@pytest.fixture
def refusal(capsys):
    """Function that pushes what is refused and returns the message."""

    def run(*arguments):
        with pytest.raises(SystemExit) as leaving:
            push(*arguments)
        assert leaving.value.code == 2
        out, error = capsys.readouterr()
        assert 'hf_' not in out + error and error.count('\n') == 1
        return error.removeprefix('timm-sape2: error: ').rstrip('\n')

    return run


class TestArrives:
    @pytest.mark.parametrize('upload_path', ['lfs', pytest.param('xet', marks=SINCE_2)])
    def test_by_the_default_upload_path_and_by_plain_lfs(self, hub, checkpoint, tmp_path, upload_path):
        push(checkpoint, '--to', REPO, '--folder', tmp_path / 'sent')
        written = {path.name: path.read_bytes() for path in (tmp_path / 'sent').iterdir()}
        files = hub.repos[REPO].files()
        assert sorted(files) == sorted(written)
        assert sorted(written) == sorted(set(package_module.FILES) - {'pretrain.yaml'})
        assert any(path.startswith('/_lfs/') for _, path in sent(hub)) == (upload_path == 'lfs')
        assert bool(files['model.safetensors'].xet) == (upload_path == 'xet')
        main(['hub', 'pull', REPO, str(tmp_path / 'pulled')])
        assert {path.name: path.read_bytes() for path in (tmp_path / 'pulled').iterdir()} == written

    def test_what_is_said(self, hub, checkpoint, capsys):
        push(checkpoint, '--to', REPO)
        (_, sha), *_ = hub.repos[REPO].refs.items()
        assert (
            capsys.readouterr().out
            == f"""\
Packed the moving average of the weights of {checkpoint}; they load and give the same logits.
The card gives them the license apache-2.0; --license NAME changes that.
Its classes have no names, as the checkpoint has none; --class-names FILE gives them.
Pushed: {hub.url}/{REPO}/commit/{sha}
Load it, after `import timm, timm_sape2`:
  timm.create_model('hf-hub:{REPO}', pretrained=True)
Verify it:
  timm-sape2 hub verify {REPO}
"""
        )

    def test_one_commit_replaces_card_and_stale_weights(self, hub, checkpoint):
        old = {'README.md': b'by hand', 'pytorch_model.bin': b'old weights', 'notes.txt': b'mine'}
        hub.put(REPO, old)
        commits = len(hub.repos[REPO].commits)
        push(checkpoint, '--to', REPO)
        files = hub.repos[REPO].files()
        assert len(hub.repos[REPO].commits) == commits + 1
        assert 'pytorch_model.bin' not in files
        assert files['README.md'].data.startswith(b'---\n') and files['notes.txt'].data == b'mine'

    def test_files_of_an_earlier_push_go(self, hub, package, tmp_path):
        push_folder(package, REPO)
        for name in ('config.json', 'model.safetensors', 'README.md'):
            (tmp_path / name).write_bytes((package / name).read_bytes())
        push_folder(tmp_path, REPO)
        assert sorted(hub.repos[REPO].files()) == ['README.md', 'config.json', 'model.safetensors']

    def test_the_same_again_changes_nothing(self, hub, checkpoint):
        push(checkpoint, '--to', REPO)
        before = hub.repos[REPO].files()
        push(checkpoint, '--to', REPO)
        after = hub.repos[REPO].files()
        assert {name: blob.oid for name, blob in after.items()} == {name: blob.oid for name, blob in before.items()}

    def test_private(self, hub, checkpoint):
        push(checkpoint, '--to', REPO, '--private')
        assert hub.repos[REPO].private
        push(checkpoint, '--to', REPO, '--private')

    def test_a_branch(self, hub, checkpoint):
        push(checkpoint, '--to', REPO, '--revision', 'next')
        assert not hub.repos[REPO].files('main')
        assert 'model.safetensors' in hub.repos[REPO].files('next')
        push(checkpoint, '--to', REPO, '--revision', 'next')

    def test_a_folder_can_be_pushed_too(self, hub, package):
        push(package, '--to', REPO)
        arrived = hub.repos[REPO].files()
        assert arrived['model.safetensors'].data == (package / 'model.safetensors').read_bytes()
        assert json.loads(arrived['metrics.json'].data)['top1'] == 61.5

    def test_dry_run_sends_nothing(self, hub, checkpoint, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv('HF_TOKEN')
        push(checkpoint, '--to', REPO, '--dry-run')
        assert hub.log == []
        folder = 'output/hub/vit_tiny.test'
        assert capsys.readouterr().out.splitlines()[-1] == (
            f'Nothing was sent. The folder is {folder}, its card {folder}/README.md'
        )
        timm.create_model(f'local-dir:{folder}', pretrained=True)


class TestRefusals:
    def test_no_token(self, hub, checkpoint, refusal, monkeypatch):
        monkeypatch.delenv('HF_TOKEN')
        assert refusal(checkpoint, '--to', REPO) == f'{REPO}: a token with write access is needed: {SIGN_IN}'
        assert hub.log == []

    def test_wrong_token(self, hub, checkpoint, refusal, monkeypatch, caplog):
        monkeypatch.setenv('HF_TOKEN', 'hf_wrongSecretToken')
        with caplog.at_level('DEBUG'):
            assert refusal(checkpoint, '--to', REPO) == f'{REPO}: the Hub does not know your token: {SIGN_IN}'
        assert 'wrongSecretToken' not in caplog.text
        assert sent(hub) == []

    def test_repository_of_somebody_else(self, hub, checkpoint, refusal):
        message = 'your token does not allow this: it needs write access to the repository'
        assert refusal(checkpoint, '--to', 'other/vit') == f'other/vit: {message}'
        hub.put('other/vit', {})
        assert refusal(checkpoint, '--to', 'other/vit') == f'other/vit: {message}'

    def test_private_where_it_is_public(self, hub, checkpoint, refusal):
        hub.put(REPO, {})
        message = 'is public already, --private is for a new repository: change it on its page'
        assert refusal(checkpoint, '--to', REPO, '--private') == f'{REPO} {message}'

    @pytest.mark.parametrize('name', ['vit', 'a/b/c', '/vit', 'owner/', 'owner/vit tiny'])
    def test_names_that_are_none(self, hub, checkpoint, refusal, name):
        assert refusal(checkpoint, '--to', name) == f'the name of a repository is OWNER/NAME, not {name!r}'

    @pytest.mark.parametrize(('content', 'problem'), [(b'caf\xe9\n', 'is not text in UTF-8'), (b' \n', 'is empty')])
    def test_names_of_classes_that_are_none(self, hub, checkpoint, refusal, tmp_path, content, problem):
        (tmp_path / 'names.txt').write_bytes(content)
        message = f'--class-names {tmp_path}/names.txt {problem}'
        assert refusal(checkpoint, '--to', REPO, '--class-names', tmp_path / 'names.txt') == message
        assert hub.log == []

    def test_the_server_gone(self, hub, checkpoint, refusal, no_waiting):
        hub.stop()
        message = f'the connection to {hub.url} broke off; try again, what has arrived is kept'
        assert refusal(checkpoint, '--to', REPO) == f'{REPO}: {message}'

    def test_a_server_with_a_bad_day(self, hub, checkpoint, refusal, no_waiting):
        hub.failure = 503
        message = f'{hub.url} answers 503 Service Unavailable; try again later'
        assert refusal(checkpoint, '--to', REPO) == f'{REPO}: {message}'

    def test_weights_that_do_not_come_back_the_same(self, hub, checkpoint, refusal, monkeypatch, tmp_path):
        def damaged(tensors, path, **kwargs):
            save_file_of_safetensors({**tensors, 'head.bias': tensors['head.bias'] + 1}, path, **kwargs)

        monkeypatch.setattr(package_module, 'save_file', damaged)
        folder = tmp_path / 'sent'
        message = f'{folder} does not load as the model that it was written from; nothing was sent'
        assert refusal(checkpoint, '--to', REPO, '--folder', folder) == message
        assert sent(hub) == []

    def test_what_arrived_differs(self, hub, package, monkeypatch):
        def tree(request, repo_id, revision):
            large = {'oid': '0' * 64, 'size': 1, 'pointerSize': 134}
            return [entry | ({'lfs': large} if 'lfs' in entry else {}) for entry in listed(request, repo_id, revision)]

        listed = hub.tree
        monkeypatch.setattr(hub, 'tree', tree)
        with pytest.raises(ValueError, match=f'{REPO}: the Hub has other content of model.safetensors; push again'):
            push_folder(package, REPO)


def test_no_training_state_and_the_moving_average(package, checkpoint):
    weights = load_file(package / 'model.safetensors')
    trained = torch.load(checkpoint, weights_only=False)
    assert weights.keys() == trained['state_dict_ema'].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, trained['state_dict_ema'][name])
    assert open_model(str(checkpoint), ema=False).weights == 'weights'
