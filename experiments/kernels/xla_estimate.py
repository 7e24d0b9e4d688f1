"""What XLA's compiler estimates for the product without a Pallas kernel, on TPUs that are not here.

  python -m experiments.kernels.xla_estimate

Prints a Markdown table: XLA's own "optimal seconds" of `ops/kernels/xla.py` and of a bf16 weight's product, and what
each keeps in HBM meanwhile. Another kind of figure than static_cost.py's, not to be compared with it. Needs the
packages of `make aot`.
"""

from __future__ import annotations

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from peftax import machines  # noqa: E402
from peftax.ops.kernels import xla  # noqa: E402
from peftax.ops.quantize import quantize  # noqa: E402

CHIPS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
SIZE = 4096


def figures(chip: str, rows: int, transposed: bool, packed: bool) -> tuple[float, int]:
    """(estimated milliseconds, temporary bytes) of one product."""
    at = SingleDeviceSharding(machines.tpu(chip)[0])
    w = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
    if packed:
        w = jax.eval_shape(lambda w: quantize(w, fmt="nf4", group=64), w)
    x = jax.ShapeDtypeStruct((rows, SIZE), jnp.bfloat16)
    x, w = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), (x, w))

    def product(x, w):
        if packed:
            return xla.product(x, w, transposed=transposed)
        return x @ (w.T if transposed else w)

    compiled = jax.jit(product).lower(x, w).compile()
    return (
        1e3 * compiled.cost_analysis()["optimal_seconds"]
    )  # negative where the compiler has none, compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    print("| chip | M | | NF4, ms | bf16, ms | ratio | NF4, bytes of temporaries |\n|---|--:|---|--:|--:|--:|--:|")
    for chip in CHIPS:
        for rows in (2048, 8192):
            for transposed in (False, True):
                (ours, temp), (plain, _) = (figures(chip, rows, transposed, packed) for packed in (True, False))
                kind = "dx" if transposed else "forward"
                ratio = f"{ours:.2f} | {plain:.2f} | {ours / plain:.2f}" if ours > 0 else "no estimate | – | –"
                print(f"| {chip.partition(':')[0]} | {rows} | {kind} | {ratio} | {temp:,} |", flush=True)


if __name__ == "__main__":
    main()
