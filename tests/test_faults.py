"""What is refused, and how: checkpoints, tokenizers, other contents of an input, full disks.

Every one is a line that names the thing. Flags are in test_runs.py, the files of a run in
test_runs_folder.py.    pytest tests/test_faults.py
"""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_model import INDEX, LM, TINY, edit_json, edit_weights, folder, head  # noqa: F401
from test_runs import pairs, rows, script, start  # noqa: F401

import codescaler as cs
import hub
from common import UserError
from tiny.world import rows as make_rows

ROOT = Path(__file__).parents[1]


def refused(found, path, kind="lm"):
    """Loading and checking a model fail with this, in one line."""
    for use in (cs.load_model, cs.check_model):
        with pytest.raises(UserError, match=found) as error:
            use(path, kind)
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# config.json and weights

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
NAMED = [
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"rope_parameters": YARN}, "RoPE scaling"),
    ({"rope_parameters": {"full_attention": YARN}}, "RoPE scaling"),
    ({"rope_scaling": YARN}, "RoPE scaling"),  # beside rope_parameters of the default kind
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling"),
    ({"rope_scaling": "yarn"}, "rope_scaling 'yarn'"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size '64'"),
    ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'"),
    ({"num_key_value_heads": 3}, "4 query heads over 3"),
    ({"hidden_size": 128}, "has shape"),
    ({"num_hidden_layers": 4}, "missing tensors .*layers.3"),
    ({"num_hidden_layers": 2}, "unexpected .*layers.2"),
]


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
CHANGES = [
    (head(1e-3), "lm_head.weight differs from the embedding"),
    (lambda w: {GATE: w[GATE].to(torch.int8)}, f"{GATE} is I8: quantized"),
    (lambda w: {GATE: w[GATE].to(torch.float8_e4m3fn)}, f"{GATE} is F8_E4M3: quantized"),
    (lambda w: {GATE + "_scale_inv": torch.ones(1)}, f"unexpected .*{GATE}_scale_inv"),
    (lambda w: {"score.weight": torch.ones(1, 64)}, "score.weight.*reward model"),
    (lambda w: {NORM: w[NORM][:-1].clone()}, f"{NORM} has shape"),
]


@pytest.mark.parametrize("change, found", NAMED + CHANGES)
def test_what_is_not_computed_or_read_is_refused_by_name(change, found, folder):  # noqa: F811
    if isinstance(change, dict):
        edit_json(folder / "config.json", **change)
    else:
        edit_weights(folder, change)
    refused(found, folder)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(spoilt, folder):  # noqa: F811
    edit_weights(folder, lambda w: {NORM: torch.full_like(w[NORM], spoilt)})
    with pytest.raises(UserError, match=f"{NORM} holds values that are not finite"):
        cs.load_model(folder, device="cpu")


DAMAGED = [
    ("config.json", "{", "config.json cannot be read"),
    ("config.json", "[]", "config.json: expected an object, found list"),
    ("config.json", None, "no config.json"),
    ("generation_config.json", "{", "generation_config.json cannot be read"),
    ("tokenizer.json", "{}", "tokenizer.json is damaged"),
    ("tokenizer.json", "\udcff", "tokenizer.json cannot be read"),
    ("model.safetensors", "x" * 100, "model.safetensors is damaged"),
    ("model.safetensors", None, "model.safetensors is damaged or missing"),
    (INDEX, "{}", "no weight_map"),
    (INDEX, '{"weight_map": {"x": 3}}', "weight_map"),
    (INDEX, '{"weight_map": {"x": "shard.safetensors"}}', "shard.safetensors has no tensor x"),
    (INDEX, '{"weight_map": {"x": "away.safetensors"}}', "away.safetensors is damaged or missing"),
]


@pytest.mark.parametrize("file, text, found", DAMAGED)
def test_damaged_or_missing_files_are_named(file, text, found, folder):  # noqa: F811
    (folder / file).unlink(missing_ok=True)
    if file == INDEX:  # which is not read where the weights are in one file
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
    if text is not None:
        (folder / file).write_text(text, encoding="utf-8", errors="surrogateescape")
    refused(found, folder)


@pytest.mark.parametrize("path", ["nowhere", "tiny/nowhere", "/nowhere", "README.md", "a/b/c"])
def test_a_folder_that_is_none_is_named(path):
    refused(f"no model folder at '{path}'", path)


# --------------------------------------------------------------------------------------------------
# tokenizers


def with_a_hole(text):
    spec = json.loads(text)
    (last,) = (token for token, i in spec["model"]["vocab"].items() if i == 400)
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "".join(m) != last]
    del spec["model"]["vocab"][last]
    return json.dumps(spec)


TOKENIZERS = [
    (lambda text: text.replace("<|im_start|>", "<|turn|>"), r"no token <\|im_start\|>: not"),
    (lambda text: text.replace("<|im_end|>", "<|turn|>"), r"no token <\|im_end\|>: not"),
    (with_a_hole, "511 tokens, but ids up to 511"),
    (lambda text: re.sub(r'"vocab":\s*{', '"vocab": {"one more": 512,', text),
     "has 513 tokens, config.json vocab_size 512"),
]  # fmt: skip


@pytest.mark.parametrize("change, found", TOKENIZERS)
def test_the_tokenizer_of_another_model_is_refused(change, found, folder):  # noqa: F811
    file = folder / "tokenizer.json"
    file.write_text(change(file.read_text()))
    refused(found, folder)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_chat_template_is_said(where, folder, monkeypatch, capsys):  # noqa: F811
    is_file = where.endswith("jinja")
    (folder / where).write_text("{{ x }}" if is_file else json.dumps({"chat_template": "{{ x }}"}))
    for _ in range(2):  # once, however often it is loaded
        cs.load_model(folder, device="cpu")
    said = capsys.readouterr().err
    assert "its chat template" in said and said.count("\n") == 1
    monkeypatch.setattr(hub, "KNOWN_TEMPLATES", {re.search(r"\((\w+)\)", said)[1]})
    shutil.copytree(folder, folder.parent / "known")
    cs.load_model(folder.parent / "known", device="cpu")
    assert not capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# runs


def test_of_a_file_and_an_index_the_file_is_read(folder):  # noqa: F811
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "old.safetensors"}}')
    assert cs.load_model(folder, device="cpu")


@pytest.mark.parametrize("flag", ["pairs", "init"])
def test_other_contents_of_an_input_are_refused(flag, tmp_path, script, pairs):  # noqa: F811
    shutil.copytree(ROOT / "tiny" / "reward", tmp_path / "init")
    command = ["train_rm.py", "--pairs", pairs, "--init", tmp_path / "init", "--out"]
    command += [tmp_path / "run", "--batch", "4", "--steps"]
    assert script(*command, "1")[0] == 0
    if flag == "pairs":  # a row more, which changes split and order
        pairs.write_text(pairs.read_text() + pairs.read_text().splitlines()[0] + "\n")
    else:
        edit_weights(tmp_path / "init", lambda w: {NORM: 2 * w[NORM]})
    code, _, errors = script(*command, "2")
    assert code == 2 and len(errors.splitlines()) == 1
    assert f"started with content of --{flag}" in errors
    assert len(rows(tmp_path / "run")) == 1


def test_other_contents_of_problems_are_refused(tmp_path, script):  # noqa: F811
    test = {"kind": "call", "cases": [{"args": [1], "expected": 2}], "entry_point": "solve"}
    row, file = {"id": "a", "prompt": "Add one.", "tests": test}, tmp_path / "own.jsonl"
    command = ["grpo.py", "--rm", ROOT / "tiny" / "reward", "--problems", file]
    command += ["--eval-problems", file, "--out", tmp_path / "run"]
    command += ["--max-new-tokens", "8", "--prompts", "1", "--group", "2", "--steps"]
    file.write_text(json.dumps(row) + "\n")
    assert script(*command, "1")[0] == 0
    file.write_text(json.dumps(row | {"prompt": "Add two."}) + "\n")
    code, _, errors = script(*command, "2")
    assert code == 2 and "content of --problems" in errors
    code, _, errors = script(*command, "1", "--lr", "1")
    assert code == 2 and "--lr 0.0003, now it is 1.0" in errors


def test_other_candidates_are_refused(tmp_path, script):  # noqa: F811
    rows, given = make_rows("train", 3), tmp_path / "given.jsonl"
    command = ["train_rm.py", "--collect-only", "--limit", "3", "--candidates", given]
    command += ["--out", tmp_path / "o:1"]  # a colon in a path is no format
    for name in ("first", "second"):
        lines = [{"problem": row["id"], "code": row["solution"], "x": name} for row, _ in rows]
        given.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, _, errors = script(*command)
        assert code == (0 if name == "first" else 2), errors
        assert script(*command)[0] == code
    assert "content of --candidates" in errors


def test_a_full_disk_loses_nothing(tmp_path, script, pairs):  # noqa: F811
    command = ["train_rm.py", "--pairs", pairs, "--out", tmp_path / "run", "--batch", "4"]
    assert script(*command, "--steps", "2")[0] == 0
    before = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    shut = (2**20, 2**20)  # no file over 1 MiB
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, shut)  # noqa: E731
    process = start(*command, "--steps", "3", preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and len(errors.splitlines()) == 1
    assert errors.startswith("error: cannot write") and str(tmp_path) in errors
    checkpoint = tmp_path / "run" / "checkpoint"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 2
    after = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
