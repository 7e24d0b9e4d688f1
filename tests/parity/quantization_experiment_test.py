"""experiments/quantization measures what bitsandbytes makes of the same numbers, and tells a wrong figure."""

import csv
import re
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: run with .venv-parity")

from experiments.quantization import __main__ as experiment  # noqa: E402
from experiments.quantization import formats, low_rank, references, samples  # noqa: E402
from experiments.quantization.references import Cell  # noqa: E402
from peftax.ops.qtensor import LEVELS  # noqa: E402

pytestmark = pytest.mark.parity
FOLDER = Path(experiment.__file__).parent


@pytest.fixture(scope="module")
def w():
    return samples.normal(0, (4096, 256))


@pytest.mark.parametrize(
    "title, kind, double", [("NF4", "nf4", False), ("NF4 double", "nf4", True), ("FP4", "fp4", False)]
)
def test_errors_are_those_of_bitsandbytes(w, title, kind, double):
    x = torch.from_numpy(np.ascontiguousarray(w.T))
    packed, state = bitsandbytes.functional.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=double)
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state).numpy().T
    ours, bits = formats.there_and_back(w, title, 64)
    wanted, found = formats.between(w, theirs, bits).means(), formats.between(w, ours, bits).means()
    assert found == pytest.approx(wanted, rel=1e-6)
    sizes = [packed.nbytes, state.absmax.nbytes]
    if double:
        sizes += [state.state2.absmax.nbytes, 4]
    assert found["bits"] == 8 * sum(sizes) / w.size


@pytest.mark.parametrize("title", ["NF4", "FP4"])
def test_gates(w, title):
    cells = experiment.gates(w, formats.there_and_back(w, title, 64)[0], title, 64)
    assert [c.cell for c in cells] == [f"{title}, block 64, mean error", f"{title}, block 64, relative"]
    for c in cells:  # the worst of four draws, each a quarter as large as theirs
        assert 0 < abs(c.computed - float(c.reference)) < c.tolerance


@pytest.mark.parametrize("title", ["NF4", "Int4"])
def test_levels_by_numpy_and_by_the_quantizer_agree(w, title):
    levels = formats.LEVELS.get(title, np.sort(np.float32(LEVELS["nf4"])))
    by_levels, ours = formats.by_levels(w, levels, 64), formats.there_and_back(w, title, 64)[0]
    apart = np.abs(by_levels - ours) > 1e-6
    assert apart.mean() < 1e-5  # numbers in the middle of two levels, but for the rounding of w / absmax
    np.testing.assert_allclose(np.abs(w - by_levels)[apart], np.abs(w - ours)[apart], atol=1e-6)


def test_bits_and_levels_find_their_references():
    states = {c.cell: c.status for c in experiment.of_bits()}
    assert len(states) == 4 and set(states.values()) == {"exact", "as printed"}


def test_distinct_numbers_tell_quantized_weights(w):
    counts = [samples.describe([x])["distinct"] for x in (w, *(formats.there_and_back(w, *t)[0] for t in FEW))]
    assert counts[0] > 31.9 and 25 < counts[1] < 30 and counts[2] <= 16


FEW = (("Int8", None), ("Q4_1", 32))


def test_a_branch_takes_error_away():
    found = low_rank.reductions(np.random.default_rng(0).standard_normal((64, 64)), 8)
    assert 0 < found["PiSSA"] < found["LoftQ T=1"] < found["LoftQ T=5"]
    w = low_rank.decaying(np.random.default_rng(0), 64)
    s = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(s, np.exp(-6 * np.arange(64) / 64), rtol=1e-6)
    assert low_rank.nuclear(w) == pytest.approx(s.sum())
    assert np.linalg.norm(w - low_rank.first(w, 8)) == pytest.approx(np.linalg.norm(s[8:]))


@pytest.mark.parametrize(
    "computed, reference, tolerance, status",
    [
        (4.5, "4.5", 0.0, "exact"),
        (0.06774, "0.0677", 0.001, "as printed"),
        (0.0679, "0.0677", 0.001, "within"),
        (1.4e-6, "2e-06", 1e-7, "OUTSIDE"),
        (float("nan"), "0.1", 1.0, "OUTSIDE"),
        (3.0, "0.1", None, "not compared"),
    ],
)
def test_status(computed, reference, tolerance, status):
    cell = Cell("table", "cell", computed, reference, tolerance, "source")
    assert cell.status == status
    if status == "OUTSIDE":
        with pytest.raises(SystemExit, match="1 of 1 .* table, cell"):
            experiment.check([cell])
    else:
        experiment.check([cell])


def ctranslate2(version, kind, numbers):
    def text(x):
        return struct.pack("<H", len(x) + 1) + x.encode() + b"\0"

    head = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    scalar = text("pre_norm") + struct.pack("<BBI", 0, 1, 1) + b"\1"
    data = numbers.tobytes()
    return head + scalar + text("a/weight") + struct.pack("<BIIBI", 2, *numbers.shape, kind, len(data)) + data


def test_ctranslate2():
    numbers = np.arange(6, dtype=np.float16).reshape(2, 3)
    found = samples.read_ctranslate2(ctranslate2(6, 4, numbers))
    assert list(found) == ["pre_norm", "a/weight"] and found["a/weight"].dtype == np.float16
    np.testing.assert_array_equal(found["a/weight"], numbers)
    with pytest.raises(ValueError, match="version 5"):
        samples.read_ctranslate2(ctranslate2(5, 4, numbers))
    with pytest.raises(ValueError, match="a/weight: type 5"):
        samples.read_ctranslate2(ctranslate2(6, 5, numbers))


def test_the_readme_quotes_what_the_run_wrote():
    report = (FOLDER / "report.md").read_text().splitlines()
    rows = [x for x in (FOLDER / "README.md").read_text().splitlines() if re.match(r"\|.*\d", x)]
    assert len(rows) > 20
    assert [x for x in rows if x not in report] == []
    cells = list(csv.DictReader((FOLDER / "cells.csv").open()))
    assert not [c for c in cells if c["status"] == "OUTSIDE"]
    gates = [c for c in cells if c["table"] == "bitsandbytes' gates"]
    assert len(gates) == sum(len(x) for kinds in references.GATES.values() for x in kinds.values())
