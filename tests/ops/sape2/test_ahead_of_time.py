"""The kernels compile for GPUs that are not here, without spilling, and their loops do not grow.

A few telling cases; `python tests/ops/sape2/ahead_of_time.py` has all.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name('ahead_of_time.py')
spec = importlib.util.spec_from_file_location('ahead_of_time', SCRIPT)
ahead_of_time = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ahead_of_time)
Compiled = ahead_of_time.Compiled

TARGETS = ('sm_80', 'sm_90', 'sm_100', 'sm_120')
PHASES = ('forward', 'backward')
CASE = 'bfloat16,14x14,64'

INSTRUCTIONS = {
    ('sm_80', 'forward'): 27,
    ('sm_80', 'backward'): 74,
    ('sm_90', 'forward'): 30,
    ('sm_90', 'backward'): 63,
}
"""Most instructions of a lane for a pair of tokens, in the loops over tokens of a pass: the most that Triton 3.6 to 3.9
make of them (25.3, 70.6, 28.2, 61.6), and some. Lower them with the kernels."""


@pytest.fixture(scope='module')
def compiled():
    """What becomes of the kernels that one attention launches, by target."""
    pytest.importorskip('triton')
    for name in ('ptxas', 'cuobjdump'):
        if not ahead_of_time.tool(name).exists():
            pytest.skip(f"Triton's wheel has no {name}")
    process = subprocess.run(
        [sys.executable, SCRIPT, *TARGETS, '--cases', CASE, '--json'],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'},
        timeout=600,
    )
    found = [Compiled(*json.loads(line)) for line in process.stdout.splitlines()]
    assert {kernel.target for kernel in found} == set(TARGETS), process.stderr
    return {target: [kernel for kernel in found if kernel.target == target] for target in TARGETS}


@pytest.mark.parametrize('target', TARGETS)
class TestKernels:
    def test_all_compile(self, compiled, target):
        assert {kernel.phase for kernel in compiled[target]} == {'forward', 'backward'}
        assert [kernel.error for kernel in compiled[target] if kernel.error] == []

    def test_fit_into_shared_memory(self, compiled, target):
        """Into that of the smallest GPUs too, which compile alike."""
        assert 0 < max(kernel.shared for kernel in compiled[target]) <= ahead_of_time.TARGETS['sm_86'].shared

    def test_nothing_spills(self, compiled, target):
        assert [str(kernel) for kernel in compiled[target] if kernel.stack] == []

    def test_launches(self, compiled, target):
        """Two forward; three backward on data-center GPUs since Hopper, which have registers for both roles at once."""
        launched = {phase: {kernel.launch for kernel in compiled[target] if kernel.phase == phase} for phase in PHASES}
        assert {phase: len(launches) for phase, launches in launched.items()} == {
            'forward': 2,
            'backward': 3 if target in ('sm_90', 'sm_100') else 4,
        }


@pytest.mark.parametrize(('target', 'phase'), INSTRUCTIONS)
def test_instructions_a_pair(compiled, target, phase):
    """Of configurations that Triton may choose from, the one with most counts."""
    most = {}
    for kernel in compiled[target]:
        if kernel.phase == phase and kernel.instructions is not None:
            most[kernel.launch] = max(most.get(kernel.launch, 0), kernel.instructions)
    assert 10 < sum(most.values()) <= INSTRUCTIONS[target, phase]


def sass(*code):
    """Machine code as cuobjdump prints it, 16 bytes an instruction."""
    return '\n'.join(f'        /*{16 * i:04x}*/                   {text} ;  /* 0x00 */' for i, text in enumerate(code))


class TestLoopInstructions:
    def test_by_hand(self):
        """Four instructions from the target of the jump to the jump; one forward, and one to itself at the end."""
        code = sass(
            'MOV R1, R2', '@P0 BRA 0x60', 'FADD R1, R1, R2', 'MUFU.EX2 R1, R1', 'NOP', '@!P1 BRA 0x20', 'BRA 0x60'
        )
        assert ahead_of_time.loop_instructions(code) == 4

    def test_loops_in_a_row_are_added(self):
        assert ahead_of_time.loop_instructions(sass('NOP', '@P0 BRA 0x0', 'NOP', 'NOP', '@P0 BRA P1, 0x20')) == 5

    def test_nested_loops_tell_nothing(self):
        assert ahead_of_time.loop_instructions(sass('NOP', 'NOP', '@P0 BRA 0x10', '@P1 BRA 0x0')) is None

    def test_no_loop(self):
        assert ahead_of_time.loop_instructions(sass('NOP', 'EXIT', 'BRA 0x20')) == 0


def test_faults_are_found():
    good = Compiled('sm_86', CASE, registers=255, stack=0, shared=99 * 1024)
    assert good.faults == []
    assert good._replace(target='sm_90', shared=200 * 1024).faults == []
    assert good._replace(stack=8).faults == ['spills 8 bytes']
    assert good._replace(shared=100 * 1024).faults == ['takes 102400 bytes of shared memory of 101376']
    assert good._replace(error='PTXASError: no').faults == ['PTXASError: no']


def test_all_cases_are_what_the_choice_takes():
    from timm_sape2.ops.sape2.attention import HEAD_DIMS, MOST_LINES

    cases = ahead_of_time.all_cases()
    assert len(set(cases)) == len(cases)
    assert {case.dtype for case in cases} == {'bfloat16', 'float16', 'float32'}
    assert (min(case.dim for case in cases), max(case.dim for case in cases)) == HEAD_DIMS
    assert max(max(case.grid) for case in cases) == MOST_LINES
