import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftax.core import views


@pytest.mark.parametrize(
    "shape, perm, n_in, n_stack, expected",
    [
        ((5, 3), (0, 1), 1, 0, (5, 3)),
        ((5, 3), (1, 0), 1, 0, (3, 5)),
        ((2, 5, 3), (1, 0, 2), 1, 0, (5, 6)),
        ((2, 5, 3), (2, 0, 1), 2, 0, (6, 5)),
        ((2, 5, 3), (1, 2, 0), 1, 1, (5, 3, 2)),
        ((2, 5, 3, 4), (3, 0, 1, 2), 1, 2, (8, 5, 3)),
    ],
)
def test_matrix_and_back(shape, perm, n_in, n_stack, expected):
    kernel = np.arange(np.prod(shape)).reshape(shape)
    matrix = views.to_matrix(kernel, perm, n_in, n_stack)
    assert matrix.shape == expected
    np.testing.assert_array_equal(views.from_matrix(matrix, perm, shape), kernel)


class Narrow(nn.Dense):
    """The class's own product."""

    label: str = ""


class Doubled(nn.Dense):
    """More than the class's product."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def product(module, x, *args):
    """A call by its view, and by the module itself."""
    seen = []

    def watch(next_fun, call_args, call_kwargs, context):
        view = views.view_of(context.module, context.method_name, call_args, call_kwargs)
        if view is not None and not seen:
            params = context.module.variables["params"]
            x, w = view.rows(call_args[0]), view.matrix(params[view.kernel])
            b = params[view.bias].reshape(*w.shape[:-2], -1) if view.bias else jnp.zeros((*w.shape[:-2], w.shape[-1]))
            each = jax.vmap(lambda x, w, b: x @ w + b) if view.n_stack else lambda x, w, b: x @ w + b
            seen.append(view.back(each(x, w, b)))
        return next_fun(*call_args, **call_kwargs)

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: module.init(key, x, *args), jax.random.key(0))
    variables = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)
    with nn.intercept_methods(watch), jax.numpy_rank_promotion("allow"):
        y = module.apply(variables, x, *args)
    return seen[0] if seen else None, y


@pytest.mark.parametrize(
    "module, shape, args",
    [
        (nn.Dense(4), (2, 3), ()),
        (nn.DenseGeneral((4, 2)), (5, 3), ()),
        (nn.DenseGeneral(4, axis=(0, 2)), (5, 2, 3), ()),
        (nn.DenseGeneral((4, 2), axis=(-2, -1), use_bias=False), (5, 2, 3), ()),
        (nn.DenseGeneral((4, 2), axis=(-1, -2)), (5, 2, 3), ()),
        (nn.DenseGeneral(4, axis=(2, 0)), (5, 2, 3), ()),
        (Narrow(4), (2, 3), ()),
        (nn.Einsum((2, 3, 4), "BTD,NDH->BTNH", use_bias=False), (5, 6, 3), ()),
        (nn.Einsum((3, 2, 4), "BTD,DNH->BTNH"), (5, 6, 3), ()),
        (nn.Einsum((3, 4), None, use_bias=False), (5, 3), ("BD,DF->BF",)),
        (nn.Einsum((2, 4, 3), "BTNH,NHD->BTD"), (5, 6, 2, 4), ()),
        (nn.Einsum((3, 4), "DT,DF->FT", use_bias=False), (3, 5), ()),  # batch axis last
        (nn.Einsum((3, 4, 2), "BTD,DNH->BTHN"), (5, 6, 3), ()),
        (nn.Einsum((2, 3, 4), "ECD,EDF->ECF"), (2, 5, 3), ()),  # from here on stacks of kernels
        (nn.Einsum((2, 3, 4), "BECD,EDF->BECF"), (5, 2, 6, 3), ()),
        (nn.Einsum((3, 4, 2), "BTED,DFE->TEBF"), (5, 6, 2, 3), ()),
        (nn.Einsum((2, 3, 4), "BED,EDF->BFE", use_bias=False), (5, 2, 3), ()),
        (nn.Einsum((2, 5, 3, 4), "GCED,EGDF->GECF", use_bias=False), (5, 6, 2, 3), ()),
        (nn.Einsum((2, 3, 4, 5), "ENHB,ENHD->EBD"), (2, 3, 4, 6), ()),
        (nn.Einsum((2, 3), "ED,ED->E", use_bias=False), (2, 3), ()),
        (nn.Conv(4, (3,)), (2, 7, 3), ()),
        (nn.Conv(4, (3, 2), strides=2, padding="VALID"), (2, 7, 6, 3), ()),
        (nn.Conv(4, (2, 2), padding=((1, 0), (0, 2)), kernel_dilation=(2, 1)), (2, 5, 6, 3), ()),
        (nn.Conv(4, (2, 2, 2), use_bias=False), (1, 3, 4, 5, 2), ()),
        (nn.Conv(4, (2, 2)), (5, 6, 3), ()),  # no batch axis
    ],
)
def test_a_view_is_the_product(module, shape, args):
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    by_view, y = product(module, x, *args)
    assert by_view.shape == y.shape
    np.testing.assert_allclose(by_view, y, atol=1e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.LayerNorm(), (2, 3)),
        (nn.DenseGeneral(4, batch_dims=0, axis=-1), (2, 5, 3)),
        (nn.Einsum((2, 3), "ED,ED->ED", use_bias=False), (2, 3)),  # number by number
        (nn.Einsum((3, 4), "BTD,DF->BF", use_bias=False), (2, 5, 3)),  # sums over T as well
        (nn.Einsum((3, 4, 2), "BD,DFE->BF", use_bias=False), (5, 3)),
        (nn.Einsum((2, 3, 4), "ECD,EDF->CFE"), (2, 5, 3)),  # a bias [F, E]
        (nn.Einsum((3, 4), "...D,DH->...H", use_bias=False), (5, 3)),
        (nn.Conv(6, (2, 2), feature_group_count=3), (2, 5, 6, 3)),
        (nn.Conv(4, (2,), padding="CIRCULAR"), (2, 7, 3)),
        (nn.Conv(4, (2,), mask=jnp.ones((2, 3, 4))), (2, 7, 3)),
        (nn.Conv(4, (2,), input_dilation=2, padding=1), (2, 7, 3)),
        (Doubled(4), (2, 3)),
    ],
)
def test_what_is_no_product_of_one_kernel(module, shape):
    assert product(module, jnp.ones(shape))[0] is None
