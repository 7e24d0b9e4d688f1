"""Numbers from a seed are torch's."""

import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import draws
from peftax.methods import fourierft, shira

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", [0, 3, 2**40 + 5])
def test_one_stream(seed):
    """Every sort after every other, of sizes with and without a rest of 16."""
    ours, theirs = draws.Generator(seed), torch.Generator().manual_seed(seed)
    for n in (1, 7, 16, 3, 20, 31, 160, 1001):
        np.testing.assert_array_equal(ours.permutation(n), torch.randperm(n, generator=theirs))
        np.testing.assert_allclose(ours.normal((n,)), torch.randn(n, generator=theirs), rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(
            ours.uniform((n, 2), -0.3, 0.7), torch.empty(n, 2).uniform_(-0.3, 0.7, generator=theirs)
        )


@pytest.mark.parametrize("n, first", [(100, 1), (1000, 100), (1000, 999), (2**20, 5000), (40, 80)])
def test_the_first_of_a_permutation(n, first):
    ours, theirs = draws.Generator(777), torch.Generator().manual_seed(777)
    np.testing.assert_array_equal(ours.permutation(n, first), torch.randperm(n, generator=theirs)[:first])
    assert ours.uniform((1,)) == torch.rand(1, generator=theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("low, high", [(-0.41, 0.41), (-0.3, 0.7)])
def test_short_floats(dtype, low, high):
    """Enough that some round up to `high`, which torch makes `low`."""
    theirs = torch.empty(20000, dtype=getattr(torch, dtype))
    theirs.uniform_(low, high, generator=torch.Generator().manual_seed(1))
    ours = draws.Generator(1).uniform((20000,), low, high, dtype=getattr(jnp, dtype))
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float())


@pytest.mark.parametrize("a", [0.0, 5**0.5])
def test_kaiming(a):
    theirs = torch.empty(5, 3, 2)
    torch.nn.init.kaiming_uniform_(theirs, a=a, generator=torch.Generator().manual_seed(1))
    bound = draws.kaiming_bound(6, a)
    np.testing.assert_allclose(draws.Generator(1).uniform((5, 3, 2), -bound, bound), theirs, atol=6e-8)


@pytest.mark.parametrize("seed", [None, 42])
def test_places_of_shira_and_fourierft(seed):
    """SHiRA's mask as PEFT makes it, also without a seed; FourierFT's entries are in no file at all."""
    from peft import FourierFTConfig, ShiraConfig, get_peft_model

    def layer(config):
        return get_peft_model(torch.nn.Sequential(torch.nn.Linear(48, 20)), config).base_model.model[0]

    theirs = layer(ShiraConfig(r=3, random_seed=seed, target_modules=["0"])).shira_indices["default"]
    ours = shira.places(shira.UNSEEDED if seed is None else seed, 48, 20, 3)
    np.testing.assert_array_equal(ours.T, theirs)
    seed = 777 if seed is None else seed
    config = FourierFTConfig(n_frequency=50, random_loc_seed=seed, target_modules=["0"])
    np.testing.assert_array_equal(fourierft.places(seed, 48, 20, 50).T, layer(config).indices["default"])
