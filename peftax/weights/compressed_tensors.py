"""compressed-tensors checkpoints of four-bit integers, "pack-quantized" (llm-compressor, vLLM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peftax.weights.gptq import WORD, Int4, Layout

FORMAT = "pack-quantized"
GROUP_ORDER = ("group", "dynamic", True)  # actorder that scatters groups; "weight" (also "static") leaves them in order


class CompressedTensors(Int4):
    """weight_packed int32 [N, K/8], weight_scale [N, K/g], weight_shape (N, K), weight_zero_point int32 [N/8, K/g].

    Codes and zero points are stored plus 8. Without weight_zero_point a weight is symmetric.

    Source: compressed-tensors, compressors/pack_quantized.
    """

    method = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    optional = ("weight_zero_point", "weight_g_idx")

    @property
    def schemes(self) -> dict[str, Mapping[str, Any]]:
        """{config group: how it says that weights are quantized}."""
        return {key: group.get("weights") or {} for key, group in self.settings["config_groups"].items()}

    def _check_settings(self) -> None:
        groups = self.settings.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(x, Mapping) for x in groups.values()) or not groups:
            raise ValueError(f"{self.path}: config_groups in config.json is {groups!r}, want {{name: a scheme, …}}")
        if self.settings.get("transform_config"):
            raise ValueError(f"{self.path}: transform_config (rotated weights) is not read; use the float weights")
        sparsity = (self.settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise ValueError(f"{self.path}: sparsity_config of format {sparsity!r} is not read; 'dense' is")
        for key, scheme in self.schemes.items():
            group, where = groups[key], f"{self.path}: config group {key!r}"
            if (kind := group.get("format") or self.settings.get("format")) != FORMAT:
                raise ValueError(f"{where}: format {kind!r} is not read; {FORMAT!r} is")
            if group.get("input_activations"):
                raise ValueError(f"{where}: quantized activations are not read; quantized weights alone are")
            if (kind := scheme.get("type", "int")) != "int":
                raise ValueError(f"{where}: weights of type {kind!r} are not read; 'int' is")
            self._check_bits(scheme.get("num_bits"), f"config group {key!r}: ")
            size, strategy = scheme.get("group_size"), scheme.get("strategy")
            if strategy not in (None, "group", "channel") or (strategy == "group" or size) and not _is_size(size):
                raise ValueError(
                    f"{where}: strategy {strategy!r} with group_size {size!r} is not read; 'group' with a number > 0, "
                    "and 'channel', are"
                )

    def _find_layout(self, module: str) -> Layout:
        name = f"{module}.weight_shape"
        shape = tuple(int(size) for size in self.inner.read(name).reshape(-1))
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"{self.path}: tensor {name!r} says {shape}, want N and K of a linear module")
        n, k = shape
        why = f"weight_shape {shape}, four bits a code"
        self._expect(f"{module}.weight_packed", (n, -(-k // WORD)), int, why)
        at = Layout(k, n, self._group_of(f"{module}.weight_scale", n, k))
        self._expect(f"{module}.weight_scale", (n, at.groups), float, why)
        zero = f"{module}.weight_zero_point"
        if zero in self._held:
            self._expect(zero, (-(-n // WORD), at.groups), int, why)
        elif not any(scheme.get("symmetric", True) for scheme in self.schemes.values()):
            raise ValueError(f"{self.path}: tensor {zero!r} is missing; config.json says that weights are asymmetric")
        order = f"{module}.weight_g_idx"
        if order in self._held:
            self._expect(order, (k,), int, why)
            if not (self.inner.read(order) == -1).all():  # -1: never set
                self._check_order(order, at)
        elif all(scheme.get("actorder") in GROUP_ORDER for scheme in self.schemes.values()):
            raise ValueError(f"{self.path}: tensor {order!r} is missing; config.json says actorder 'group'")
        return at

    def _group_of(self, name: str, n: int, k: int) -> int:
        """The one of the config's group sizes that a scale's shape bears out; targets need not be matched for it."""
        sizes = {min(scheme.get("group_size") or -1, k) for scheme in self.schemes.values()}
        sizes = {k if size == -1 else size for size in sizes}
        have = self.inner.shape(name)
        for size in sorted(sizes):
            if have == (n, -(-k // size)) and k % size == 0:
                return size
        raise ValueError(
            f"{self.path}: tensor {name!r} has shape {have}, want [{n}, {k} / group_size] (N {n}, K {k}) with a "
            f"group_size of config.json: {', '.join(map(str, sorted(sizes)))}"
        )

    def _codes(self, module: str, k: range, n: range) -> np.ndarray:
        return np.ascontiguousarray(self._block(f"{module}.weight_packed", (n, k), 1).T)

    def _scales(self, module: str, groups: range, n: range) -> np.ndarray:
        index = (slice(n.start, n.stop), slice(groups.start, groups.stop))
        return np.ascontiguousarray(self.inner.read(f"{module}.weight_scale", index=index).T, dtype=np.float32)

    def _zeros(self, module: str, groups: range, n: range) -> np.ndarray | None:
        if self._format(module) == "q4_0":
            return None
        zeros = self._block(f"{module}.weight_zero_point", (n, groups), 0)
        return np.ascontiguousarray(zeros.T, dtype=np.float32)

    def _format(self, module: str) -> str:
        return "q4_1" if f"{module}.weight_zero_point" in self._held else "q4_0"


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and (size > 0 or size == -1)
