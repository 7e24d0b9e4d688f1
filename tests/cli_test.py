"""The command line as a user meets it: results on stdout, one clear line where the input is wrong."""

import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peftax import cli
from peftax.train import setup
from tests.train import tiny_run

GOLDEN = Path(__file__).parent / "weights" / "golden"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return tiny_run.base_folder(folder / "base"), tiny_run.data_file(folder / "data.jsonl")


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """The workdir of a finished run of `peftax train`."""
    base, data = files
    workdir = tmp_path_factory.mktemp("run")
    assert cli.main([*train(base, data), "--config.train.steps=4", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(autouse=True, scope="module")
def one_device():
    patch = pytest.MonkeyPatch()
    devices = jax.devices()[:1]
    patch.setattr("peftax.sharding.jax.devices", lambda: devices)
    yield
    patch.undo()


def train(base, data) -> list[str]:
    return [
        "train",
        "--config=default",
        f"--config.model.path={base}",
        f"--config.data.train={data}",
        "--config.data.length=64",
        "--config.train.batch_size=8",
        "--config.train.tensorboard=False",
        "--config.optimizer.learning_rate=0.02",
    ]


def test_verify_count(capsys):
    assert cli.main(["verify", "--cases", str(GOLDEN)]) == 0
    out = capsys.readouterr().out
    cases = len(list(GOLDEN.glob("*/adapter_config.json")))
    assert f"{cases - 1} compared, 1 skipped, 0 failed" in out and "skip LILY: peft_type 'LILY' is not supported" in out
    assert cli.main(["verify", "--cases", str(GOLDEN), "--only", "LILY", "--strict"]) == 1
    assert cli.main(["verify", "--cases", str(GOLDEN), "--only", "LORA", "--atol=0", "--rtol=0"]) == 1
    one = ["--base", str(GOLDEN / "base_model.safetensors"), "--adapter", str(GOLDEN / "LORA")]
    one += ["--inputs", str(GOLDEN / "input_ids.npy")]
    assert cli.main(["verify", *one, "--expect", str(GOLDEN / "LORA" / "logits.npy")]) == 0
    assert cli.main(["verify", *one, "--expect", str(GOLDEN / "base_logits.npy")]) == 1
    capsys.readouterr()
    config = ["count", "--model", str(GOLDEN / "config.json"), "--adapter"]
    assert cli.main([*config, str(GOLDEN / "LORA_rank_pattern"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == 2688
    assert cli.main([*config, str(GOLDEN / "LORA" / "adapter_config.json")]) == 0
    assert "trainable 3,072 of" in capsys.readouterr().out


def test_count_of_a_classifier(tmp_path, capsys):
    """PEFT names every head that a classifier may have; how many labels its own has, only the tensors say."""
    raw = json.loads((GOLDEN / "LORA" / "adapter_config.json").read_text())
    raw |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    words = ["count", "--json", "--model", str(GOLDEN / "config.json"), "--adapter", str(tmp_path)]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["trainable"] == 3072 and "their head is not counted" in said.err
    tensors = {"base_model.model.score.weight": np.zeros((3, 64), np.float32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["trainable"] == 3072 + 3 * 64 and not said.err
    (tmp_path / "classifier.json").write_text('{"labels": ["no", "yes"], "pooling": null}')
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == 3072 + 2 * 64


def test_train_evaluate_generate_merge_convert(files, run, tmp_path, capsys):
    base, data = files
    adapter = str(run / "adapter")

    def loss(*args) -> float:
        assert cli.main(["evaluate", "--data", str(data), "--length=64", *args]) == 0
        return json.loads(capsys.readouterr().out)["nll"]

    before, after = loss("--base", str(base)), loss("--base", str(base), "--adapter", adapter)
    assert after < 0.95 * before
    assert cli.main(["merge", "--base", str(base), "--adapter", adapter, "--into", str(tmp_path / "folded")]) == 0
    capsys.readouterr()
    assert loss("--base", str(tmp_path / "folded")) == pytest.approx(after, rel=1e-4)
    thirds = ["--base", str(base), "--adapter", *[adapter] * 3, "--weights", "-1", "1.5", "0.5"]
    assert loss(*thirds) == pytest.approx(after, rel=1e-4)
    assert cli.main(["merge", *thirds, "--into", str(tmp_path / "added")]) == 0
    capsys.readouterr()
    assert loss("--base", str(tmp_path / "added")) == pytest.approx(after, rel=1e-4)
    assert cli.main(["merge", *thirds[:-1], "--into", str(tmp_path / "n")]) == 1
    assert "3 adapters and 2 weights" in capsys.readouterr().err
    assert cli.main(["convert", "--base", str(base), "--adapter", adapter, "--into", str(tmp_path / "again")]) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    capsys.readouterr()
    ask = ["generate", "--prompt=add 1 and 2", "--max-new-tokens=4"]
    assert cli.main([*ask, "--base", str(base), "--adapter", adapter]) == 0
    unfolded = capsys.readouterr().out
    assert cli.main([*ask, "--base", str(tmp_path / "folded")]) == 0
    assert capsys.readouterr().out == unfolded


def test_how_a_base_is_to_answer_stays_with_it(files, run, tmp_path, capsys):
    """Sampling and stop tokens of generation_config.json; an id that it does not say is the config's."""
    said = {"eos_token_id": [1, 7], "bos_token_id": None, "do_sample": True, "temperature": 0.6}
    base = shutil.copytree(files[0], tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(said))
    config = json.loads((base / "config.json").read_text()) | {"pad_token_id": 3}
    (base / "config.json").write_text(json.dumps(config))
    grid = {"data": 1, "fsdp": 1}
    assert setup.eos_ids(setup.outline(path=str(base), mesh=grid)) == (1, 7)
    words = ["--base", str(base), "--into"]
    assert cli.main(["convert", *words, str(tmp_path / "c")]) == 0
    assert cli.main(["merge", *words, str(tmp_path / "m"), "--adapter", str(run / "adapter")]) == 0
    for folder in "cm":
        kept = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert {k: v for k, v in kept.items() if k != "bos_token_id"} == {
            "eos_token_id": [1, 7],
            "do_sample": True,
            "temperature": 0.6,
            "pad_token_id": 3,
        }


def test_a_chains_folder_from_training_to_verify(files, tmp_path, capsys):
    """Written, written again, held against its own logits; what PEFT does not read is one line."""
    base, _ = files
    chain = ["--config.method.name=prefix+adapter", "--config.method.prefix.length=3", "--config.method.adapter.size=3"]
    assert cli.main([*train(*files), *chain, "--config.train.steps=2", f"--workdir={tmp_path / 'w'}"]) == 0
    adapter, again = str(tmp_path / "w" / "adapter"), tmp_path / "again"
    capsys.readouterr()
    assert cli.main(["convert", "--base", str(base), "--adapter", adapter, "--into", str(again)]) == 0
    note = "note: Hugging Face PEFT has no type for several methods in one: prefix+adapter is a folder with one of each"
    assert note in capsys.readouterr().err
    for file in ("prefix/adapter_config.json", "prefix/adapter_model.safetensors", "adapter/peftax_adapter.json"):
        assert (again / file).read_bytes() == (tmp_path / "w" / "adapter" / file).read_bytes()
    ids = np.array([[3, 1, 4, 1, 5]], np.int32)
    np.save(tmp_path / "ids.npy", ids)
    run = setup.attach(setup.open_base(path=str(base), mesh={"data": 1, "fsdp": 1}), again)
    np.save(tmp_path / "logits.npy", run.apply({"params": run.params}, ids))
    args = ["--base", str(base), "--adapter", str(again), "--inputs", str(tmp_path / "ids.npy")]
    assert cli.main(["verify", *args, "--expect", str(tmp_path / "logits.npy")]) == 0
    assert note in capsys.readouterr().err
    assert cli.main(["merge", "--base", str(base), "--adapter", str(again), "--into", str(tmp_path / "m")]) == 1
    assert "prefix+adapter is no change of weights" in capsys.readouterr().err


def test_a_merged_checkpoint_is_as_wide_as_its_base(files, run, tmp_path, capsys):
    """In bf16: the f32 fold of the same numbers, rounded once."""
    wide, narrow, adapter = tmp_path / "wide", tmp_path / "narrow", str(run / "adapter")
    half = {k: x.astype(ml_dtypes.bfloat16) for k, x in load_file(files[0] / "model.safetensors").items()}
    for folder, kind in ((wide, np.float32), (narrow, ml_dtypes.bfloat16)):
        shutil.copytree(files[0], folder)
        save_file({k: np.ascontiguousarray(x.astype(kind)) for k, x in half.items()}, folder / "model.safetensors")
        into = f"--into={folder}_merged"
        assert cli.main(["merge", "--base", str(folder), "--adapter", adapter, into]) == 0
    exact, rounded = (load_file(Path(f"{folder}_merged") / "model.safetensors") for folder in (wide, narrow))
    assert exact.keys() == rounded.keys()
    for key, x in exact.items():
        assert rounded[key].dtype == ml_dtypes.bfloat16, key
        np.testing.assert_array_equal(rounded[key], x.astype(ml_dtypes.bfloat16), err_msg=key)


@pytest.mark.parametrize(
    "second, message",
    [
        ("PROMPT_TUNING", "PROMPT_TUNING: prompt is no change of weights and cannot be merged"),
        ("LORA_modsave_emb", "LORA_modsave_emb: lora '1' trains '.*' of the base itself .* cannot stand beside others"),
        ("LN_TUNING", "LN_TUNING: .* trains .* of the base itself"),
    ],
)
def test_what_cannot_be_merged_with_others(second, message, tmp_path, capsys):
    pair = ["--adapter", str(GOLDEN / "LORA"), str(GOLDEN / second)]
    assert cli.main(["merge", "--base", str(GOLDEN / "base_model.safetensors"), *pair, f"--into={tmp_path / 'n'}"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_verify_asks_each_rows_task(capsys):
    case = GOLDEN / "MULTITASK_PROMPT_TUNING"
    args = ["--base", str(GOLDEN / "base_model.safetensors"), "--adapter", str(case)]
    args += ["--inputs", str(GOLDEN / "input_ids.npy"), "--expect", str(case / "logits.npy")]
    assert cli.main(["verify", *args, "--task-ids", "1"]) == 0
    assert cli.main(["verify", *args, "--task-ids", "0"]) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--config.method.rnk=8"], "nearest: 'method.rank'"),
        (["--config.method.targets=.*q_prj"], "nearest to '.*q_prj': 'q_proj'"),
        (["--config.method.name=bitfit"], "nothing is chosen; the leaves are named"),
        (["--config.model.path=nowhere/at/all"], "nowhere/at/all"),
        (["--config.data.train=absent.jsonl"], "no data file at absent.jsonl"),
        (["--config.train.batch_size=4000"], "do not fill one batch"),
        (["--config.mesh.data=3"], "is not the number of devices"),
        (["--config.optimizer.schedule=cosin"], "none of cosine, linear, constant"),
        (["--config.model.remat=some"], "none of none, dots, full"),
    ],
)
def test_wrong_input_is_one_clear_line(files, tmp_path, capsys, args, says):
    assert cli.main([*train(*files), *args, f"--workdir={tmp_path / 'w'}"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peftax train: ") and says in error


def test_unknown_argument(capsys):
    assert cli.main(["verify", "--case=x"]) == 2
    assert "unknown argument '--case=x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"), [(None, "config.json: no such file"), ("# no", "config.json: no valid JSON")]
)
def test_count_names_a_wrong_model_file(tmp_path, capsys, text, says):
    file = tmp_path / "config.json"
    if text:
        file.write_text(text)
    assert cli.main(["count", "--model", str(file), "--adapter", str(GOLDEN / "LORA")]) == 1
    assert says in capsys.readouterr().err


def test_workdir_of_another_config(files, run, capsys):
    assert cli.main([*train(*files), f"--workdir={run}"]) == 1
    assert "train.steps is 4 there and 100 here" in capsys.readouterr().err


def test_logits_file_that_is_not_one(tmp_path, capsys):
    (tmp_path / "x.npy").write_bytes(b"not an array")
    args = ["--base", str(GOLDEN / "base_model.safetensors"), "--adapter", str(GOLDEN / "LORA")]
    args += ["--inputs", str(GOLDEN / "input_ids.npy"), "--expect", str(tmp_path / "x.npy")]
    assert cli.main(["verify", *args]) == 1
    assert "x.npy: is no whole .npy file" in capsys.readouterr().err
    assert np.load(GOLDEN / "input_ids.npy").shape == (1, 24)


def test_convert_to_lora_and_combine(tmp_path, capsys):
    base = ["--base", str(GOLDEN / "base_model.safetensors")]
    into = tmp_path / "as_lora"
    words = ["convert", *base, "--adapter", str(GOLDEN / "LOHA"), "--into", str(into)]
    assert cli.main([*words, "--to-lora=3"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(into) and json.loads((into / "adapter_config.json").read_text())["r"] == 3
    *each, overall = said.err.strip().splitlines()
    assert "relative Frobenius error of rank 3" in overall and len(each) >= 4
    small = ["convert", *base, "--adapter", str(GOLDEN / "LORA_all_linear"), "--into", str(tmp_path / "small")]
    assert cli.main([*small, "--to-lora=0.9"]) == 0
    capsys.readouterr()
    several = ["combine", *base, "--adapters", str(GOLDEN / "LORA"), str(into), "--into", str(tmp_path / "sum")]
    assert cli.main([*several, "--weights", "0.5", "-1", "--kind=cat"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "sum")
    assert cli.main([*several, "--kind=ties"]) == 1
    assert "ties wants a density" in capsys.readouterr().err
    assert cli.main(["convert", *base, "--to-lora=3", "--into", str(tmp_path / "x")]) == 1
    assert "--to-lora wants an --adapter" in capsys.readouterr().err


RULES = "(('self_attn', {'fmt': 'nf4', 'group': 32}),)"


def test_four_bits_from_training_to_a_merged_checkpoint(files, tmp_path, capsys):
    base, data = files
    workdir = tmp_path / "run"
    words = [*train(base, data), "--config.train.steps=3", f"--workdir={workdir}", f"--config.model.quantize={RULES}"]
    assert cli.main(words) == 0
    assert "nf4: 4 kernels" in capsys.readouterr().err
    adapter = ["--base", str(base), "--adapter", str(workdir / "adapter")]
    packed = [*adapter, "--quantize", RULES, "--data", str(data)]
    assert cli.main(["evaluate", *packed, "--length=64"]) == 0
    with_bits = json.loads(capsys.readouterr().out)["nll"]
    assert cli.main(["evaluate", *adapter, "--data", str(data), "--length=64"]) == 0
    assert json.loads(capsys.readouterr().out)["nll"] != with_bits

    losses = {}
    for name, more in {"dense": [], "again": ["--pack"]}.items():
        assert cli.main(["merge", *packed, *more, "--into", str(tmp_path / name)]) == 0
        said = capsys.readouterr()
        assert f"adapted {with_bits:.4f}" in said.err
        assert cli.main(["evaluate", "--base", said.out.strip(), "--data", str(data), "--length=64"]) == 0
        losses[name] = json.loads(capsys.readouterr().out)["nll"]
        assert f"folded {losses[name]:.4f}" in said.err
    assert abs(losses["dense"] - with_bits) < 1e-4 < abs(losses["again"] - with_bits)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("nf4", "'nf4' is no literal; want (('_proj'"),
        ("(('mlp', {'fmt': 'nf4', 'group': 64}),)", "down_proj"),
        ("(('no_such', {'fmt': 'nf4'}),)", "rule 'no_such' matches no linear kernel; nearest"),
        ("('self_attn',)", "rule"),
    ],
)
def test_wrong_rules(files, rules, words, capsys):
    try:
        status = cli.main(["evaluate", "--base", str(files[0]), "--data", str(files[1]), "--quantize", rules])
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr().err
    assert status and words in said and "Traceback" not in said
