"""Model folders that are refused, in one line that names the thing.

Flags are in test_runs.py, run folders in test_runs_folder.py.    pytest tests/test_faults.py
"""
# ruff: noqa: F811 (a fixture that is imported)

import json
import re
import shutil

import pytest
import torch
from test_model import INDEX, edit_json, edit_weights, folder, head  # noqa: F401

import codescaler as cs
import hub
from common import UserError


def refused(found, path):
    """Loading and checking a model fail with this, in one line."""
    for use in (cs.load_model, cs.check_model):
        with pytest.raises(UserError, match=found) as error:
            use(path, "lm")
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
def test_what_is_not_computed_or_read_is_refused_by_name(change, found, folder):
    if isinstance(change, dict):
        edit_json(folder / "config.json", **change)
    else:
        edit_weights(folder, change)
    refused(found, folder)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(spoilt, folder):
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
def test_damaged_or_missing_files_are_named(file, text, found, folder):
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
def test_the_tokenizer_of_another_model_is_refused(change, found, folder):
    file = folder / "tokenizer.json"
    file.write_text(change(file.read_text()))
    refused(found, folder)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_chat_template_is_said(where, folder, monkeypatch, capsys):
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


def test_of_a_file_and_an_index_the_file_is_read(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "old.safetensors"}}')
    assert cs.load_model(folder, device="cpu")
