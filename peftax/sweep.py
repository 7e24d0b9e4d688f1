"""A recipe's sweep: members, a folder for each, run by an engine. What is finished is not run again.

A recipe says what it sweeps beside its config:

  def sweep(add):
      for rank in (4, 16):
          for seed in range(3):
              add({"method.rank": rank, "seed": seed})

Each `add` is a member: overrides of the config, left to right, so that `method.name` installs a method's defaults and
later keys change them. "seed" stands for all seeds of a run. A sweep's folder holds

  sweep.json            the recipe, its members, and what was added to them: rounds of learning rates, seeds
  MEMBER/member.json    its overrides
  MEMBER/environment.json   versions, git revision, host
  MEMBER/...            what a run writes (config.json, metrics.jsonl, adapter/, checkpoints/)
  MEMBER/result.json    once it is finished; error.txt where it failed
  MEMBER/test.json      read once, where it was chosen; metrics.json: other data that was asked for
  bases/                what the untouched bases come to on that
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peftax import recipe
from peftax.core import tree
from peftax.data import asset
from peftax.weights.source import read_json, write_json

Pairs = Sequence[tuple[str, str]]
RATE = "optimizer.learning_rate"
SEEDS = ("data.seed", "train.init_seed", "train.dropout_seed")
ENGINES = ("local", "slurm", "ray", "kubernetes")
PACKAGES = ("peftax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "transformers", "datasets")
LONG = 120  # of a folder's name
ENDED = frozenset({"finished", "failed"})


def members(
    name_or_path: str, overrides: Pairs = (), rounds: Sequence[Sequence[Mapping[str, Any]]] = ()
) -> dict[str, list[tuple[str, str]]]:
    """{name: overrides} of a recipe's sweep; `overrides` come before each member's own.

    Args:
      rounds: of what is beside the recipe's, [{"arm": see `arm`, "rate": a number, or None where none is swept}, ...]
        each; a rate is tried with all seeds of its arm, or with "seeds" where it says some.

    Raises ValueError where the recipe sweeps nothing, or says the same member twice.
    """
    sweep = recipe.sweep_of(name_or_path)
    if sweep is None:
        raise ValueError(f"recipe {name_or_path} has no sweep(add); write one beside its get_config")
    added: list[dict[str, Any]] = []
    sweep(lambda values: added.append(dict(values)))
    if not added:
        raise ValueError(f"recipe {name_or_path}: its sweep(add) adds no member")
    short = short_names({key for values in added for key in values})
    found: dict[str, list[tuple[str, str]]] = {}

    def put(values: Mapping[str, Any]) -> str | None:
        """The name of a new member, None where it is there."""
        own, name = [*overrides, *pairs(values)], member_name(values, short)
        if found.get(name, own) != own:  # letters that a folder's name cannot have were all that told them apart
            name = _with_checksum(name, repr(own))
        new = name not in found
        found[name] = own
        return name if new else None

    for values in added:
        if put(values) is None:
            raise ValueError(f"recipe {name_or_path}: its sweep adds {member_name(values, short)} twice")
    short.setdefault("seed", "seeds" if "seed" in short.values() else "seed")
    for more in (more for each in rounds for more in each):
        for values in (values for values in added if arm(pairs(values)) == more["arm"]):
            values = {**values, **({} if more["rate"] is None else {RATE: more["rate"]})}
            for seed in more.get("seeds", (None,)):
                alone = {key: value for key, value in values.items() if key not in SEEDS}
                put(values if seed is None else {**alone, "seed": seed})
    return found


def arm(own: Pairs) -> list[list[str]]:
    """All that a member sweeps but its learning rate and its seeds."""
    return [list(pair) for pair in own if pair[0] not in (RATE, *SEEDS)]


def pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A member's values as overrides; "seed" is all of a run's."""
    flat = []
    for key, value in values.items():
        value = value.item() if isinstance(value, np.generic) else value
        text = value if isinstance(value, str) else repr(value)
        flat += [(k, text) for k in (SEEDS if key == "seed" else (key,))]
    return flat


def member_name(values: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """A folder's name that says what is swept: "rank=4,learning_rate=0.001,seed=0"."""
    words = []
    for key, value in values.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        text = re.sub(r"[^\w.+-]+", "_", text).strip("_")
        words.append(f"{short[key]}={text}")
    name = ",".join(words) or "base"
    return _with_checksum(name, name) if len(name) > LONG else name


def _with_checksum(name: str, of: str) -> str:
    return f"{name[: LONG - 9]}-{zlib.crc32(of.encode()):08x}"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last word of each key, or the whole where two keys end alike."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: word if list(last.values()).count(word) == 1 else key for key, word in last.items()}


def said(workdir: str | Path) -> dict[str, Any]:
    """What a sweep's folder says of it: sweep.json, or what it would begin with."""
    file = Path(workdir) / "sweep.json"
    return {"rounds": [], "seeds": [], "test": [], "measures": {}, **(read_json(file) if file.exists() else {})}


def say(workdir: str | Path, **more: Any) -> None:
    """Put more into sweep.json."""
    write_json(Path(workdir) / "sweep.json", {**said(workdir), **more})


def add_round(workdir: str | Path, rates: Mapping[str, float]) -> None:
    """One more learning rate for arms, each named by one of its members: {member: rate}. `lay_out` makes the members.

    Written before any folder is made, so that a round is there whole or not at all.
    """
    round_ = [{"arm": arm_of(workdir, name), "rate": rate} for name, rate in rates.items()]
    say(workdir, rounds=[*said(workdir)["rounds"], round_])


def add_seeds(workdir: str | Path, name: str, rate: float | None, seeds: Sequence[int]) -> None:
    """More seeds for one learning rate of a member's arm, as `add_round`."""
    more = {"arm": arm_of(workdir, name), "rate": rate, "seeds": list(seeds)}
    say(workdir, seeds=[*said(workdir)["seeds"], more])


def arm_of(workdir: str | Path, name: str) -> list[list[str]]:
    """The arm of a member that is laid out."""
    own = read_json(Path(workdir) / name / "member.json")["overrides"]
    return arm(own[len(said(workdir)["overrides"]) :])


def added(workdir: str | Path) -> list[list[dict[str, Any]]]:
    """What was added to the recipe's members: for `members`."""
    now = said(workdir)
    return [*now["rounds"], now["seeds"]]


def lay_out(name_or_path: str, workdir: str | Path, overrides: Pairs = ()) -> list[Path]:
    """The members' folders, of added rates too, made where they are not there; one that is there keeps what it is.

    Raises:
      ValueError: a member cannot be (a key that does not exist, a wrong value), or a folder of its name holds another.
    """
    workdir = Path(workdir)
    found = members(name_or_path, overrides, added(workdir))
    path = Path(name_or_path)
    where = str(path.resolve()) if path.suffix == ".py" else name_or_path
    for name, own in found.items():
        try:
            recipe.load(where, own)
        except (KeyError, ValueError, TypeError) as error:
            text = error.args[0] if error.args else str(error)
            raise ValueError(f"{name}: {text}") from error
    folders = []
    for name, own in found.items():
        folder, mine = workdir / name, {"recipe": where, "overrides": [list(p) for p in own]}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "member.json"
        if file.exists() and (old := read_json(file))["overrides"] != mine["overrides"]:
            raise ValueError(
                f"{folder} holds a member with other overrides, {old['overrides']}; choose a new --workdir"
            )
        write_json(file, mine)
        folders.append(folder)
    say(workdir, recipe=where, overrides=[list(p) for p in overrides], members=list(found))
    return folders


def run(
    name_or_path: str,
    workdir: str | Path,
    overrides: Pairs = (),
    *,
    on: str = "local",
    retry: bool = False,
    together: int = 8,
    **how: Any,
) -> dict[Path, str]:
    """Lay a sweep out and let an engine run the members that are not finished; failed ones only with `retry`. Of those
    that are finished it reads what is asked.

    Args:
      on: one of ENGINES; `how` are its settings, see peftax/engines.
      together: members that differ in learning rate, seed, alpha or rank train in one program, up to so many; 1: none.

    Returns:
      {folder: status}, see `status`.
    """
    if on not in ENGINES:
        raise ValueError(f"engine {on!r} is none of {', '.join(ENGINES)}")
    submit = importlib.import_module(f"peftax.engines.{on}").submit
    known = inspect.signature(submit).parameters
    if wrong := [k for k in how if k not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values())]:
        raise ValueError(f"engine {on} has no setting {wrong[0]!r}; the nearest: {tree.nearest(wrong[0], known)}")
    if lacking := [k for k, p in known.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty and k not in how]:
        raise ValueError(f"engine {on} wants {', '.join(lacking)}: {' '.join(f'--set {k}=...' for k in lacking)}")
    folders = lay_out(name_or_path, workdir, overrides)
    wanted = [f for f in folders if status(f) in ("waiting", "stopped") or (retry and status(f) == "failed")]
    trained = populations(wanted, together)
    for group in trained:
        if all(status(f) != "stopped" for f in group):  # else what failed stands still while its population goes on
            for folder in group:
                (folder / "error.txt").unlink(missing_ok=True)
    groups = trained + _grouped([f for f in folders if unread(f)], _source, together)
    if groups:
        submit({group[0]: command(*group) for group in groups}, Path(workdir), **how)
    return {folder: status(folder) for folder in folders}


def populations(folders: Sequence[Path], most: int) -> list[list[Path]]:
    """Members that may train in one program, side by side; those that cannot, or have begun by themselves, alone.

    A population that has a checkpoint goes on as it was, with those of it that have failed: they stand still there.
    """
    from peftax.train import population

    def begun(folder: Path) -> list[Path]:
        """The population in which a member has begun, where that is not at its end."""
        file = folder / "environment.json"
        group = [folder.parent / name for name in (read_json(file) if file.exists() else {}).get("population", ())]
        there = group and any((_of_population(group) / "checkpoints").glob("[0-9]*"))
        return group if there and not any(status(f) == "finished" for f in group) else []

    def kind(folder: Path) -> str | None:
        file = folder / "environment.json"
        if most < 2 or (file.exists() and "population" not in read_json(file)):
            return None
        config = config_of(folder)
        if population.together([config]) is not None:
            return None
        return json.dumps(population.fixed(config), sort_keys=True)

    on = {str(group): group for group in map(begun, folders) if group}
    gone_on = {folder for group in on.values() for folder in group}
    return [*on.values(), *_grouped([f for f in folders if f not in gone_on], kind, most)]


def _of_population(folders: Sequence[Path]) -> Path:
    """Where a population's checkpoints lie."""
    return folders[0].parent / "populations" / f"{zlib.crc32(','.join(f.name for f in folders).encode()):08x}"


def _grouped(folders: Sequence[Path], kind: Callable[[Path], str | None], most: int) -> list[list[Path]]:
    """Folders of one kind together, `most` at most; of no kind, alone."""
    groups: dict[str, list[Path]] = {}
    for folder in folders:
        groups.setdefault(kind(folder) or str(folder), []).append(folder)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), max(1, most))]


def config_of(folder: Path) -> dict[str, Any]:
    """A member's config, as its recipe says it now."""
    mine = read_json(folder / "member.json")
    return recipe.load(mine["recipe"], [tuple(p) for p in mine["overrides"]]).to_dict()


def seed_of(folder: Path) -> int | None:
    """A member's one seed; None where its seeds are not all the same."""
    config = recipe.flat(config_of(folder))
    found = {config[key] for key in SEEDS}
    return found.pop() if len(found) == 1 else None


def status(folder: Path) -> str:
    """ "finished" | "failed" | "running" | "stopped" (killed or told to stop: it goes on where it was) | "waiting" |
    "begun": a run of its own, of which nobody knows whether it is running or stopped.
    """
    if (folder / "result.json").exists():
        return "finished"
    if (folder / "error.txt").exists():
        return "failed"
    if _is_held(folder / ".lock"):
        return "running"
    if (folder / "environment.json").exists():
        return "stopped"
    return "begun" if (folder / "config.json").exists() and not (folder / "member.json").exists() else "waiting"


def run_member(folder: str | Path) -> dict[str, Any] | None:
    """Train one member, or go on with it; its result, or None where it was told to stop before its end.

    An error is written beside the run and raised.
    """
    from peftax.train import loop

    folder = Path(folder)
    with _held(folder / ".lock"):
        try:
            config = config_of(folder)
            write_json(folder / "environment.json", environment())
            done = loop.train(config, folder)
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc())
            raise
        return None if done["step"] < config["train"]["steps"] else _finish(folder, done)


def run_together(folders: Sequence[str | Path]) -> None:
    """Train several members in one program, or go on with them."""
    from peftax.train import population

    folders = [Path(f) for f in folders]
    names = [f.name for f in folders]
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(_held(folder / ".lock"))
            write_json(folder / "environment.json", {**environment(), "population": names})
        try:
            found = population.train([config_of(f) for f in folders], folders, _of_population(folders))
        except Exception:
            for folder in folders:
                (folder / "error.txt").write_text(traceback.format_exc())
            raise
        for folder, done in zip(folders, found, strict=True):
            if done is not None:
                _finish(folder, {**done, "population": len(folders)})


def unread(folder: Path) -> list[str]:
    """What sweep.json asks of a finished member and nobody has read yet: "test", names of measures."""
    if status(folder) != "finished":
        return []
    asked, file = said(folder.parent), folder / "metrics.json"
    there = read_json(file) if file.exists() else {}
    test = folder.name in asked["test"] and not (folder / "test.json").exists()
    return ["test"] * test + [name for name in asked["measures"] if name not in there]


def read(*folders: str | Path) -> None:
    """Read what is asked of finished members, from base and adapter. What cannot be read says why in unread.txt."""
    from peftax.train import readings

    kind, reader = None, None
    for folder in map(Path, folders):
        with _held(folder / ".lock"):
            try:
                for name in unread(folder):
                    if kind != _source(folder):
                        kind, reader = _source(folder), readings.Reader(config_of(folder))
                    _read(folder, name, reader)
            except Exception:
                (folder / "unread.txt").write_text(traceback.format_exc())
            else:
                (folder / "unread.txt").unlink(missing_ok=True)


def _read(folder: Path, name: str, reader: Any) -> None:
    if name == "test":
        write_json(folder / "test.json", {**reader.test(folder / "adapter"), "data": test_of(config_of(folder))})
        return
    source, base = said(folder.parent)["measures"][name], base_file(folder)
    with asset.made_once(base):  # the first reads, the others find it
        _measure(base, name, lambda: reader.measure(source))
    _measure(folder / "metrics.json", name, lambda: reader.measure(source, folder / "adapter"))


def _measure(file: Path, name: str, read: Callable[[], Mapping[str, float]]) -> None:
    there = read_json(file) if file.exists() else {}
    if name not in there:
        write_json(file, {**there, name: read()["nll"]})


def test_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config calls its test."""
    keys = ("task", "test", "test_split", "test_limit", "name")
    return {key: config["data"][key] for key in keys}


def _source(folder: Path) -> str:
    """All of a member's config that its readings see, but its adapter."""
    config = config_of(folder)
    seen = {k: v for k, v in config["data"].items() if k != "seed" and not k.startswith(("train", "valid"))}
    return json.dumps([config["model"], config["mesh"], seen], sort_keys=True)


def base_file(folder: Path) -> Path:
    """Where the readings of a finished member's untouched base lie: one for all that differ in nothing of it."""
    config = read_json(folder / "config.json")
    seen = json.dumps([config["model"], config["data"]["length"], config["data"]["chat_template"]], sort_keys=True)
    return folder.parent / "bases" / f"{zlib.crc32(seen.encode()):08x}.json"


def train_alone(config: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Train a config that is no sweep's member, or go on; at its end the folder holds what a finished member's does."""
    from peftax import processes
    from peftax.train import loop

    folder, found = Path(folder), environment()
    done = loop.train(config, folder)
    if processes.first() and done["step"] == config["train"]["steps"] and not (folder / "result.json").exists():
        write_json(folder / "environment.json", found)
        _finish(folder, done)
    return done


def _finish(folder: Path, done: Mapping[str, Any]) -> dict[str, Any]:
    """A finished member's result.json."""
    timings = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    result = {
        **{k: v for k, v in done.items() if k != "adapter"},
        "seconds": sum(t["seconds"] for t in timings),
        "tokens_per_second": sorted(t["tokens_per_second"] for t in timings)[len(timings) // 2] if timings else None,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "adapter_bytes": sum(f.stat().st_size for f in (folder / "adapter").rglob("*.safetensors")),
    }
    write_json(folder / "result.json", result)
    return result


def environment() -> dict[str, Any]:
    """What a run ran with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git": git.stdout.strip() or None,
        "host": platform.node(),
        "cores": len(os.sched_getaffinity(0)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def command(*folders: Path) -> list[str]:
    """What starts one member, or several in one program, as a process."""
    return [sys.executable, "-m", "peftax.sweep", *(str(folder.resolve()) for folder in folders)]


def error(folder: Path, file: str = "error.txt") -> str:
    """The last line of what a failed member said, or of why one could not be read."""
    return (folder / file).read_text().strip().splitlines()[-1]


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """The lock of a member's folder; raises where another process trains it."""
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{file.parent}: another process trains this member") from None
        yield


def _is_held(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def main(*folders: str) -> None:
    """`python -m peftax.sweep FOLDER...` trains members, and reads finished ones; of a list of groups (kubernetes) the
    one of this pod's index.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    paths = [Path(f) for f in folders]
    if paths[0].suffix == ".json":
        group = json.loads(paths[0].read_text())[int(os.environ["JOB_COMPLETION_INDEX"])]
        paths = [paths[0].parent / name for name in group]
    if all(status(path) == "finished" for path in paths):
        read(*paths)
    elif len(paths) == 1:
        run_member(paths[0])
    else:
        run_together(paths)


if __name__ == "__main__":
    main(*sys.argv[1:])
