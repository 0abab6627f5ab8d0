import pytest
import torch

from timm_sape2.ops.sape2.inputs import Inputs, distinct_inputs, empty_like_output


@pytest.fixture
def tensors():
    return torch.randn(6, 2, 3, 5, 4).unbind()


class TestDistinctInputs:
    def test_what_is_another_tensor_again_is_left_out(self, tensors):
        query, key, value, *_ = tensors
        inputs, gates = distinct_inputs(query, key, value, key, query, key)
        assert inputs == Inputs(query, key, value, None, None, None) and gates == 'key'

    def test_others_are_kept(self, tensors):
        inputs, gates = distinct_inputs(*tensors)
        assert all(x is tensor for x, tensor in zip(inputs, tensors, strict=True)) and gates == 'other'

    @pytest.mark.parametrize('rotated', [4, 5])
    def test_one_other_of_the_logits_keeps_both(self, tensors, rotated):
        query, key, value, *_ = tensors
        given = [query, key, value, None, query, key]
        given[rotated] = tensors[rotated]
        inputs, gates = distinct_inputs(*given)
        assert (inputs.logit_query is given[4], inputs.logit_key is given[5], gates) == (True, True, 'none')

    def test_dtype_of_autocast(self, tensors):
        query, key, value, *_ = tensors
        with torch.autocast('cpu', torch.bfloat16):
            inputs, _ = distinct_inputs(query, key, value, key, query, key)
            exact, _ = distinct_inputs(*(x.double() for x in tensors))
        assert [None if x is None else x.dtype for x in inputs] == [torch.bfloat16] * 3 + [None] * 3
        assert {x.dtype for x in exact} == {torch.float64}


def test_empty_like_output():
    x = torch.randn(2, 3, 5, 4)
    assert empty_like_output(x).shape == x.shape and empty_like_output(x).dtype == x.dtype
    empty = empty_like_output(x, torch.float64)
    assert empty.transpose(1, 2).is_contiguous() and empty.dtype == torch.float64
