"""A sequence of vectors as one: what a classifier's head sees. Packed segments are pooled each by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

POOLINGS = ("cls", "mean", "last")


def pool(how: str, h_BxTxD: jax.Array, segments_BxT: jax.Array) -> jax.Array:
    """Each segment's vector, at every place of the segment.

      cls   h of its first token        last  h of its last token        mean  Σ h / n over its n tokens, summed in f32

    Args:
      segments_BxT: int32; 0 is padding, whose places get finite, meaningless vectors. The places of a segment lie side
        by side.

    Returns:
      [B, T, D] in the dtype of h.
    """
    same_BxTxT = segments_BxT[:, :, None] == segments_BxT[:, None, :]
    if how == "mean":
        share = same_BxTxT / jnp.sum(same_BxTxT, axis=-1, keepdims=True)
        pooled = jnp.einsum("bts,bsd->btd", share, h_BxTxD, preferred_element_type=jnp.float32)
        return pooled.astype(h_BxTxD.dtype)
    first = jnp.argmax(same_BxTxT, axis=-1)
    at = first if how == "cls" else first + jnp.sum(same_BxTxT, axis=-1) - 1
    return jnp.take_along_axis(h_BxTxD, jnp.minimum(at, h_BxTxD.shape[1] - 1)[..., None], axis=1)
