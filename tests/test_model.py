"""codescaler.py against Hugging Face's numbers, and what must not change them.    pytest tests/test_model.py"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import codescaler as cs
from problems import UserError

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def lm():
    return cs.load_model(GOLDEN / "lm_tied", device="cpu")


@pytest.fixture(scope="module")
def rm():
    return cs.load_model(GOLDEN / "rm", head="score", device="cpu")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "lm_tied" / "golden.safetensors")


@pytest.fixture(scope="module")
def policy():
    return cs.load_model(ROOT / "tiny" / "policy", device="cpu"), cs.Tokenizer(ROOT / "tiny" / "policy")


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# parity


def test_logits_and_hidden_states(lm, golden):
    ids, mask = golden["right.input_ids"], golden["right.attention_mask"].bool()
    hidden = lm(ids, mask.sum(1))
    assert close(hidden[mask], golden["right.hidden_states"][-1][mask])
    assert close(lm.logits(hidden)[mask], golden["right.logits"][mask])


@pytest.mark.parametrize("temperature, name", [(1.0, "right.token_logprobs"), (0.7, "right.token_logprobs_T0.7")])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_token_logprobs(lm, golden, temperature, name, chunk):
    ids, lengths = golden["right.input_ids"], golden["right.attention_mask"].sum(1)
    logp, _ = cs.token_logprobs(lm, ids, torch.ones_like(lengths), lengths, temperature, chunk)
    assert close(logp, golden[name])


def test_entropy(lm, golden):
    ids, lengths = golden["right.input_ids"], golden["right.attention_mask"].sum(1)
    _, entropy = cs.token_logprobs(lm, ids, torch.ones_like(lengths), lengths)
    mask = torch.arange(1, ids.shape[1])[None] < lengths[:, None]
    assert close(entropy[mask], golden["right.entropy"][mask])


@pytest.mark.parametrize("max_rows", [256, 2])
def test_greedy_generation(lm, golden, max_rows):
    prompts = [row[m.bool()].tolist() for row, m in zip(golden["greedy.prompt_ids"], golden["greedy.prompt_mask"])]
    stop = golden["greedy.eos_ids"].tolist()
    for stops, name in ((stop, "greedy.new_tokens"), ([], "greedy.free_new_tokens")):
        found = cs.generate(lm, prompts, 1, 40, temperature=0.0, stop_ids=stops, max_rows=max_rows)
        for (c,), expected in zip(found, golden[name].tolist()):
            assert c.ids == expected[: len(c.ids)]
            assert c.finished == (c.ids[-1] in stops) and (c.finished or len(c.ids) == 40)


def test_scores_and_pairwise_gradients(rm):
    g = load_file(GOLDEN / "rm" / "golden.safetensors")
    ids, lengths = g["right.input_ids"], g["right.attention_mask"].sum(1)
    scores = rm.score(rm(ids, lengths), lengths)
    assert close(scores, g["right.logits"][:, 0])
    from train_rm import pairwise_loss

    grads = load_file(GOLDEN / "rm" / "bt_grads.safetensors")
    rm.zero_grad()
    loss = pairwise_loss(scores[[0, 1]], scores[[3, 4]])
    loss.backward()
    assert close(loss, grads["loss"])
    names = [name for name in grads if name.startswith("grad.")]
    assert len(names) > 10
    for name in names:
        assert close(rm.get_parameter(name[5:]).grad, grads[name]), name


def test_sampling_distributions():
    data = load_file(GOLDEN / "sampling.safetensors")
    for i, case in enumerate(json.loads((GOLDEN / "sampling.json").read_text())):
        logp = cs.sampling_logprobs(data["logits"], case["temperature"], case["top_p"], case["top_k"])
        assert torch.allclose(logp.exp(), data[f"probs.{i}"], atol=1e-6), case


def test_chat_format(policy):
    for row in json.loads((GOLDEN / "chat.json").read_text())["rows"]:
        text = policy[1].chat(row["messages"], row["add_generation_prompt"], row["enable_thinking"])
        assert text == row["text"], row["name"]


# ----------------------------------------------------------------------------------------------------------------------
# what must not change a number


def test_a_row_alone_equals_the_row_in_a_padded_batch(rm):
    torch.manual_seed(0)
    rows = [torch.randint(2, 512, (n,)).tolist() for n in (3, 17, 40)]
    ids, lengths = cs.pad_rows(rows)
    together = rm.score(rm(ids, lengths), lengths)
    wide = torch.nn.functional.pad(ids, (0, 64), value=7)
    assert close(rm.score(rm(wide, lengths), lengths), together)
    for row, score in zip(rows, together):
        ids, lengths = cs.pad_rows([row])
        assert close(rm.score(rm(ids, lengths), lengths)[0], score)


def test_cached_steps_equal_one_forward_pass(lm):
    torch.manual_seed(0)
    rows = [torch.randint(2, 512, (n,)).tolist() for n in (5, 9, 12)]
    cache = cs.KVCache(lm.config, 3, 20)
    ids, lengths = cs.pad_rows([row[:3] for row in rows])
    lm(ids, lengths, cache)
    rest = [row[3:] for row in rows]
    ids, lengths = cs.pad_rows(rest)
    hidden = lm(ids, lengths, cache)
    for row, h, n in zip(rows, hidden, lengths.tolist()):
        assert close(h[:n], lm(torch.tensor([row]))[0, 3:])
    assert cache.lengths_B.tolist() == [5, 9, 12]


def test_samples_do_not_depend_on_the_batch(policy):
    model, _ = policy
    prompts = [[5, 6, 7], [9] * 12, [3, 4] * 4]
    args = dict(n=4, max_new_tokens=12, stop_ids=[10, 20], seed=3)
    whole = cs.generate(model, prompts, **args)
    assert whole == cs.generate(model, prompts, **args)
    narrow = cs.generate(model, prompts, max_rows=3, **args)
    alone = [cs.generate(model, [p], prompt_keys=[i], **args)[0] for i, p in enumerate(prompts)]
    for other in (narrow, alone):
        assert [[c.ids for c in group] for group in other] == [[c.ids for c in group] for group in whole]
    assert [c.ids for c in whole[0]] != [c.ids for c in cs.generate(model, prompts, **{**args, "seed": 4})[0]]


def test_sampler_and_trainer_agree_on_log_probabilities(policy):
    model, _ = policy
    prompts = [[5, 6, 7], [9] * 12]
    for settings in (dict(temperature=1.0), dict(temperature=0.6, top_p=0.8, top_k=20)):
        groups = cs.generate(model, prompts, n=3, max_new_tokens=10, seed=1, **settings)
        flat = [(p, c) for p, group in zip(prompts, groups) for c in group]
        ids, lengths = cs.pad_rows([p + c.ids for p, c in flat])
        prompt_lengths = torch.tensor([len(p) for p, _ in flat])
        support = [c.support for _, c in flat] if "top_p" in settings else None
        logp, _ = cs.token_logprobs(model, ids, prompt_lengths, lengths, settings["temperature"], support=support)
        for row, (p, c) in zip(logp, flat):
            assert close(row[len(p) - 1 : len(p) - 1 + len(c.ids)], torch.tensor(c.logps), 1e-4)


def test_sampling_follows_the_distribution():
    logp = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
    u = torch.cat([cs.uniforms(0, k, 0, 400) for k in range(10)])
    counts = torch.bincount(cs.pick(logp, u), minlength=3) / 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)
    edge = torch.tensor([[0.0, -torch.inf]])  # u next to 1 never picks what is not allowed
    assert cs.pick(edge, torch.tensor([1 - 1e-16], dtype=torch.float64)).item() == 0


def test_unused_ids_are_never_sampled(policy):
    model, _ = policy
    whole = model.num_tokens
    try:
        model.num_tokens = 40
        groups = cs.generate(model, [[5, 6]], n=20, max_new_tokens=20)
    finally:
        model.num_tokens = whole
    assert all(i < 40 for c in groups[0] for i in c.ids)


def test_completion_mask_and_gradient(lm):
    ids, lengths = cs.pad_rows([[1, 2, 3, 4, 5], [6, 7, 8]])
    logp, entropy = cs.token_logprobs(lm, ids, torch.tensor([2, 1]), lengths)
    assert (logp != 0).tolist() == [[False, True, True, True], [True, True, False, False]]
    assert not entropy.requires_grad
    lm.zero_grad()
    logp.sum().backward()
    assert lm.model.embed_tokens.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------------
# the reward model


@pytest.fixture(scope="module")
def reward_model():
    return cs.RewardModel(ROOT / "tiny" / "reward", device="cpu")


def plain_score(reward_model, prompt, code):
    ids, lengths = cs.pad_rows([cs.reward_input_ids(reward_model.tokenizer, prompt, code)[0]])
    return reward_model.model.score(reward_model.model(ids, lengths), lengths).item()


def test_shared_prompt_scores_equal_plain_scores(reward_model):
    programs = [
        "def solve(xs):\n    return sum(xs)",
        "def solve(xs):\n    return len(xs)",
        "x = 1",
        "",
        "    return 3\n\n",
    ]
    items = [(prompt, code) for prompt in ("Return the sum.", "Count the items.\n") for code in programs]
    for (prompt, code), score in zip(items, reward_model.score_many(items)):
        assert score == pytest.approx(plain_score(reward_model, prompt, code), abs=1e-5)
    assert reward_model.score("Return the sum.", programs) == pytest.approx(
        reward_model.score_many(items)[:5], abs=1e-6
    )


def test_reward_input_ends_in_the_scored_newline(reward_model):
    tokenizer = reward_model.tokenizer
    ids, cut = cs.reward_input_ids(tokenizer, "P", "C")
    assert not cut and ids == tokenizer.encode(
        "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nC<|im_end|>\n"
    )


def test_long_programs_are_cut_and_counted_but_never_the_prompt(reward_model):
    tokenizer, code = reward_model.tokenizer, "x = 1\n" * 100
    ids, cut = cs.reward_input_ids(tokenizer, "Return the sum.", code, max_length=60)
    closing = tokenizer.encode("<|im_end|>\n")
    assert cut and len(ids) == 60 and ids[-len(closing) :] == closing
    with pytest.raises(UserError, match="max-length"):
        cs.reward_input_ids(tokenizer, "long prompt " * 50, code, max_length=60)
    small = cs.RewardModel(ROOT / "tiny" / "reward", device="cpu", max_length=60)
    small.score("Return the sum.", [code, "x = 1"])
    assert small.truncated == 1


def test_shaping_keeps_every_valid_answer_above_every_invalid_one():
    scores = torch.tensor([-30.0, -1.0, 0.0, 3.0, 800.0])
    shaped = cs.shape_reward(scores, torch.ones(5, dtype=torch.bool))
    assert (shaped > 0).all() and shaped.isfinite().all() and (shaped.diff() > 0).all()
    assert float(cs.shape_reward(5.0, False)) == 0.0


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def copy(tmp_path, name="lm_tied"):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_both_config_spellings(tmp_path, lm):
    folder = copy(tmp_path)
    shutil.copyfile(folder / "legacy_config.json", folder / "config.json")
    assert cs.load_model(folder, device="cpu").config == lm.config


def test_sharded_and_untied_checkpoints(tmp_path, lm, golden):
    folder = copy(tmp_path)
    weights = load_file(folder / "model.safetensors")
    edit_config(folder, tie_word_embeddings=False)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    names, shards = sorted(weights), {}
    for i in range(2):
        shards |= {name: f"model-0000{i + 1}-of-00002.safetensors" for name in names[i::2]}
        save_file({name: weights[name] for name in names[i::2]}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    model = cs.load_model(folder, device="cpu")
    ids, mask = golden["right.input_ids"], golden["right.attention_mask"].bool()
    assert close(model.logits(model(ids))[mask], golden["right.logits"][mask])


def test_save_and_load_give_the_same_bits(tmp_path, reward_model):
    cs.save_model(reward_model.model, reward_model.tokenizer, tmp_path / "copy")
    again = cs.RewardModel(tmp_path / "copy", device="cpu")
    items = [("Return the sum.", "def solve(xs):\n    return sum(xs)")]
    assert again.score_many(items) == reward_model.score_many(items)
    assert set(load_file(tmp_path / "copy" / "model.safetensors")) == set(dict(reward_model.model.named_parameters()))
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and len(config["id2label"]) == 1


def test_another_template_is_refused(tmp_path, reward_model):
    cs.save_model(reward_model.model, reward_model.tokenizer, tmp_path / "copy")
    (tmp_path / "copy" / "codescaler.json").write_text(json.dumps({"template": "other", "max_length": 4096}))
    with pytest.raises(UserError, match="chat template other"):
        cs.load_model(tmp_path / "copy", head="score")


def test_a_causal_lm_gets_a_zero_head(lm):
    model = cs.load_model(GOLDEN / "lm_tied", head="score", device="cpu")
    assert "zeros" in model.head_source and not model.score.weight.any()
    with pytest.raises(UserError, match="train_rm.py"):
        cs.RewardModel(ROOT / "tiny" / "policy")


def test_score_bias_is_read(tmp_path, rm):
    folder = copy(tmp_path, "rm")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "score.bias": torch.tensor([0.375])}, folder / "model.safetensors")
    model = cs.load_model(folder, head="score", device="cpu")
    ids, lengths = cs.pad_rows([[5, 6, 7]])
    assert close(model.score(model(ids), lengths), rm.score(rm(ids), lengths) + 0.375)


@pytest.mark.parametrize(
    "changes, found",
    [
        (dict(model_type="llama"), "model_type 'llama'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "RoPE scaling 'yarn'"),
        (dict(use_sliding_window=True), "sliding-window"),
        (dict(hidden_size=None), "hidden_size"),
        (dict(hidden_size=128), "has shape"),
        (dict(num_hidden_layers=4), "missing tensors .*layers.3"),
        (dict(num_hidden_layers=2), "unexpected tensors .*layers.2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, changes, found):
    folder = copy(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=found):
        cs.load_model(folder, device="cpu")


def test_damaged_or_missing_files_are_named(tmp_path):
    folder = copy(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        cs.load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        cs.load_model(folder)
    with pytest.raises(UserError, match="no config.json"):
        cs.load_model(tmp_path)
    with pytest.raises(UserError, match="no model folder at"):
        cs.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="score.weight"):
        cs.load_model(GOLDEN / "rm", head="lm")
