"""The figures: what a paper prints, and on which model and with which method it comes out.

`worked_out` is the integer of the method's closed formula, multiplied out apart from this code; what is counted must
equal it. `published` is what the source prints. Where "second hand" stands, we read that figure in others' notes or in
later papers' tables, not in the source itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from experiments.parameter_counts.backbones import REAL, found

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "MB": 10**6, "": 1}
Formula = Callable[[Any], int]  # of a Found, or of None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure.

    by:      {"name": method, **its settings}; or a formula, where no method of peftax has these parameters.
    per:     the printed figure is per cent of this many; 0: it is a number.
    why:     of a figure that does not agree: what it may be. A printed one that is a `budget` says so.
    """

    paper: str
    cell: str
    model: str
    by: Mapping[str, Any] | Formula
    worked_out: int
    published: str
    source: str
    per: int = 0
    budget: bool = False
    why: str = ""

    @property
    def backbone(self) -> str:
        """Of FLOPs, which need none, "none"."""
        return "linen" if self.model in REAL else "shape-only" if self.model else "none"

    @property
    def counted(self) -> str:
        return "formula" if callable(self.by) else self.by["name"]

    def compute(self) -> int:
        if not callable(self.by):
            return found(self.model).count(**self.by)
        return self.by(found(self.model) if self.model else None)


def read(published: str, per: int = 0) -> tuple[Decimal, Decimal]:
    """(the figure as it is printed, what one of it stands for): "4.7M" -> (4.7, 10**6), ".83%" -> (.83, per / 100)."""
    text = published.replace(",", "").lstrip("<")
    mantissa, _, power = text.partition("e")
    if power:
        return Decimal(mantissa), Decimal(10) ** int(power)
    unit = text.lstrip("0123456789.")
    scale = Decimal(per) / 100 if unit == "%" else Decimal(UNITS[unit])
    return Decimal(text.removesuffix(unit)), scale


def agreement(computed: int, published: str, per: int = 0) -> str:
    """How a printed figure comes of the number: "equal", "rounded", "truncated", "below" ("<2%"), "no"; "" of none."""
    if not published:
        return ""
    printed, scale = read(published, per)
    value, digit = Decimal(computed) / scale, Decimal(1).scaleb(int(printed.as_tuple().exponent))
    if published.startswith("<"):
        return "below" if value < printed else "no"
    if value == printed:
        return "equal"
    if scale == 1:
        return "no"
    if abs(value - printed) <= digit / 2:
        return "rounded"
    return "truncated" if value // digit * digit == printed else "no"


def status(cell: Cell, computed: int) -> str:
    """ "exact": what is printed is the count at its digits; "nominal": a rounded budget; "differs"; "unprinted"."""
    agrees = agreement(computed, cell.published, cell.per)
    if not agrees:
        return "unprinted"
    return "exact" if agrees != "no" else "nominal" if cell.budget else "differs"


# --- methods ------------------------------------------------------------------------------------------------

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def lora(rank: int, *targets: str, **more: Any) -> dict[str, Any]:
    return {"name": "lora", "rank": rank, "targets": targets or ("q_proj", "v_proj"), **more}


def everywhere(rank: int) -> dict[str, Any]:
    return {"name": "lora", "rank": rank, "targets": "all-linear"}


def adapter(size: int, placement: str) -> dict[str, Any]:
    return {"name": "adapter", "size": size, "placement": placement}


def with_norms(method: Mapping[str, Any], targets: Any = None) -> dict[str, Any]:
    """The method, and norms that train."""
    name, rest = method["name"], {k: v for k, v in method.items() if k != "name"}
    norms = {"ln_tuning": {"targets": targets}} if targets else {}
    return {"name": f"{name}+ln_tuning", name: rest, **norms}


FULL = {"name": "full"}
NORMS = {"name": "ln_tuning"}


# --- LoRA, Hu et al. 2021 -----------------------------------------------------------------------------------


def of_lora() -> list[Cell]:
    paper = "LoRA (2106.09685)"
    out = []

    def add(cell, model, by, worked_out, published, source, **more):
        out.append(
            Cell(
                paper=paper,
                cell=cell,
                model=model,
                by=by,
                worked_out=worked_out,
                published=published,
                source=source,
                **more,
            )
        )

    unit = 96 * 2 * 2 * 12288
    for rank, printed in ((1, "4.7M"), (2, "9.4M"), (4, "18.8M"), (8, "37.7M"), (64, "301.9M")):
        add(f"GPT-3 LoRA q,v r={rank}", "GPT-3", lora(rank), rank * unit, printed, "table 15")
    for rank, printed in ((1, "9.4M"), (2, "18.8M"), (4, "37.7M"), (64, "603.8M")):
        why = "603.9 truncated, 604.0 rounded" if rank == 64 else ""
        add(
            f"GPT-3 LoRA q,k,v,o r={rank}",
            "GPT-3",
            lora(rank, *ATTENTION),
            2 * rank * unit,
            printed,
            "table 15",
            why=why,
        )
    sizes = ((1, 7_078_080, "7.1M"), (4, 21_234_432, "21.2M"), (8, 40_109_568, "40.1M"), (16, 77_859_840, "77.9M"))
    for size, number, printed in (*sizes, (64, 304_361_472, "304.4M")):
        add(f"GPT-3 adapter (H) r={size}", "GPT-3", adapter(size, "houlsby"), number, printed, "table 15")
    for length, number, printed in ((32, 491_520, "0.4M"), (64, 884_736, "0.9M"), (128, 1_671_168, "1.7M")):
        add(
            f"GPT-3 PreEmbed ({length},8)",
            "GPT-3",
            {"name": "prompt", "length": length + 8},
            number,
            printed,
            "table 15",
        )
    for length, number, printed in ((256, 3_244_032, "3.2M"), (512, 6_389_760, "6.4M")):
        add(
            f"GPT-3 PreEmbed ({length},8)",
            "GPT-3",
            {"name": "prompt", "length": length + 8},
            number,
            printed,
            "table 15",
        )
    add(
        "GPT-3 PreLayer (8,8)",
        "GPT-3",
        lambda _: 96 * 12288 * (8 + 8),
        18_874_368,
        "20.2M",
        "table 15",
        why="the paper's own formula, L d (l_p + l_i); its other four rows of PreLayer differ too",
    )
    add(
        "GPT-3 BitFit",
        "GPT-3",
        {"name": "bitfit"},
        12_976_128,
        "14.2M",
        "table 4",
        why="11 biases as wide as the model in a layer; only 12 would give 14.2M, and we know of no twelfth",
    )

    why = "0.1% of the model's {} million: a budget, we think; the paper's own formula gives the count"
    add(
        "GPT-2 medium LoRA q,v r=4",
        "GPT-2 medium",
        lora(4),
        393_216,
        "0.35M",
        "table 3",
        budget=True,
        why=why.format(355),
    )
    add(
        "GPT-2 large LoRA q,v r=4",
        "GPT-2 large",
        lora(4),
        737_280,
        "0.77M",
        "table 3",
        budget=True,
        why=why.format(774),
    )
    for model, size, number, printed in (
        ("GPT-2 medium", 6, 368_784, "0.37M"),
        ("GPT-2 medium", 224, 11_089_152, "11.09M"),
        ("GPT-2 large", 8, 875_808, "0.88M"),
        ("GPT-2 large", 248, 23_002_848, "23.00M"),
    ):
        by = with_norms(adapter(size, "pfeiffer"), ["adapter_norm"])
        where = f"{model}, adapter norm"
        add(
            f"{model} adapter (L) r={size}, its norm", where, by, number, printed, "table 3; r inferred from the figure"
        )
    why = "0.1M above the count of the released model"
    add("GPT-2 medium, all", "GPT-2 medium", FULL, 354_823_168, "354.92M", "table 3", why=why)
    add("GPT-2 large, all", "GPT-2 large", FULL, 774_030_080, "774.03M", "table 3")

    add("RoBERTa-base LoRA q,v r=8", "RoBERTa-base", lora(8), 294_912, "0.3M", "table 2")
    head = lora(8, modules_to_save=("classifier_dense", "classifier_out_proj"))
    add(
        "RoBERTa-base LoRA q,v r=8 with head",
        "RoBERTa-base, 2 classes",
        head,
        887_042,
        "0.8M",
        "microsoft/LoRA, README",
    )
    add("RoBERTa-large LoRA q,v r=8", "RoBERTa-large", lora(8), 786_432, "0.8M", "table 2")
    why = "bottleneck 64, printed as the budget of {} million"
    for placement, letter, size, number, printed in (
        ("pfeiffer", "P", 64, 3_171_840, "3.0M"),
        ("pfeiffer", "P", 16, 811_392, "0.8M"),
        ("houlsby", "H", 64, 6_343_680, "6.0M"),
        ("houlsby", "H", 8, 835_968, "0.8M"),
    ):
        more = {"budget": True, "why": why.format(printed[0])} if size == 64 else {}
        by = adapter(size, placement)
        add(f"RoBERTa-large adapter ({letter}) r={size}", "RoBERTa-large", by, number, printed, "table 2", **more)
    for size, number, printed in ((16, 304_320, "0.3M"), (48, 894_528, "0.9M")):
        by = adapter(size, "pfeiffer")
        source = "table 2; r and places inferred from the figure"
        add(f"RoBERTa-base adapter (D) r={size}", "RoBERTa-base", by, number, printed, source)
    add("DeBERTa-XXL LoRA q,v r=16", "DeBERTa-XXL", lora(16), 4_718_592, "4.7M", "table 2; r of the authors' script")
    why = "table 2's 4.7M is r=16, as the authors' script has it"
    add("DeBERTa-XXL LoRA q,v r=8", "DeBERTa-XXL", lora(8), 2_359_296, "4.7M", "table 2; r of table 10", why=why)
    add(
        "GPT-3 checkpoint q,v r=4, bytes in 16 bits",
        "GPT-3",
        lambda m: 2 * m.count(**lora(4)),
        37_748_736,
        "35MB",
        "section 4.2",
        budget=True,
        why="350 GB / 10,000; the file's 36 MiB are 37.7 MB",
    )
    return out


# --- models and other papers ------------------------------------------------------------------------------


def of_models() -> list[Cell]:
    rows = (
        ("GPT-2 (Radford et al. 2019)", "GPT-2 small", 124_439_808, "124M", "openai/gpt-2, names of the models"),
        ("GPT-2 (Radford et al. 2019)", "GPT-2 medium", 354_823_168, "355M", "openai/gpt-2, names of the models"),
        ("GPT-2 (Radford et al. 2019)", "GPT-2 large", 774_030_080, "774M", "openai/gpt-2, names of the models"),
        ("GPT-2 (Radford et al. 2019)", "GPT-2 XL", 1_557_611_200, "1558M", "openai/gpt-2, names of the models"),
        ("LLaMA (2302.13971)", "LLaMA-7B", 6_738_415_616, "6.7B", "table 2; second hand"),
        ("LLaMA (2302.13971)", "LLaMA-13B", 13_015_864_320, "13.0B", "table 2; second hand"),
        ("LLaMA (2302.13971)", "LLaMA-33B", 32_528_943_616, "32.5B", "table 2; second hand"),
        ("LLaMA (2302.13971)", "LLaMA-65B", 65_285_660_672, "65.2B", "table 2; second hand"),
    )
    return [
        Cell(paper=p, cell=f"{m}, all", model=m, by=FULL, worked_out=n, published=printed, source=source)
        for p, m, n, printed, source in rows
    ]


def of_t5() -> list[Cell]:
    out = []
    paper = "Prompt tuning (2104.08691)"
    source = "table 4, the prompt taken off; second hand"
    totals = {
        "small": 76_961_152,
        "base": 247_577_856,
        "large": 783_150_080,
        "XL": 2_849_757_184,
        "XXL": 11_135_332_352,
    }
    for size, number in totals.items():
        model = f"T5.1.1-{size}"
        out.append(
            Cell(
                paper=paper,
                cell=f"{model}, all",
                model=model,
                by=FULL,
                worked_out=number,
                published=f"{number:,}",
                source=source,
            )
        )

    def prompt(model, length, number, published, what="prompt", **more):
        by = more.pop("by", {"name": "prompt", "length": length, "table": "embed_tokens"})
        cell = f"{model} {what} l={length}"
        return Cell(
            paper=paper,
            cell=cell,
            model=model,
            by=by,
            worked_out=number,
            published=published,
            source="table 4; second hand",
            **more,
        )

    for model, length, number in (
        ("T5.1.1-XXL", 5, 20_480),
        ("T5.1.1-XXL", 20, 81_920),
        ("T5.1.1-XXL", 100, 409_600),
        ("T5.1.1-small", 1, 512),
        ("T5.1.1-small", 100, 51_200),
    ):
        out.append(prompt(model, length, number, f"{number:,}"))
    out.append(prompt("T5.1.1-small", 20, 10_240, "10,420", why="digits exchanged in print"))
    of = totals["large"] + 102_400
    out.append(
        prompt(
            "T5.1.1-large",
            100,
            102_400,
            ".01907%",
            "prompt, share",
            per=of,
            why="0.01307% of the model with its prompt: a digit in print",
        )
    )
    whole = lambda m: m.total + m.count("prompt", length=50, table="embed_tokens")  # noqa: E731
    why = "1.8M above the model and its prompt; the other rows' totals are right"
    out.append(prompt("T5.1.1-XXL", 50, 11_135_537_152, "11,137,380,352", "all with prompt", by=whole, why=why))

    def few(cell, model, by, number, published, source, **more):
        out.append(
            Cell(
                paper="T-Few (2205.05638)",
                cell=cell,
                model=model,
                by=by,
                worked_out=number,
                published=published,
                source=source,
                **more,
            )
        )

    ia3 = {"name": "ia3", "targets": ["k_proj", "v_proj", "up_proj"], "feedforward": ()}
    notes = "appendix, table of methods; second hand"
    few("T0-3B (IA)3", "T5.1.1-XL", ia3, 540_672, "540K", notes)
    few("T0-11B (IA)3", "T5.1.1-XXL", ia3, 1_081_344, "", notes)
    why = "4.33 MB or 4.125 MiB of float32; neither prints as 4.2"
    few(
        "T0-11B (IA)3, bytes in 32 bits",
        "T5.1.1-XXL",
        lambda m: 4 * m.count(**ia3),
        4_325_376,
        "4.2MB",
        "second hand",
        why=why,
    )
    few("T0-3B norms", "T5.1.1-XL", NORMS, 249_856, "250K", notes)
    few(
        "T0-3B BitFit and norms",
        "T5.1.1-XL, biases",
        {"name": "bitfit+ln_tuning"},
        1_331_200,
        "1.3M",
        notes + "; the places of r-three/t-few",
    )
    few("T0-3B LoRA r=4 and norms", "T5.1.1-XL", with_norms(everywhere(4)), 9_097_216, "9.1M", notes)
    for length, number, printed in ((10, 40_960, "41K"), (100, 409_600, "409K")):
        by = {"name": "prompt", "length": 2 * length, "table": "embed_tokens"}
        few(f"T0-3B prompt of {length} in encoder and decoder", "T5.1.1-XL", by, number, printed, notes)
    few("T0-3B adapter r=64 and norms", "T5.1.1-XL", with_norms(adapter(64, "pfeiffer")), 12_934_144, "12.9M", notes)
    tokens, shots = 103, 41
    few(
        "T-Few, FLOPs of one answer",
        "",
        lambda _: 11 * 10**9 * tokens,
        1_133_000_000_000,
        "1.1e12",
        "section on cost; second hand",
    )
    gpt3 = lambda _: 2 * 175 * 10**9 * (shots * 98 + tokens)  # noqa: E731
    few(
        "GPT-3 in context, FLOPs of one answer",
        "",
        gpt3,
        1_442_350_000_000_000,
        "1.4e15",
        "section on cost; second hand",
    )
    train = lambda _: 3 * 11 * 10**9 * 1000 * 8 * tokens  # noqa: E731
    few("T-Few, FLOPs of training", "", train, 27_192_000_000_000_000, "2.7e16", "section on cost; second hand")

    def compacter(cell, by, number, printed, model="T5-base", **more):
        of = {"paper": "Compacter (2106.04647)", "source": "table of GLUE; second hand", "per": 222_903_552}
        out.append(Cell(cell=f"T5-base {cell}", model=model, by=by, worked_out=number, published=printed, **of, **more))

    both, one = ["self_attn", "mlp"], ["mlp"]
    norms = lambda m: m.count(**NORMS)  # noqa: E731
    compacter("adapter r=24 and norms", with_norms(adapter(24, "houlsby")), 1_855_104, ".832%")
    compacter("Pfeiffer adapter r=24 and norms", with_norms(adapter(24, "pfeiffer")), 951_360, ".427%")
    kronecker = {"name": "compacter", "size": 24, "n": 4, "rank": 1}
    compacter("Compacter and norms", with_norms({**kronecker, "targets": both}), 161_728, ".073%")
    compacter("Compacter++ and norms", with_norms({**kronecker, "targets": one}), 104_704, ".047%")
    low = lambda m: 48 * (2 * (768 + 24) + 24 + 768) + norms(m)  # noqa: E731
    compacter("low-rank adapter r=24, rank 1, and norms", low, 161_664, ".073%")
    phm = lambda m: 48 * (2 * (12**3 + 768 * 24 // 12) + 24 + 768) + norms(m)  # noqa: E731
    compacter("PHM adapter r=24, n=12, and norms", phm, 398_976, ".179%")
    compacter("prompt l=100", {"name": "prompt", "length": 100, "table": "embed_tokens"}, 76_800, ".034%")
    compacter("intrinsic SAID 20k", lambda _: 20_000, 20_000, ".009%")
    why = "a bias at every kernel, and the norms, are 0.112%; one of 32,128 at the head too makes 0.127%"
    compacter("BitFit and norms", {"name": "bitfit+ln_tuning"}, 250_368, ".126%", "T5-base, biases", why=why)
    return out


def of_encoders() -> list[Cell]:
    out = []

    def add(paper, cell, model, by, number, printed, source, **more):
        out.append(
            Cell(
                paper=paper, cell=cell, model=model, by=by, worked_out=number, published=printed, source=source, **more
            )
        )

    bitfit = "BitFit (2106.10199)"
    for model, number, printed, total in (
        ("BERT-base-cased", 102_912, "0.09%", 108_310_272),
        ("BERT-large-cased", 272_384, "0.08%", 333_579_264),
    ):
        add(
            bitfit, f"{model}, biases", model, {"name": "bitfit"}, number, printed, "the authors' repository", per=total
        )
    mam = "MAM adapter (2110.04366)"

    def both(length, size):
        parts = {"prefix": {"length": length}, "adapter": {"placement": "scaled_parallel", "size": size}}
        return {"name": "prefix+adapter", **parts}

    add(
        mam,
        "BART-large MAM l=30, r=512",
        "BART-large",
        both(30, 512),
        27_414_528,
        "6.7%",
        "table of XSum; second hand",
        per=406_291_456,
    )
    add(
        mam,
        "BART-large prefix l=200",
        "BART-large",
        {"name": "prefix", "length": 200},
        14_745_600,
        "3.6%",
        "table of XSum; second hand",
        per=406_291_456,
    )
    add(
        mam,
        "RoBERTa-base MAM l=16, r=16",
        "RoBERTa-base",
        both(16, 16),
        599_232,
        "0.5%",
        "table of GLUE; second hand",
        per=124_645_632,
    )
    ada = "AdaLoRA (2303.10512)"
    kernels = (*ATTENTION, "up_proj", "down_proj")
    add(
        ada,
        "DeBERTaV3-base LoRA r=2",
        "DeBERTaV3-base",
        lora(2, *kernels),
        331_776,
        "0.33M",
        "table of GLUE; second hand",
    )
    add(
        ada,
        "DeBERTaV3-base LoRA r=8",
        "DeBERTaV3-base",
        lora(8, *kernels),
        1_327_104,
        "1.33M",
        "table of GLUE; second hand",
    )
    boft = "BOFT (2311.06243)"

    def skew(block: int, factors: int) -> Formula:
        """factors x (in / block) skew blocks, and two vectors as wide as input and output."""
        each = lambda n_in, n_out: factors * (n_in // block) * math.comb(block, 2) + n_in + n_out  # noqa: E731
        return lambda m: sum(s.stack[0] * each(*s.shape) for s in m.sites.values() if s.kind == "linear")

    source = "table of GLUE; second hand; formula inferred from the figure"
    add(boft, "DeBERTaV3-base BOFT m=2, b=8", "DeBERTaV3-base", skew(8, 2), 746_496, "0.75M", source)
    add(boft, "DeBERTaV3-base OFT b=16", "DeBERTaV3-base", skew(16, 1), 787_968, "0.79M", source)
    return out


def of_decoders() -> list[Cell]:
    out = []

    def add(paper, cell, model, by, number, printed, source, **more):
        out.append(
            Cell(
                paper=paper, cell=cell, model=model, by=by, worked_out=number, published=printed, source=source, **more
            )
        )

    vera = "VeRA (2310.11454)"
    for model, number, printed, source in (
        ("LLaMA-7B", 159_907_840, "159.9M", "table of instruction tuning; second hand"),
        ("LLaMA-13B", 250_347_520, "250.3M", "table of instruction tuning; second hand"),
        ("LLaMA-33B", 487_587_840, "", ""),
        ("LLaMA-65B", 799_539_200, "", ""),
    ):
        add(vera, f"{model} LoRA all linear r=64", model, everywhere(64), number, printed, source)
    for model, rank, number, printed in (
        ("LLaMA-7B", 1024, 1_589_248, "1.6M"),
        ("LLaMA-13B", 1024, 2_416_640, "2.4M"),
        ("LLaMA-7B", 256, 1_417_216, "1.4M"),
    ):
        by = {"name": "vera", "rank": rank, "targets": "all-linear"}
        source = "abstract of version 1" if rank == 256 else "table of instruction tuning; second hand"
        add(vera, f"{model} VeRA all linear r={rank}", model, by, number, printed, source)
    for model, rank, number, printed in (
        ("RoBERTa-base", 1024, 43_008, "0.043M"),
        ("RoBERTa-large", 256, 61_440, "0.061M"),
        ("GPT-2 medium", 1024, 98_304, "0.098M"),
        ("GPT-2 large", 1024, 165_888, "0.17M"),
    ):
        by = {"name": "vera", "rank": rank, "targets": ["q_proj", "v_proj"]}
        add(vera, f"{model} VeRA q,v r={rank}", model, by, number, printed, "tables of GLUE and E2E; second hand")

    places = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    for model, total, lora_32, dora_32, dora_16 in (
        ("LLaMA-7B", 6_738_415_616, (56_098_816, "0.83%"), (56_975_360, "0.84%"), (28_925_952, "0.43%")),
        ("LLaMA-13B", 13_015_864_320, (87_818_240, "0.67%"), (89_190_400, "0.68%"), (45_281_280, "0.35%")),
        ("Llama-3-8B", 8_030_261_248, (56_623_104, "0.70%"), (57_409_536, "0.71%"), (29_097_984, "0.35%")),
    ):
        why = "0.3624% computed; the table's half of its r=32" if model == "Llama-3-8B" else ""
        for name, rank, (number, printed) in (("lora", 32, lora_32), ("dora", 32, dora_32), ("dora", 16, dora_16)):
            by = {"name": name, "rank": rank, "targets": places}
            title = {"lora": "LoRA", "dora": "DoRA"}[name]
            more = {"why": why} if rank == 16 else {}
            cell = f"{model} {title} q,k,v,up,down r={rank}"
            add("DoRA (2402.09353)", cell, model, by, number, printed, "table 1; second hand", per=total, **more)

    pissa = "PiSSA (2404.02948)"
    for model, rank, number, printed in (
        ("Llama-2-7B", 128, 319_815_680, "320M"),
        ("Mistral-7B", 64, 167_772_160, "168M"),
        ("Gemma-7B", 64, 200_015_872, "200M"),
    ):
        add(pissa, f"{model} all linear r={rank}", model, everywhere(rank), number, printed, "second hand")

    lwr = "LoRA Without Regret (Schulman et al. 2025)"
    for name, rank, targets, number, printed in (
        ("MLP", 256, MLP, 486_866_944, "0.49B"),
        ("attention", 256, ATTENTION, 251_985_920, "0.25B"),
        ("all", 256, ATTENTION + MLP, 704_970_752, "0.70B"),
        ("MLP", 128, MLP, 243_433_472, "0.24B"),
    ):
        by = lora(rank, *targets, "lm_head")
        add(
            lwr,
            f"Llama-3.1-8B {name} and unembedding r={rank}",
            "Llama-3.1-8B",
            by,
            number,
            printed,
            "parameters of the experiments",
        )
    tinker = "tinker-cookbook (Thinking Machines)"
    for model, *numbers in (
        ("Llama-3.2-1B", 491_520, 212_992, 130_304),
        ("Llama-3.2-3B", 946_176, 573_440, 131_328),
        ("Llama-3.1-8B", 1_769_472, 851_968, 132_352),
    ):
        parts = (("MLP", MLP), ("attention", ATTENTION), ("unembedding", ("lm_head",)))
        for (part, targets), number in zip(parts, numbers, strict=True):
            source = "parameters per rank by component"
            add(tinker, f"{model} {part}, one rank", model, lora(1, *targets), number, f"{number:,}", source)

    fourier = "FourierFT (2405.03003)"
    for model, number, printed in (
        ("RoBERTa-base", 24_000, "0.024M"),
        ("RoBERTa-large", 48_000, "0.048M"),
        ("GPT-2 medium", 48_000, "0.048M"),
        ("GPT-2 large", 72_000, "0.072M"),
        ("Llama-2-7B", 64_000, "0.064M"),
        ("Llama-2-13B", 80_000, "0.08M"),
    ):
        by = {"name": "fourierft", "frequencies": 1000, "targets": ["q_proj", "v_proj"]}
        add(
            fourier,
            f"{model} q,v n=1000",
            model,
            by,
            number,
            printed,
            "tables of GLUE, E2E and instruction tuning; second hand",
        )
    long = "LongLoRA (2309.12307)"
    add(long, "Llama-2-7B norms", "Llama-2-7B", NORMS, 266_240, ".004%", "second hand", per=6_738_415_616)
    table = {"name": "full", "targets": r".*embed_tokens"}
    add(long, "Llama-2-7B embedding", "Llama-2-7B", table, 131_072_000, "<2%", "second hand", per=6_738_415_616)
    return out


def of_peft() -> list[Cell]:
    """What Hugging Face PEFT's documentation and notebooks print."""
    head = {"modules_to_save": ("classifier_dense", "classifier_out_proj")}
    qv = ["q_proj", "v_proj"]
    rows = (
        ("Qwen2.5-3B LoRA q,v r=16", "Qwen2.5-3B", lora(16), 3_686_400),
        ("Qwen2.5-3B with LoRA q,v r=16, all", "Qwen2.5-3B", lambda m: m.total + m.count(**lora(16)), 3_089_625_088),
        ("flan-T5-large LoRA q,v r=16", "T5.1.1-large", lora(16), 4_718_592),
        ("OPT-6.7B LoRA q,v r=16", "OPT-6.7B", lora(16), 8_388_608),
        ("Whisper-large-v2 LoRA q,v r=32", "Whisper-large-v2", lora(32), 15_728_640),
        (
            "ViT-base LoRA q,v r=16, 101 classes",
            "ViT-base, 101 classes",
            lora(16, modules_to_save=("classifier",)),
            667_493,
        ),
        (
            "mT0-large (IA)3",
            "mT0-large",
            {"name": "ia3"},
            282_624,
        ),
        ("BLOOMZ-560M prefix l=20", "BLOOMZ-560M", {"name": "prefix", "length": 20}, 983_040),
        ("BLOOMZ-560M prompt l=8", "BLOOMZ-560M", {"name": "prompt", "length": 8}, 8_192),
        (
            "RoBERTa-base FourierFT q,v n=1000 with head",
            "RoBERTa-base, 2 classes",
            {"name": "fourierft", "frequencies": 1000, "targets": qv, **head},
            616_130,
        ),
        (
            "RoBERTa-base C3A q,v b=768 with head",
            "RoBERTa-base, 2 classes",
            {"name": "c3a", "block": 768, "targets": qv, **head},
            610_562,
        ),
    )
    source = "huggingface/peft, docs and examples"
    return [
        Cell(paper="Hugging Face PEFT", cell=c, model=m, by=by, worked_out=n, published=f"{n:,}", source=source)
        for c, m, by, n in rows
    ]


def all_cells() -> list[Cell]:
    return [*of_models(), *of_lora(), *of_t5(), *of_encoders(), *of_decoders(), *of_peft()]
