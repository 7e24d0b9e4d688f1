"""AWQ checkpoints of four bits in the "gemm" layout (AutoAWQ, GPTQModel)."""

from __future__ import annotations

import numpy as np

from peftax.weights.gptq import WORD, Int4, Layout

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # a word's columns 0 to 7 lie in these of its nibbles


class Awq(Int4):
    """qweight int32 [K, N/8], scales [K/g, N], qzeros int32 [K/g, N/8]; words hold columns in the order of NIBBLES.

    Source: AutoAWQ, modules/linear/gemm.py and utils/packing_utils.py.
    """

    method = "awq"
    parts = ("qweight", "scales", "qzeros")

    def _check_settings(self) -> None:
        self._check_bits(self.settings.get("bits"))
        self._check_group_size()
        known = (self.settings.get(key) for key in ("version", "format", "checkpoint_format"))
        version = str(next(filter(None, known), "gemm")).lower()
        if version != "gemm" or self.settings.get("backend") == "llm-awq":
            version = "llm-awq" if version == "gemm" else version
            raise ValueError(f"{self.path}: AWQ laid out as {version!r} is not read; 'gemm' is")

    def _find_layout(self, module: str) -> Layout:
        k, words = self._sizes(f"{module}.qweight")
        at = Layout(k, WORD * words, self._group(k))
        why = f"K {k}, N {at.n}, group_size {self.settings.get('group_size', -1)}"
        if k % at.group:
            raise ValueError(f"{self.path}: tensor {f'{module}.qweight'!r}: K is no multiple of group_size ({why})")
        self._expect(f"{module}.qweight", (k, words), int, why)
        self._expect(f"{module}.scales", (at.groups, at.n), float, why)
        self._expect(f"{module}.qzeros", (at.groups, words), int, why)
        return at

    def _codes(self, module: str, k: range, n: range) -> np.ndarray:
        return self._block(f"{module}.qweight", (k, n), 1, NIBBLES)

    def _zeros(self, module: str, groups: range, n: range) -> np.ndarray:
        return self._block(f"{module}.qzeros", (groups, n), 1, NIBBLES).astype(np.float32)
