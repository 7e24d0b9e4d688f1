"""How much of NF4's error a branch of rank r takes away, in the nuclear norm.

  plain     E = W - q(W)
  PiSSA     E = (W - AB) - q(W - AB),  AB = the first r singular values of W
  LoftQ     T turns of  Q = q(W - AB),  AB = the first r singular values of W - Q,  from AB = 0;  E = W - Q - AB
  QPiSSA    T - 1 such turns from PiSSA's AB;  E = (W - AB) - q(W - AB)

Source: LoftQ, arXiv 2310.08659, algorithm 1; PiSSA, arXiv 2404.02948, section 4; what QPiSSA's T counts and where it
ends is our reading: it is the one that finds the reference figures.
"""

from __future__ import annotations

import numpy as np

from experiments.quantization.formats import there_and_back

GROUP = 64
METHODS = ("PiSSA", "LoftQ T=1", "LoftQ T=5", "QPiSSA T=5")


def reductions(w: np.ndarray, rank: int) -> dict[str, float]:
    """Percent by which the nuclear norm of the error falls against plain NF4."""
    plain = nuclear(w - nf4(w))
    start = first(w, rank)
    one, left = turn(w, rank, 0.0)
    five, qpissa = one, start
    for _ in range(4):
        five, five_left = turn(w, rank, five)
        qpissa, _ = turn(w, rank, qpissa)
    errors = (w - start - nf4(w - start), left, five_left, w - qpissa - nf4(w - qpissa))
    return {name: 100 * (1 - nuclear(e) / plain) for name, e in zip(METHODS, errors, strict=True)}


def turn(w: np.ndarray, rank: int, branch: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """The next AB, and the error that stays."""
    rest = w - nf4(w - branch)
    branch = first(rest, rank)
    return branch, rest - branch


def nf4(w: np.ndarray) -> np.ndarray:
    return there_and_back(w.astype(np.float32), "NF4", GROUP)[0]


def first(w: np.ndarray, rank: int) -> np.ndarray:
    """The part of w that its first `rank` singular values make: w V Vᵀ, with V from wᵀ w."""
    v = np.linalg.eigh(w.T @ w)[1][:, -rank:]
    return w @ v @ v.T


def nuclear(w: np.ndarray) -> float:
    """The sum of the singular values."""
    return float(np.sqrt(np.linalg.eigvalsh(w.T @ w).clip(0)).sum())


def decaying(rng: np.random.Generator, size: int) -> np.ndarray:
    """Singular values exp(-6 i / size) between random rotations."""
    u, v = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    return (u * np.exp(-6 * np.arange(size) / size)) @ v.T
