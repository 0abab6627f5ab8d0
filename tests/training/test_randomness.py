"""The random numbers of an epoch follow from seed, epoch and rank, and can be continued from anywhere."""

import random

import numpy as np
import torch

from timm_sape2.training.randomness import get_random_state, seed_epoch, set_random_state


def draw():
    return random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn(), torch.rand(()).item()


def draw_in(seed, epoch, rank):
    seed_epoch(seed, epoch, rank)
    return draw()


def test_every_epoch_of_every_process_has_its_own_numbers():
    """Not so with the sum of the three, which gives rank 1 of epoch 0 the numbers of rank 0 of epoch 1."""
    assert draw_in(42, 3, 1) == draw_in(42, 3, 1)
    places = [(seed, epoch, rank) for seed in range(3) for epoch in range(3) for rank in range(3)]
    assert len({draw_in(*place) for place in places}) == len(places)


def test_state_survives_a_checkpoint(tmp_path):
    seed_epoch(0, 0, 0)
    draw()
    torch.save(get_random_state(), tmp_path / 'state.pth')
    expected = [draw(), draw()]
    seed_epoch(1, 1, 1)
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert [draw(), draw()] == expected
