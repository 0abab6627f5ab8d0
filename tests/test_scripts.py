"""Running scripts as Python itself runs them, with the models registered."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from timm_sape2.scripts import ScriptError, run_script


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(source))
    return path


class TestTeach:
    def test_a_script_written_for_timm_finds_our_models(self, tmp_path, capsys):
        script = write(
            tmp_path / 'count.py',
            """
            import argparse
            import timm

            parser = argparse.ArgumentParser()
            parser.add_argument('--model')

            def main():
                model = timm.create_model(parser.parse_args().model, num_classes=10)
                print(type(model).__name__, model.num_classes)

            if __name__ == '__main__':
                main()
            """,
        )
        run_script(script, ['--model', 'test_vit_sape2'])
        assert capsys.readouterr().out == 'PositionVisionTransformer 10\n'

    def test_a_script_may_import_what_lies_beside_it(self, tmp_path, capsys):
        write(tmp_path / 'beside_the_script.py', 'GREETING = "hello"')
        run_script(write(tmp_path / 'greet.py', 'from beside_the_script import GREETING\nprint(GREETING)'))
        assert capsys.readouterr().out == 'hello\n'


PROBE = """
import json, sys
from pathlib import Path
first = 'safe' if getattr(sys.flags, 'safe_path', False) else sys.path[0]
main = sys.modules['__main__']
print(json.dumps([sys.argv, first, __name__, str(Path(__file__)), __spec__, __package__, main.__dict__ is globals()]))
"""


class TestAsPythonDoes:
    @pytest.mark.parametrize('name', ['probe.py', 'deep/down/probe.py', './probe.py', '../here/probe.py', 'no_suffix'])
    def test_argv_path_and_main_are_those_of_python(self, tmp_path, monkeypatch, capsys, name):
        monkeypatch.chdir(write(tmp_path / 'here' / 'probe.py', PROBE).parent)
        write(Path(name), PROBE)
        arguments = ['--help', '--', '', 'a b', '-x=ä']
        run_script(name, arguments)
        assert json.loads(capsys.readouterr().out) == python(name, *arguments)

    @pytest.mark.skipif(os.name == 'nt', reason='symlinks need rights there')
    def test_a_symlink_searches_where_the_script_really_is(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / 'real' / 'probe.py', PROBE)
        Path('link.py').symlink_to('real/probe.py')
        run_script('link.py')
        seen = json.loads(capsys.readouterr().out)
        assert seen == python('link.py')
        assert seen[1] == str(tmp_path.resolve() / 'real')

    def test_a_class_of_the_script_can_be_pickled(self, tmp_path):
        script = write(
            tmp_path / 'sample.py',
            """
            import pickle
            from pathlib import Path

            class Sample:
                pass

            assert isinstance(pickle.loads(pickle.dumps(Sample())), Sample)
            Path(__file__).with_name('done').touch()
            """,
        )
        run_script(script)
        assert (tmp_path / 'done').exists()

    def test_only_the_first_entry_of_the_path_is_replaced(self, tmp_path, capsys):
        run_script(write(tmp_path / 'path.py', 'import json, sys\nprint(json.dumps(sys.path))'))
        assert json.loads(capsys.readouterr().out) == [str(tmp_path.resolve()), *sys.path[1:]]

    def test_a_safe_path_is_left_alone(self, tmp_path, monkeypatch, capsys):
        flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if not name.startswith('_')}
        monkeypatch.setattr(sys, 'flags', SimpleNamespace(**{**flags, 'safe_path': True}))
        run_script(write(tmp_path / 'path.py', 'import sys\nprint(sys.path)'))
        assert capsys.readouterr().out == f'{sys.path}\n'

    def test_the_encoding_that_a_script_declares_is_used(self, tmp_path, capsys):
        script = tmp_path / 'latin.py'
        script.write_bytes('# coding: latin-1\nprint("ä")\n'.encode('latin-1'))
        run_script(script)
        assert capsys.readouterr().out == 'ä\n'

    @pytest.mark.parametrize('code', ['', '0', '3', '"out of data"', 'None', '[1]'])
    def test_exit_codes_come_out_untouched(self, tmp_path, code):
        script = write(tmp_path / 'leave.py', f'import sys\nsys.exit({code})')
        with pytest.raises(SystemExit) as leaving:
            run_script(script)
        assert leaving.value.code == (eval(code) if code else None)

    def test_errors_come_out_untouched_and_speak_of_the_script(self, tmp_path):
        script = write(tmp_path / 'fail.py', 'def load():\n    raise ValueError("bad data")\nload()')
        with pytest.raises(ValueError, match='bad data') as failure:
            run_script(script)
        assert type(failure.value) is ValueError
        assert Path(failure.traceback[-1].path) == script

    @pytest.mark.parametrize('end', ['pass', 'raise SystemExit(1)', '1 / 0'])
    def test_the_process_is_afterwards_as_before(self, tmp_path, end):
        meddle = "import sys\nsys.path.append('x')\nsys.path[0] = 'y'\nsys.argv[:] = []\n"
        before = list(sys.argv), list(sys.path), sys.modules['__main__']
        with contextlib.suppress(SystemExit, ZeroDivisionError):
            run_script(write(tmp_path / 'meddle.py', meddle + end))
        assert (sys.argv, sys.path, sys.modules['__main__']) == before


def python(*command: str) -> object:
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


class TestCheckoutOfTimm:
    """Scripts that lie in a checkout, beside a `timm` folder of another version, which must never be imported."""

    SCRIPT = """
        import sys
        import timm
        from timm.data import ImageDataset
        from timm.utils.onnx import onnx_export
        from torch.utils.data import DataLoader, Dataset

        class Versions(Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                import timm.layers.median_pool
                return timm.__file__, timm.layers.median_pool.__file__, __name__

        if __name__ == '__main__':
            loader = DataLoader(Versions(), batch_size=None, num_workers=1, multiprocessing_context=sys.argv[1])
            [print(*versions) for versions in loader]
        """

    @pytest.fixture
    def script(self, tmp_path):
        write(tmp_path / 'timm' / '__init__.py', 'raise ImportError("the timm of the checkout")')
        write(tmp_path / 'timm' / 'utils' / '__init__.py', '')
        write(tmp_path / 'sibling.py', 'NAME = "sibling"')
        return write(tmp_path / 'validate.py', self.SCRIPT)

    def test_spawned_workers_have_the_installed_timm_too(self, script, monkeypatch, capsys):
        monkeypatch.chdir(script.parent)
        run_script('validate.py', ['spawn'])
        timm_file, submodule_file, name = capsys.readouterr().out.split()
        home = Path(timm.__file__).parent
        assert (Path(timm_file), Path(submodule_file)) == (home / '__init__.py', home / 'layers' / 'median_pool.py')
        assert name == '__mp_main__', 'the worker did not start afresh'

    def test_siblings_of_the_script_are_still_found(self, script, capsys):
        run_script(write(script.with_name('other.py'), 'import sibling, timm.utils.onnx\nprint(sibling.NAME)'))
        assert capsys.readouterr().out == 'sibling\n'


WRAP = """
import sys
import torch
from timm.task import ClassificationTask

task = ClassificationTask(torch.nn.Linear(2, 2), criterion=torch.nn.CrossEntropyLoss())
task.prepare_distributed(device_ids=[torch.device(name) for name in sys.argv[1:]], static_graph=True)
print(type(task.trainable_module).__name__, task.trainable_module.device_ids, task.trainable_module.static_graph)
"""


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='no gloo')
@pytest.mark.usefixtures('process_group')
class TestDistributedOnCpu:
    def test_the_cpu_may_be_named_as_device(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv('WORLD_SIZE', '2')
        run_script(write(tmp_path / 'wrap.py', WRAP), ['cpu'])
        assert capsys.readouterr().out == 'DistributedDataParallel None True\n'

    @pytest.mark.parametrize(('world_size', 'device'), [('1', 'cpu'), ('2', 'cuda:0')])
    def test_all_else_is_left_to_torch(self, tmp_path, monkeypatch, world_size, device):
        monkeypatch.setenv('WORLD_SIZE', world_size)
        with pytest.raises(ValueError, match='device_ids'):
            run_script(write(tmp_path / 'wrap.py', WRAP), [device])

    def test_it_ends_with_the_script(self, tmp_path, monkeypatch):
        monkeypatch.setenv('WORLD_SIZE', '2')
        before = DistributedDataParallel.__init__
        with pytest.raises(SystemExit):
            run_script(write(tmp_path / 'leave.py', 'raise SystemExit(1)'))
        assert DistributedDataParallel.__init__ is before
        with pytest.raises(ValueError, match='device_ids'):
            DistributedDataParallel(torch.nn.Linear(2, 2), device_ids=[torch.device('cpu')])


class TestBadInput:
    def test_no_such_file(self, tmp_path):
        with pytest.raises(ScriptError, match=r'^cannot run .*train\.py: No such file or directory$'):
            run_script(tmp_path / 'train.py')

    def test_a_folder(self, tmp_path):
        with pytest.raises(ScriptError, match=r'^cannot run '):
            run_script(tmp_path)

    @pytest.mark.skipif(os.name == 'nt', reason='symlinks need rights there')
    def test_a_file_that_cannot_be_read(self, tmp_path):
        (tmp_path / 'loop').symlink_to('loop')
        with pytest.raises(ScriptError, match=r'^cannot run .*loop: '):
            run_script(tmp_path / 'loop')

    def test_not_python(self, tmp_path):
        with pytest.raises(SyntaxError) as failure:
            run_script(write(tmp_path / 'notes.txt', 'dear diary,'))
        assert failure.value.filename == str(tmp_path / 'notes.txt')

    def test_nothing_is_touched_before_the_script_is_known_to_run(self, tmp_path):
        before = list(sys.argv), list(sys.path), sys.modules['__main__']
        with pytest.raises(ScriptError):
            run_script(tmp_path / 'train.py', ['x'])
        assert (sys.argv, sys.path, sys.modules['__main__']) == before
