"""The SaPE2 attention bias."""

from .reference import sape2_bias as sape2_bias
