"""The figures that this experiment must find again, and where they come from."""

from __future__ import annotations

import dataclasses

SIGMAS = 7  # bitsandbytes' own gate


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure beside the one that it should be."""

    table: str
    cell: str
    computed: float
    reference: str  # as printed
    tolerance: float | None  # None: not the same thing; stands beside, is not compared
    source: str

    @property
    def status(self) -> str:
        if self.tolerance is None:
            return "not compared"
        far = abs(self.computed - float(self.reference))
        if far == 0:
            return "exact"
        if far <= half_digit(self.reference):
            return "as printed"
        return "within" if far <= self.tolerance else "OUTSIDE"


def half_digit(printed: str) -> float:
    """Half a unit of the last digit of a printed figure."""
    mantissa, _, exponent = printed.partition("e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


# Mean |error| and mean error^2 on N(0, 1), 4.2 M numbers. Calculated for this project before it had a quantizer, from
# levels in NumPy; neither the QLoRA paper nor bitsandbytes prints such a table.
ELEMENT = {
    32: {
        "NF4": ("0.0677", "0.00762"),
        "FP4": ("0.0889", "0.0130"),
        "E2M1": ("0.0755", "0.0102"),
        "E3M0": ("0.125", "0.0326"),
        "Int4": ("0.0812", "0.0094"),
    },
    64: {
        "NF4": ("0.07277", "0.00846"),
        "FP4": ("0.09657", "0.01487"),
        "E2M1": ("0.0803", "0.0112"),
        "E3M0": ("0.131", "0.0354"),
        "Int4": ("0.0914", "0.0116"),
    },
    4096: {
        "NF4": ("0.0924", "0.0121"),
        "FP4": ("0.129", "0.0248"),
        "E2M1": ("0.0961", "0.0141"),
        "E3M0": ("0.136", "0.0380"),
        "Int4": ("0.136", "0.0247"),
    },
}

# Of the same origin: NF4's mean error^2 at block 64 without and with double quantization, on the same numbers. Its
# second levels must have been evenly spaced: bitsandbytes' own are not, and add more than twice as much.
EVENLY_DOUBLE = ("0.008455", "0.008457")
# What bitsandbytes 0.50.2 (quantize_4bit, compress_statistics) makes of samples.normal(0).
DOUBLE_CHANGE = "4.814e-6"

# Of the same origin: reduction of the nuclear norm of the error against plain NF4, %, by a branch of rank r.
NUCLEAR = {  # spectrum -> rank -> method
    "Gaussian": {
        16: {"PiSSA": "6.0", "LoftQ T=1": "7.0", "LoftQ T=5": "15.9", "QPiSSA T=5": "15.9"},
        64: {"PiSSA": "21.0", "LoftQ T=1": "25.5", "LoftQ T=5": "36.9", "QPiSSA T=5": "42.9"},
    },
    "decaying": {
        16: {"PiSSA": "16.8", "LoftQ T=1": "7.1", "LoftQ T=5": "15.9", "QPiSSA T=5": "25.7"},
        64: {"PiSSA": "45.6", "LoftQ T=1": "25.6", "LoftQ T=5": "37.2", "QPiSSA T=5": "60.5"},
    },
}

# Mean and standard deviation over 200 draws of 1024 x 1024 normal numbers: mean |error|, and mean of
# |error| / (|w| + 1e-8). Source: bitsandbytes, tests/test_functional.py, test_4bit_quant, commit 95f9af3.
GATES = {
    "FP4": {
        "mae": {
            32: ("0.088925", 0.000091),
            64: ("0.096543", 0.000111),
            128: ("0.102969", 0.000134),
            256: ("0.108684", 0.000182),
            512: ("0.114115", 0.000234),
            1024: ("0.119333", 0.000320),
            2048: ("0.124556", 0.000455),
            4096: ("0.129536", 0.000612),
        },
        "relative": {
            32: ("0.242443", 0.000330),
            64: ("0.260125", 0.000379),
            128: ("0.275817", 0.000433),
            256: ("0.289831", 0.000497),
            512: ("0.302881", 0.000583),
            1024: ("0.315000", 0.000757),
            2048: ("0.326607", 0.000955),
            4096: ("0.337169", 0.001239),
        },
    },
    "NF4": {
        "mae": {
            32: ("0.067746", 0.000069),
            64: ("0.072798", 0.000074),
            128: ("0.076831", 0.000091),
            256: ("0.080337", 0.000102),
            512: ("0.083547", 0.000143),
            1024: ("0.086610", 0.000187),
            2048: ("0.089592", 0.000251),
            4096: ("0.092547", 0.000360),
        },
        "relative": {
            32: ("0.189726", 0.000304),
            64: ("0.203339", 0.000340),
            128: ("0.215237", 0.000391),
            256: ("0.226105", 0.000398),
            512: ("0.236079", 0.000544),
            1024: ("0.245370", 0.000600),
            2048: ("0.254163", 0.000747),
            4096: ("0.262473", 0.000999),
        },
    },
}

# QLoRA, section 3: constants of 0.5 bit a weight become 8/64 + 32/(64 x 256) = 0.127; about 3 GB less for 65 B weights.
BITS = {"NF4": ("4.5", "4 + 0.5"), "NF4 double": ("4.126953125", "4 + 0.127")}  # exact, as the paper has it
LINEAR_65B = 64_760_053_760  # weights of LLaMA-65B's linear layers: 80 x (4 x 8192^2 + 3 x 8192 x 22016)
SAVED_65B = "3.02"  # 10^9 bytes
NORMAL_OFFSET = 0.9677083  # of bitsandbytes' create_normal_map, from which NF4's levels come
NORMAL_MAP = "1.1e-7"  # the furthest of them from the levels in use
