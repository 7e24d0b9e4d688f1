"""The command line: each command is one function below, thin over the library."""

from __future__ import annotations

import argparse
import ast
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

OVERRIDE = re.compile(r"--config\.([\w.]+)=(.*)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; wrong input ends in one line on stderr and status 1."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    args, rest = _parser().parse_known_args(argv)
    args.overrides = []
    for word in rest:
        found = OVERRIDE.fullmatch(word)
        if not found or args.command not in ("train", "inspect", "plan", "sweep"):
            print(
                f"peftax {args.command}: unknown argument {word!r}; see peftax {args.command} --help", file=sys.stderr
            )
            return 2
        args.overrides.append((found[1], found[2]))
    from absl import logging

    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO if args.verbose else logging.WARNING)
    try:
        if "coordinator" in args:
            from peftax import processes

            processes.start(args.coordinator, args.processes, args.process)
        return args.run(args) or 0
    except Exception as error:
        others, text = _others(), _explained(args, error)
        if others is None and text is None:
            raise
        if text is None:
            traceback.print_exc()
        else:
            print(f"peftax {args.command}: {text}", file=sys.stderr)
        if others is not None:
            others.end(1)
        return 1


def _others():
    """peftax.processes where this command is one of several processes, else None; JAX is not imported to say no."""
    processes = sys.modules.get("peftax.processes")
    return processes if processes is not None and processes.several() else None


def _explained(args, error: Exception) -> str | None:
    """An error as one line; None of one that nobody expects, or whose traceback is wanted."""
    if args.debug:
        return None
    others = _others()
    if others is not None and (text := others.lost(error)):
        return text
    full = _disk_is_full(error)
    if not (full or isinstance(error, (ValueError, KeyError, TypeError, OSError, FloatingPointError, MemoryError))):
        return None
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    if full:
        where = getattr(args, "workdir", None) or getattr(args, "into", None) or "the output"
        text = (
            f"the disk that holds {where} is full ({str(error).splitlines()[0][:200]}): free some space and give "
            "the same command again; what was whole there is whole"
        )
    notes = "".join(f" ({n})" for n in getattr(error, "__notes__", ()) if n.startswith("at site"))
    return f"{text}{notes}"


def _disk_is_full(error: BaseException) -> bool:
    """Writers of other libraries wrap what the system said."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftax", description="Parameter-efficient fine-tuning for JAX and Flax.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        sub.add_argument("--verbose", action="store_true", help="log what is going on")
        return sub

    def model(sub: argparse.ArgumentParser, adapter: bool | None = True, several: bool = False) -> None:
        sub.add_argument("--base", required=True, help="Hugging Face folder, .gguf or .safetensors file, or hub id")
        if several:
            sub.add_argument("--adapter", required=adapter, nargs="+", help="adapter folder; several: they act at once")
            sub.add_argument("--weights", type=float, nargs="+", help="one for each adapter, also negative; default: 1")
        elif adapter is not None:
            sub.add_argument("--adapter", required=adapter, help="adapter folder")
        sub.add_argument("--dtype", default="float32", help="of activations and products")
        sub.add_argument("--quantize", type=_literal, default=(), help="rules as in config.model.quantize")

    def cluster(sub: argparse.ArgumentParser) -> None:
        group = sub.add_argument_group(
            "several processes",
            "found by themselves on Slurm, GKE, TPU VMs and under Open MPI; elsewhere give all three",
        )
        group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        group.add_argument("--processes", type=int, metavar="N", help="how many there are; 1: this one alone")
        group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")

    sub = command(train, "train a recipe; --config.KEY=VALUE overrides its keys, left to right")
    sub.add_argument("--config", required=True, help="a shipped recipe's name or a .py file")
    sub.add_argument("--machine", help="a machine that the recipe names: its mesh and batch")
    sub.add_argument(
        "--workdir",
        required=True,
        help="folder of the run; the same command goes on where it was killed, or saved itself on SIGTERM (status 0)",
    )
    cluster(sub)

    sub = command(inspect, "show a recipe's first batch, sites, counts and estimated memory; trains nothing")
    sub.add_argument("--config", required=True, help="a shipped recipe's name or a .py file")
    sub.add_argument("--machine", help="a machine that the recipe names: its mesh and batch")
    sub.add_argument("--rows", type=int, default=4, help="rows of the batch to show")

    sub = command(plan, "compile a recipe's programs for a machine that is not here: does it fit, what does it cost")
    sub.add_argument("--config", required=True, help="a shipped recipe's name or a .py file")
    sub.add_argument("--topology", required=True, help="the machine: a100-80gb:1, h100:8, v5e-16, v5p:2x2x4, ...")
    sub.add_argument("--programs", nargs="+", default=(), help="only these of init, step, evaluate, merge")
    sub.add_argument("--tokens", type=int, help="of a dataset, padding counted: time and cost of one epoch")
    sub.add_argument("--price", type=float, help="of one device and hour")
    sub.add_argument("--members", type=int, default=1, help="runs of a sweep that train in one program")
    sub.add_argument(
        "--search", action="store_true", help="try meshes, batches and remat; those that fit, quickest first"
    )
    sub.add_argument(
        "--bits",
        action="store_true",
        help="with --search: try NF4 and int8 tables too; where the recipe packs its base this is the default",
    )
    sub.add_argument("--json", action="store_true")

    sub = command(sweep, "run the members of a recipe's sweep; what is finished is not run again")
    sub.add_argument("--config", required=True, help="a recipe with sweep(add): its name or a .py file")
    sub.add_argument("--workdir", required=True, help="folder of the sweep, with one for each member")
    sub.add_argument("--on", default="local", help="engine: local, slurm, ray, kubernetes")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine: jobs=2")
    sub.add_argument("--retry", action="store_true", help="failed members too")
    sub.add_argument(
        "--together", type=int, default=8, help="members that may share a program: at most so many; 1: none"
    )
    sub.add_argument(
        "--extend",
        type=int,
        metavar="ROUNDS",
        help="while an arm's best learning rate is at the edge of its grid, one rate more for every arm: so often at "
        "most; default 3, 0: never",
    )
    sub.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=(),
        help="more seeds for what was chosen, before test is read: it is chosen by the seeds that all rates have",
    )
    sub.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="NAME=DATA",
        help="the loss of every finished member, and of its untouched base, on other data: a file, hub name or task, "
        "with #SPLIT; nothing is trained again; what was asked once is asked",
    )
    sub.add_argument("--dry", action="store_true", help="only say what would run")

    sub = command(ls, "runs and sweeps: status, steps, losses")
    sub.add_argument("folders", nargs="+")

    sub = command(report, "a sweep as a page: tables, figures with their CSV files, Markdown, LaTeX")
    sub.add_argument("folder", help="of the sweep")
    sub.add_argument("--into", help="default: FOLDER/report")
    sub.add_argument("--title")

    sub = command(diff, "in what two runs differ: config, versions, results")
    sub.add_argument("folders", nargs=2)

    sub = command(evaluate, "held-out loss of a base with or without an adapter")
    model(sub, adapter=False, several=True)
    sub.add_argument("--data", help="file or hub name with messages, or prompt and completion")
    sub.add_argument("--split", default="test", help="split of the data or the task")
    sub.add_argument("--task", help="a task instead of data, such as function_calling")
    sub.add_argument("--limit", type=int, help="at most this many rows")
    sub.add_argument("--length", type=int, default=1024, help="context, tokens")
    cluster(sub)

    sub = command(generate, "answer a prompt")
    model(sub, adapter=False, several=True)
    sub.add_argument("--prompt", required=True, action="append", help="user message; may be given several times")
    sub.add_argument("--system", help="system message")
    sub.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    sub.add_argument("--max-new-tokens", type=int, default=128)
    sub.add_argument("--task-id", type=int, help="of an adapter for several tasks: which")

    sub = command(merge, "fold adapters into the weights and write a Hugging Face checkpoint")
    model(sub, several=True)
    sub.add_argument("--into", required=True, help="folder to write")
    sub.add_argument("--pack", action="store_true", help="of a base in few bits: pack the folded kernels again")
    sub.add_argument("--data", help="file or hub name: print the loss on it before and after")
    cluster(sub)

    sub = command(convert, "write a base, or with --adapter an adapter, as a Hugging Face folder")
    model(sub, adapter=False)
    sub.add_argument("--into", required=True, help="folder to write")
    sub.add_argument(
        "--to-lora",
        type=_rank,
        metavar="RANK",
        help="of an adapter of any method: as LoRA of this rank (of a LoRA adapter: its best ranks); a number with a "
        "point is the share of each site's energy to keep",
    )

    sub = command(combine, "several LoRA adapters of one base as one")
    model(sub, adapter=None)
    sub.add_argument("--adapters", required=True, nargs="+", help="adapter folders")
    sub.add_argument("--weights", type=float, nargs="+", help="one for each, negative ones subtract; default: 1")
    sub.add_argument("--kind", default="svd", help="as add_weighted_adapter's combination_type in Hugging Face PEFT")
    sub.add_argument("--rank", type=int, help="of kinds with an svd; default: the adapters' largest")
    sub.add_argument("--density", type=float, help="of ties, dare and magnitude_prune: the share of numbers that stays")
    sub.add_argument("--majority", default="total", help="of ties, who elects a sign: total or frequency")
    sub.add_argument("--clamp", type=float, help="of kinds with an svd: the quantile at which factors are cut")
    sub.add_argument("--seed", type=int, default=0, help="of dare's random numbers")
    sub.add_argument("--into", required=True, help="folder to write")

    sub = command(count, "trainable and total numbers of an adapter, without allocating weights")
    sub.add_argument("--model", required=True, help="config.json of the base")
    sub.add_argument("--adapter", required=True, help="adapter folder or adapter_config.json")
    sub.add_argument("--json", action="store_true")

    sub = command(methods, "all methods and LoRA's starts as Markdown tables, or one method whole")
    sub.add_argument("name", nargs="?", help="a method to show whole")
    sub.add_argument("--into", type=Path, help="a page: renew the short table between its <!-- methods --> marks")

    sub = command(verify, "compare an adapter's logits with expected ones")
    sub.add_argument("--base", help="Hugging Face folder or file of the base")
    sub.add_argument("--adapter", help="adapter folder")
    sub.add_argument("--inputs", help="ids.npy [B, T]")
    sub.add_argument("--expect", help="logits.npy [B, T, V]; more rows than T: the last T are compared")
    sub.add_argument(
        "--task-ids", type=int, nargs="+", help="of an adapter for several tasks: each row's, or one for all"
    )
    sub.add_argument("--cases", help="a folder of cases: config.json, base_model.safetensors, input_ids.npy, CASE/...")
    sub.add_argument("--only", nargs="+", help="names of cases to run")
    sub.add_argument("--atol", type=float, default=1e-5)
    sub.add_argument("--rtol", type=float, default=1e-3, help="of the adapter's own effect")
    sub.add_argument("--strict", action="store_true", help="with --cases: a skipped case fails")
    return parser


def train(args) -> None:
    from peftax import recipe
    from peftax import sweep as sweeps

    config = recipe.load(args.config, args.overrides, on=args.machine).to_dict()
    _say(json.dumps(sweeps.train_alone(config, args.workdir)))


def _say(text: object, file=None) -> None:
    """Print once, however many processes there are."""
    from peftax import processes

    if processes.first():
        print(text, file=file)


def inspect(args) -> None:
    from peftax import recipe
    from peftax.train import inspect as shown

    shown.show(recipe.load(args.config, args.overrides, on=args.machine).to_dict(), rows=args.rows)


def plan(args) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the machine that it is for is not this one
    from rich.console import Console

    from peftax import machines, recipe
    from peftax import plan as planner

    machine = machines.named(args.topology)
    named = recipe.machines(args.config)
    config = recipe.load(args.config, args.overrides, on=args.topology if args.topology in named else None).to_dict()
    console = Console(highlight=False, soft_wrap=True)
    if args.search:
        if args.programs or args.members > 1 or args.tokens or args.price:
            raise ValueError("--search looks at the step of one run; ask a plan of what it finds for anything else")
        packs = args.bits or config["model"]["quantize"]
        found = planner.search(config, machine, quantized=planner.BITS if packs else ())
        if args.json:
            print(json.dumps([{"config": planner.differs(config, c), **planner.to_json(p)} for c, p in found]))
        else:
            planner.show_search(config, found, console)
        return
    done = planner.plan(config, machine, only=args.programs, members=args.members, tokens=args.tokens, price=args.price)
    if args.json:
        print(json.dumps(planner.to_json(done)))
    else:
        planner.show(done, console)


def sweep(args) -> int:
    from peftax import results, selection
    from peftax import sweep as sweeps

    if args.dry:
        for name, overrides in sweeps.members(args.config, args.overrides, sweeps.added(args.workdir)).items():
            print(name, *(f"--config.{key}={value}" for key, value in overrides))
        return 0
    settings = {key: _value(value) for key, value in _pairs("--set", args.set).items()}
    found = selection.run(
        args.config,
        args.workdir,
        args.overrides,
        extend=selection.ROUNDS if args.extend is None else args.extend,
        seeds=args.seeds,
        on=args.on,
        measures=_pairs("--measure", args.measure),
        retry=args.retry,
        together=args.together,
        **settings,
    )
    for folder, status in found.items():
        why = f": {sweeps.error(folder)}" if status == "failed" else ""
        print(f"{status:9} {folder.name}{why}")
    unread = {folder: names for folder in found if (names := sweeps.unread(folder))}
    for folder, names in unread.items():
        why = (
            sweeps.error(folder, "unread.txt") if (folder / "unread.txt").exists() else "the engine has yet to read it"
        )
        print(f"unread    {folder.name}: {', '.join(names)}: {why}")
    if sweeps.ENDED.issuperset(found.values()):
        for c in selection.choices(args.workdir):
            if c.edge in ("low", "high"):
                print(f"{results.label(c.arm)}: learning rate {c.rate:g} is still at the edge", file=sys.stderr)
    return int("failed" in found.values() or any((folder / "unread.txt").exists() for folder in unread))


def _pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark:
            raise ValueError(f"{flag} {word!r}: want KEY=VALUE")
        pairs[key] = value
    return pairs


def ls(args) -> None:
    from rich.console import Console

    from peftax import results

    results.show(results.load(*args.folders), Console(highlight=False, soft_wrap=True))


def report(args) -> None:
    from peftax import report as reports

    print(reports.write(args.folder, args.into, title=args.title))


def diff(args) -> None:
    from peftax import results

    for key, (one, other) in results.differences(*map(Path, args.folders)).items():
        print(f"{key}: {one!r} | {other!r}")


def evaluate(args) -> None:
    from peftax.data import packing
    from peftax.train import evaluate as scores
    from peftax.train import setup

    base = _base(args)
    apply, params, _ = _attached(base, args)
    if args.task:
        found = setup.examples(base, args.split, length=args.length, policy="drop", task=args.task, limit=args.limit)
    elif args.data:
        found = _examples(base, args.data, args.split, args.limit, args.length)
    else:
        raise ValueError("give --data or --task")
    found = scores.nll(apply, params, packing.pack(found, args.length), hits=bool(base.labels), at=base.rows)
    _say(json.dumps({k: v for k, v in found.items() if k != "per_row"}))


def _examples(base, data, split, limit, length):
    from peftax.train import setup

    where = {"source": data, "source_split": split if not Path(data).exists() else "train"}
    return setup.examples(base, split, length=length, policy="drop", task=None, limit=limit, **where)


def generate(args) -> None:
    from peftax.data import chat
    from peftax.train import setup
    from peftax.train.generate import Generator

    base = _base(args)
    apply, params, front = _attached(base, args, () if args.task_id is None else (args.task_id,))
    system = [{"role": "system", "content": args.system}] if args.system else []
    prompts = [
        chat.prompt_ids(text if args.raw else [*system, {"role": "user", "content": text}], base.tokenizer)
        for text in args.prompt
    ]
    write = Generator(
        apply,
        base.model.init_cache,
        max_new_tokens=args.max_new_tokens,
        eos_ids=setup.eos_ids(base),
        front=front,
        task=args.task_id,
        batch_size=min(8, len(prompts)),
    )
    for ids in write(params, prompts):
        print(base.tokenizer.decode(ids))


def merge(args) -> None:
    from peftax import weights
    from peftax.core import folding
    from peftax.core.method import chain, parts
    from peftax.data import packing
    from peftax.train import evaluate as scores
    from peftax.train import setup

    base = _base(args, param_dtype=None)  # what is written is as wide as what was read
    run = setup.attach(base, *args.adapter, weights=args.weights)
    if stays := [piece.name for piece in parts(run.method) if piece.fold is None]:
        raise ValueError(
            f"{' '.join(args.adapter)}: {'+'.join(stays)} is no change of weights and cannot be merged into them; "
            "serve it as an adapter"
        )
    shapes, read = folding.by_layer(run.method, run.params, base.sites, pack=args.pack, like=base.params)
    beside = {"tokenizer": base.tokenizer, "generation": base.generation}
    into = weights.save(shapes, base.config, args.into, **beside, read=read)
    if args.data:
        rows = packing.pack(_examples(base, args.data, "train", None, 1024), 1024)
        before = scores.nll(run.apply, run.params, rows, at=base.rows)["nll"]
        del base, run, read  # the folded weights take their place
        base = setup.open_base(path=str(into), dtype=args.dtype)
        after = scores.nll(base.inject(chain()), base.params, rows, at=base.rows)["nll"]
        _say(f"loss per token: adapted {before:.4f}, folded {after:.4f} ({after - before:+.4f})", file=sys.stderr)
    _say(into)


def convert(args) -> None:
    from peftax import combination, weights
    from peftax.train import setup
    from peftax.weights import adapters

    if args.to_lora is not None and not args.adapter:
        raise ValueError("--to-lora wants an --adapter")
    base = _base(args)
    if not args.adapter:
        beside = {"tokenizer": base.tokenizer, "generation": base.generation}
        into = weights.save(base.params, base.config, args.into, **beside)
    elif args.to_lora is None:
        run = setup.attach(base, args.adapter)
        into = run.save(args.into)
        _note(run.method.name)
    else:
        method, part, raw = adapters.load(args.adapter, base.params, base.sites)
        change = combination.truncate if method.name == "lora" else combination.convert
        into = _written(change(method, part, base.sites, args.to_lora), base, args.into, raw)
    print(into)


def _note(name: str) -> None:
    """What Hugging Face PEFT will not read, on stderr."""
    from peftax.weights import adapters

    if line := adapters.without_peft_type(name):
        print(f"note: {line}", file=sys.stderr)


def combine(args) -> None:
    from peftax import combination
    from peftax.train import setup
    from peftax.weights import adapters

    base = _base(args, args.adapters[0])
    loaded = [adapters.load(folder, base.params, base.sites) for folder in args.adapters]
    for folder, (_, part, _) in zip(args.adapters, loaded, strict=True):
        setup.check_beside(base, part, folder)
    made = combination.combine(
        [(method, part) for method, part, _ in loaded],
        args.weights or [1.0] * len(loaded),
        base.sites,
        kind=args.kind,
        rank=args.rank,
        density=args.density,
        majority=args.majority,
        clamp=args.clamp,
        seed=args.seed,
    )
    print(_written(made, base, args.into, loaded[0][2]))


def _written(made, base, into, raw) -> Path:
    from peftax import combination
    from peftax.train import setup

    if made.errors:
        print(combination.report(made), file=sys.stderr)
    run = setup.Run(base, made.method, made.part, base.inject(made.method))
    return run.save(into, base=raw.get("base_model_name_or_path"))


def count(args) -> None:
    import jax
    import jax.numpy as jnp

    from peftax import methods, models
    from peftax.core import sites
    from peftax.weights import adapters, source

    folder = Path(args.adapter) if Path(args.adapter).is_dir() else Path(args.adapter).parent
    labels, pooling = adapters.count_labels(folder), adapters.read_classifier(folder).get("pooling")
    head = {"labels": labels, "pooling": pooling} if labels else {}
    model = models.build(source.read_json(args.model), scan=False, **head)
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    name, settings, raw = adapters.read_config(args.adapter)
    if raw.get("task_type") == "SEQ_CLS" and not labels:
        print(f"note: {folder} does not say how many labels there are: their head is not counted", file=sys.stderr)
    settings = adapters.without_heads(settings, shapes, found)
    n = sites.count(methods.make(name, **settings), shapes, found)
    if args.json:
        print(json.dumps(n))
    else:
        share = 100 * n["trainable"] / n["total"]
        print(f"trainable {n['trainable']:,} of {n['total']:,} ({share:.4f}%), method {name}")


def methods(args) -> None:
    from peftax import catalog

    if args.into:
        args.into.write_text(catalog.with_short_table(args.into.read_text()))
    else:
        print(catalog.page(args.name) if args.name else catalog.tables())


def verify(args) -> int:
    from peftax.weights import adapters, verification

    if args.cases:
        results = verification.cases(args.cases, only=args.only)
    elif all((args.base, args.adapter, args.inputs, args.expect)):
        _note(adapters.read_config(args.adapter)[0])
        results = [verification.one(args.base, args.adapter, args.inputs, args.expect, tasks=args.task_ids)]
    else:
        raise ValueError("give --base, --adapter, --inputs and --expect, or --cases")
    failed = 0
    for r in results:
        if r.skipped:
            print(f"skip {r.case}: {r.skipped}")
            failed += args.strict
            continue
        ok = r.difference <= args.atol + args.rtol * r.effect
        failed += not ok
        print(
            f"{'ok  ' if ok else 'FAIL'} {r.case}: largest difference {r.difference:.3e}, effect {r.effect:.3e}, "
            f"ratio {r.difference / max(r.effect, 1e-30):.1e}"
        )
    ran = sum(not r.skipped for r in results)
    print(f"{ran} compared, {len(results) - ran} skipped, {failed} failed")
    return int(bool(failed) or ran == 0)


def _rank(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a rank nor, with a point, a share of energy") from None


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{text!r} is no literal; want (('_proj', {{'fmt': 'nf4'}}),)") from None


def _value(text: str):
    """A literal, or where it is none (4GB, 10.0.0.5:6379) the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _base(args, adapter: str | None = None, **how):
    """The base, with the tables that this adapter's folder, or the command's first, grew."""
    from peftax.train import setup

    adapter = args.adapter if adapter is None else adapter
    adapter = adapter[0] if isinstance(adapter, list) else adapter
    return setup.open_base(path=args.base, dtype=args.dtype, quantize=args.quantize, adapter=adapter, **how)


def _attached(base, args, tasks=()):
    from peftax.core.method import chain, check_tasks
    from peftax.train import setup

    if not args.adapter:
        return base.inject(chain()), base.params, 0
    run = setup.attach(base, *args.adapter, weights=args.weights)
    if tasks:
        check_tasks(run.method, tasks)
    return run.apply, run.params, run.method.front


if __name__ == "__main__":
    sys.exit(main())
