"""What is an error of the Hub and what is not. (The messages are tested where they occur, in test_loading.py.)"""

import pytest

from timm_sape2.trained.errors import explain, explained


@pytest.mark.parametrize('error', [KeyError('a'), TypeError('b'), ValueError('c'), OSError('d'), RuntimeError('e')])
def test_other_errors_pass_untouched(error):
    assert explain(error) is None
    with pytest.raises(type(error)) as raised, explained('hf-hub:owner/vit'):
        raise error
    assert raised.value is error


def test_interrupts_pass():
    with pytest.raises(KeyboardInterrupt), explained('hf-hub:owner/vit'):
        raise KeyboardInterrupt


def test_the_cause_is_kept():
    cause = OSError('Consistency check failed: file should be of size 3 but has size 2')
    with pytest.raises(ValueError) as raised, explained('owner/vit'):
        raise cause
    assert str(raised.value) == 'owner/vit: the Hub sent a file that is too short; try again'
    assert raised.value.__cause__ is cause
