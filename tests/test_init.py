"""What `timm_sape2` exports."""

import subprocess
import sys

import pytest

import timm_sape2


def test_functions_of_commands_are_imported_when_asked_for():
    """Until then their modules are not there, and what they need is not either."""
    code = """
import sys
import timm_sape2
above = {'timm_sape2.trained', 'timm_sape2.studies', 'timm_sape2.models.encoding_table', 'matplotlib'}
assert {'bias_maps', 'encodings', 'predict', 'equip', 'ENCODINGS'} <= set(dir(timm_sape2))
assert not above & set(sys.modules)
from timm_sape2 import encodings
assert 'timm_sape2.models.encoding_table' in sys.modules and 'timm_sape2.trained' not in sys.modules
assert timm_sape2.predict is sys.modules['timm_sape2.trained.prediction'].predict
assert 'timm_sape2.studies' not in sys.modules
assert timm_sape2.bias_maps is sys.modules['timm_sape2.studies.bias_maps.of_images'].bias_maps
assert 'matplotlib' not in sys.modules
assert encodings is timm_sape2.encodings is sys.modules['timm_sape2.models.encoding_table'].encodings
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_what_it_does_not_export():
    with pytest.raises(AttributeError, match="module 'timm_sape2' has no attribute 'predictions'"):
        _ = timm_sape2.predictions
    with pytest.raises(ImportError, match="cannot import name 'predictions'"):
        exec('from timm_sape2 import predictions')
