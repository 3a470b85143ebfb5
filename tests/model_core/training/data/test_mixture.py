"""Which samples an epoch has: by weight and temperature, and from seed, stage and epoch alone."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from model_core.errors import ConfigError
from model_core.training.data.mixture import Mixture, mix, permutation
from model_core.training.data.plan import cut_packs, num_steps, packs_of_step

NAMES = ("a", "b", "c")


def test_weights_hold_within_three_sigma_over_10_000_draws() -> None:
    weights = (0.7, 0.2, 0.1)
    which, _ = mix(NAMES, (2000, 5000, 3000), weights).draw(seed=3, stage=0, epoch=0)
    assert len(which) == 10_000
    for number, share in enumerate(weights):
        sigma = (share * (1 - share) / len(which)) ** 0.5
        assert abs((which == number).mean() - share) < 3 * sigma
        # And not only over all of them: any thousand in a row is a fair sample, too.
        for part in which.reshape(10, 1000):
            assert abs((part == number).mean() - share) < 4 * (share * (1 - share) / 1000) ** 0.5


@pytest.mark.parametrize(
    ("weights", "temperature", "shares"),
    [
        ((3, 1, 0), 1.0, (0.75, 0.25, 0)),
        ((4, 1, 0), 2.0, (2 / 3, 1 / 3, 0)),
        ((4, None, None), 1.0, (4 / 6, 1 / 6, 1 / 6)),
        ((None, None, None), 2.0, (1 / 6, 2 / 6, 3 / 6)),  # of the sizes 1, 4, 9
        ((1e-300, 1, 1), 1000.0, None),
    ],
)
def test_shares_are_weights_to_the_inverse_of_the_temperature(weights, temperature, shares) -> None:
    made = mix(NAMES, (1, 4, 9), weights, temperature)
    assert sum(made.shares) == pytest.approx(1)
    if shares is not None:
        assert made.shares == pytest.approx(shares)


def test_a_stage_replaces_the_weights_by_name() -> None:
    made = mix(NAMES, (10, 10, 10), (1, 1, 1), 1.0, {"c": 3, "a": 1})
    assert made.shares == (0.25, 0, 0.75)
    assert made.num_samples == 20


@pytest.mark.parametrize(
    ("sizes", "weights", "stage"),
    [((5, 5, 5), (0, 0, 0), None), ((5, 0, 5), (1, 1, 1), None), ((5, 5, 5), (1, 1, 1), {"d": 1}),
     ((5, 5, 5), (1, 1, 1), {"a": 0}), ((5, 5, 0), (None,) * 3, None)],
)  # fmt: skip
def test_a_mixture_of_nothing_is_refused(sizes, weights, stage) -> None:
    with pytest.raises(ConfigError):
        mix(NAMES, sizes, weights, 1.0, stage)


def test_without_weights_an_epoch_is_each_sample_once() -> None:
    for temperature in (1.0, 4.0):
        which, index = mix(NAMES[:1], (50,), (None,), temperature).draw(0, 0, 0)
        assert sorted(index) == list(range(50))
    which, index = mix(NAMES, (5, 7, 3), (None,) * 3).draw(0, 0, 0)
    drawn = list(zip(which.tolist(), index.tolist(), strict=True))
    everything = [(d, i) for d, size in enumerate((5, 7, 3)) for i in range(size)]
    assert sorted(drawn) == everything
    assert drawn != everything


def test_no_sample_comes_again_before_all_have_come() -> None:
    which, index = mix(NAMES[:2], (3, 27), (0.5, 0.5)).draw(0, 0, 0)
    few = index[which == 0]
    assert len(few) == 15
    for i in range(0, 15, 3):
        assert sorted(few[i : i + 3]) == [0, 1, 2]
    many = index[which == 1]
    assert len(set(many.tolist())) == len(many) == 15


def test_the_draw_depends_on_seed_stage_and_epoch_and_on_nothing_else() -> None:
    made = Mixture((20, 30), (0.5, 0.5))

    def drawn(*at: int) -> bytes:
        return b"".join(one.tobytes() for one in made.draw(*at))

    np.random.default_rng(5).random(7)
    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(1, 2, 3), drawn(2, 2, 3), drawn(1, 3, 3), drawn(1, 2, 4)}) == 4
    assert drawn((1 << 63) - 1, 0, 0) != drawn(0, 0, 0)


def test_the_shuffle_is_the_one_of_old_runs() -> None:
    """A checkpoint's position means something only while this stays as it is, over any upgrade."""
    digest = hashlib.sha256(permutation(1000, 1, 2, 3).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "026e368d15169e88"


def test_packs_are_greedy_and_never_above_a_limit() -> None:
    lengths = np.array([4, 4, 4, 10, 1, 1, 1, 1, 9, 2])
    starts = cut_packs(lengths, batch_size=3, max_tokens=10)
    assert starts.tolist() == [0, 2, 3, 4, 7, 9, 10]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 1000)
    starts = cut_packs(lengths, batch_size=7, max_tokens=128)
    for a, b in itertools.pairwise(starts.tolist()):
        assert 0 < b - a <= 7
        assert lengths[a:b].sum() <= 128
        assert b == len(lengths) or b - a == 7 or lengths[a : b + 1].sum() > 128


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_packs", [1, 6, 7, 20])
def test_every_pack_goes_to_one_process_in_order(num_packs: int, world_size: int) -> None:
    steps = num_steps(num_packs, 2, world_size)
    dealt = [
        [packs_of_step(step, num_packs, 2, rank, world_size) for rank in range(world_size)] for step in range(steps)
    ]
    flat = [p for step in dealt for i in range(2) for rank in step for p in rank[i : i + 1]]
    assert flat == list(range(num_packs))
    assert any(dealt[-1])
