"""Numbers are torch 2.13's; tests/parity/draws_test.py compares with torch itself."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import draws


def test_permutation():
    draw = draws.Generator(3)
    assert draw.permutation(10).tolist() == [6, 0, 3, 7, 8, 5, 1, 9, 2, 4]
    assert draw.permutation(5).tolist() == [4, 3, 2, 0, 1]
    assert draws.Generator(3).permutation(1).tolist() == [0] and draws.Generator(3).permutation(0).tolist() == []


@pytest.mark.parametrize("n, first", [(10, 4), (1000, 3), (1000, 100), (1000, 500), (5, 9)])
def test_the_first_of_a_permutation_and_what_is_drawn_after(n, first):
    few, all_ = draws.Generator(3), draws.Generator(3)
    assert few.permutation(n, first).tolist() == all_.permutation(n)[:first].tolist()
    assert few.uniform((1,)) == all_.uniform((1,))


def test_few_of_many_is_quick():
    start = time.perf_counter()
    found = draws.Generator(777).permutation(2**27, 1000)
    assert time.perf_counter() - start < 1.0
    assert len(set(found.tolist())) == 1000 and found.max() < 2**27


def test_a_large_one_follows_another_rule():
    draw = draws.Generator(9)
    assert draw.permutation(214_748_364, 4).tolist() == [42849823, 142754008, 144913577, 165648139]
    np.testing.assert_array_equal(draw.uniform((1,)), np.float32([0.11069130897521973]))


def test_too_much_is_refused():
    with pytest.raises(ValueError, match="permutation of 214748364 entries"):
        draws.Generator(0).permutation(214_748_364)


def test_uniform():
    draw = draws.Generator(3)
    np.testing.assert_array_equal(
        draw.uniform((5,), -1, 1),
        np.float32(
            [-0.9914729595184326, -0.7888612747192383, -0.42831504344940186, -0.9460903406143188, -0.056771278381347656]
        ),
    )
    np.testing.assert_array_equal(
        draw.uniform((3,)), np.float32([0.06011629104614258, 0.7718658447265625, 0.7436993718147278])
    )


def test_short_floats():
    draw = draws.Generator(1).uniform((4,), dtype=jnp.bfloat16)
    assert draw.dtype == jnp.bfloat16 and draw.astype(np.float32).tolist() == [
        0.7578125,
        0.279296875,
        0.40234375,
        0.734375,
    ]


def test_only_the_low_bits_of_a_seed_count():
    np.testing.assert_array_equal(
        draws.Generator(2**40 + 5).uniform((2,)), np.float32([0.8302518725395203, 0.12611091136932373])
    )
    assert draws.Generator(2**40 + 5).uniform((1,)) == draws.Generator(5).uniform((1,))


def test_normal_in_blocks_of_16():
    wanted = """-0.07664429396390915 0.35988152027130127 -0.7820168137550354 0.07152773439884186 1.0460227727890015
    0.5221869945526123 -0.16680915653705597 0.05303340032696724 0.4046071469783783 0.6112996339797974
    0.7603904008865356 -0.03364326059818268 0.997922420501709 0.45918044447898865 2.436397075653076
    -0.1468081772327423 0.4851140081882477 0.2052343785762787 0.33842819929122925 1.35275399684906"""
    np.testing.assert_allclose(
        draws.Generator(3).normal((4, 5)).reshape(-1), [float(x) for x in wanted.split()], atol=1e-6
    )


def test_normal_pair_by_pair():
    draw = draws.Generator(3)
    wanted = [0.8032760620117188, 0.17483338713645935, 0.08897809684276581, -0.6137180328369141]
    wanted += [0.04618244990706444, -1.3682591915130615, 0.3374950885772705]
    np.testing.assert_allclose(draw.normal((7,)), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        draw.normal((3,)), [1.0111159086227417, -1.435179352760315, 0.9774317741394043], rtol=1e-6
    )
    np.testing.assert_array_equal(draw.uniform((2,)), np.float32([0.6483104228973389, 0.2147577404975891]))


def test_kaiming_bound():
    assert draws.kaiming_bound(6) == pytest.approx(1.0) and draws.kaiming_bound(4, 5**0.5) == pytest.approx(0.5)
