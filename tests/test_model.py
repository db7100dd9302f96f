"""codescaler.py against Hugging Face's numbers, and what must not change them.    pytest tests/test_model.py"""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import codescaler as cs
from common import UserError

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
        logits = cs.allowed_logits(data["logits"], case["temperature"], case["top_p"], case["top_k"])
        logp = logits.log_softmax(-1)
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


@torch.no_grad()
def test_rows_that_share_their_prompt_equal_rows_of_their_own(lm):
    prompts = {0: [5, 6, 7], 1: [8] * 5, 2: [9, 4]}
    cache = cs.GroupCache(lm.config, 5, 3, 5, 4, torch.float32, "cpu")
    prefix, _ = cs.prefill(lm, list(prompts.values()))
    rows = []  # what each row of the cache holds

    def add(*numbers):
        for i in numbers:
            cache.add_row(prefix, i, i, len(prompts[i]))
            rows.append(prompts[i])

    def remove(r):
        cache.remove_row(r)
        rows[r] = rows[-1]
        rows.pop()

    def step(tokens):
        cache.prepare()
        hidden = lm(torch.tensor(tokens)[:, None], cache=cache)[:, 0]
        for r, token in enumerate(tokens):
            rows[r] = [*rows[r], token]
            assert close(hidden[r], lm(torch.tensor([rows[r]]))[0, -1])

    add(0, 1, 0, 1)
    step([3, 4, 5, 6])
    remove(0)
    add(2, 1)
    step([7, 8, 9, 1, 2])
    for r in (4, 1, 0):
        remove(r)
    assert sorted(cache.prompts) == [(0, 3), (2, 2)]  # prompt 1 has no row left
    add(0, 0)
    step([1, 2, 3, 4])
    step([5, 6, 7, 8])
    remove(0)  # it has its 4 tokens; the next ones of the others go to the first place again
    step([3, 4, 5])


@torch.no_grad()
def test_places_of_rows_that_have_gone_are_closed_up(lm):
    cache, tokens = cs.GroupCache(lm.config, 2, 1, 3, 32, torch.float32, "cpu"), [5, 6, 7]
    prefix, _ = cs.prefill(lm, [tokens])
    cache.add_row(prefix, 0, 0, 3)
    for token in range(18):
        cache.prepare()
        lm(torch.tensor([[token]]), cache=cache)
    cache.add_row(prefix, 0, 0, 3)
    for token in range(30):
        if token == 5:
            cache.remove_row(0)
        ids = [[token]] if token >= 5 else [[9], [token]]
        cache.prepare()
        hidden, tokens = lm(torch.tensor(ids), cache=cache)[-1, 0], [*tokens, token]
        assert close(hidden, lm(torch.tensor([tokens]))[0, -1])
        assert cache.width == (19 + token if token < 5 else token + 1)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations of a pass, on the tensors they had, without our code."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args, kwargs or {}, function(*args, **kwargs or {})))
        return self.calls[-1][-1]

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for mine, new in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (result, again))):
                mine.copy_(new)


def graphs_draw_the_same_tokens(model, n, max_rows, new):
    """Rows leave at different steps and others come, prompts are of different lengths, and places are used again."""
    prompts = [[5, 6, 7], [9] * 12, [3, 4] * 4, [8] * 300]
    args = dict(n=n, max_rows=max_rows, max_new_tokens=new, stop_ids=range(100, 110), seed=4)
    plain, captured = (cs.generate(model, prompts, **args, cuda_graphs=graphs) for graphs in (False, True))
    for group, wanted in zip(captured, plain, strict=True):
        assert [c.ids for c in group] == [c.ids for c in wanted]
        assert all(close(torch.tensor(a.logps), torch.tensor(b.logps)) for a, b in zip(group, wanted))
    assert len({len(c.ids) for group in plain for c in group}) > 3


BATCHES = pytest.mark.parametrize("n, max_rows, new", [(4, 256, 30), (3, 5, 30), (4, 7, 300)])


@BATCHES
@pytest.mark.parametrize("fused", [True, False])
def test_captured_passes_draw_the_same_tokens(lm, monkeypatch, n, max_rows, new, fused):
    tapes = []

    def capture(work, device, other):
        batch, tape = work.__self__, Tape()
        state = [x for x in {**vars(batch), **vars(batch.cache)}.values() if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in state]
        with tape:
            work()
        for x, old in zip(state, before):  # a GPU runs nothing while it captures
            x.copy_(old)
        tapes.append(tape)
        return tape

    monkeypatch.setattr(cs, "capture", capture)
    if not fused:  # as on a GPU
        monkeypatch.setattr(cs, "fused_weights", contextlib.nullcontext)
    graphs_draw_the_same_tokens(lm, n, max_rows, new)
    assert sum(tape.replays for tape in tapes) > 2 * len(tapes) > 0


def meta_pass(config, dtype=torch.float32, few_shapes=False):
    """A decoding pass on the meta device, which has no values: whatever the host would wait for raises there."""
    with torch.device("meta"), torch.inference_mode():
        model = cs.Qwen3(config).to(dtype)
        batch = cs.DecodingBatch(model, [[1] * 3, [2] * 9], 2, 30, (1.0, 1.0, 0), (), 0, [0, 1], 4, None, few_shapes)
        batch.cache.prompts, batch.cache.slot_of, batch.cache.began = [(0, 3), (1, 9)], [0, 1, 0], [0, 0, 0]
        batch.cache.prepare()
        with Tape() as tape:
            batch.decode()
        with pytest.raises(RuntimeError):
            batch.hidden_RD.tolist()
    return tape


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_pass_asks_the_device_for_nothing(lm, dtype, few_shapes):
    assert meta_pass(lm.config, dtype, few_shapes).calls


def test_kernels_of_a_layer(lm):
    """README's estimate of decoding counts with 54: in bf16 on CUDA there are three casts and two additions of masks,
    too."""

    def kernels(layers):
        calls = meta_pass(dataclasses.replace(lm.config, num_hidden_layers=layers)).calls
        returned = [function._schema.returns for function, *_ in calls]
        return sum(not any(r.alias_info and not r.alias_info.is_write for r in some) for some in returned)  # no views

    assert kernels(4) - kernels(3) == 54 - 5


@BATCHES
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_equal_the_passes_they_captured(monkeypatch, dtype, n, max_rows, new):
    """In bf16, too, where passes of other shapes round differently."""
    model = cs.load_model(GOLDEN / "lm_tied", dtype=dtype, device="cuda")
    prompts = [[5, 6, 7], [9] * 12, [3, 4] * 4, [8] * 300]
    args = dict(n=n, max_rows=max_rows, max_new_tokens=new, stop_ids=range(100, 110), seed=4, cuda_graphs=True)
    replayed = cs.generate(model, prompts, **args)
    monkeypatch.setattr(cs, "capture", lambda work, *_: SimpleNamespace(replay=work))
    assert [[c.ids for c in g] for g in replayed] == [[c.ids for c in g] for g in cs.generate(model, prompts, **args)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_decoding_in_bf16_keeps_logits_in_fp32(device):
    q, k, mask = (torch.randn(size, device=device) for size in ((2, 3, 64), (2, 5, 64), (2, 1, 5)))
    q16, k16 = q.bfloat16(), k.bfloat16()
    for queries, keys in ((q, k), (q16, k16)):
        wanted = queries.float() @ keys.float().transpose(1, 2) / 8 + mask
        assert close(cs.masked_logits(mask, queries, keys), wanted)


@pytest.mark.slow
def test_blocks_compile_to_as_many_graphs_at_any_depth(lm, monkeypatch):
    graphs, compile_module = [], torch.nn.Module.compile

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(cs.Block, "compile", lambda block, **how: compile_module(block, backend=count, **how))
    found = []
    for layers in (2, 12):
        torch.compiler.reset()
        graphs.clear()
        model = cs.Qwen3(dataclasses.replace(lm.config, num_hidden_layers=layers))
        cs.init_weights(model)
        cs.compile_blocks(model)
        for answers in ([[7, 8, 9, 10], [3, 2]], [[4] * 5, [4, 4], [6] * 9], [[4] * 7] * 5):
            cs.group_logprobs(model, [5, 6, 7] * len(answers), answers)[0].sum().backward()
        found.append(len(graphs))
    assert found[0] == found[1] <= 6, found


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients():
    grads = []
    for compiled in (False, True):
        model = cs.load_model(GOLDEN / "lm_tied", device="cpu")
        if compiled:
            cs.compile_blocks(model)
        for answers in ([[7, 8, 9, 10], [3, 2]], [[4] * 5, [4, 4], [6] * 9]):
            cs.group_logprobs(model, [5, 6, 7], answers)[0].sum().backward()
        assert cs.gathered(model).compiled is False and (cs.gathered(model) is model) is not compiled
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-5 * grads[0].abs().max().item())


@pytest.mark.parametrize("size", ["golden", "packed", "packed, untied"])
def test_fused_weights_change_nothing(size, lm):
    if size != "golden":  # weights large enough to be packed for oneDNN
        small = dataclasses.replace(
            cs.SHAPES["small-shape"], num_hidden_layers=1, vocab_size=1024, tie_word_embeddings=size == "packed"
        )
        lm = cs.Qwen3(small).requires_grad_(False)
        cs.init_weights(lm)
    packed = size != "golden" and torch.backends.mkldnn.is_available()
    ids, lengths = cs.pad_rows([[5, 6, 7, 8], [9, 4]])
    plain, block = lm(ids, lengths), lm.model.layers[0]
    logits = lm.logits(plain)
    with cs.fused_weights(lm):
        assert lm.packed_head.is_mkldnn == block.self_attn.o_proj.packed.is_mkldnn == packed
        assert close(lm(ids, lengths), plain) and close(lm.logits(plain), logits)
    assert lm.packed_head is block.self_attn.qkv is block.mlp.gate_up is block.mlp.down_proj.packed is None


def test_padding_never_overwrites_a_full_row(lm):
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5]]  # the first row fills the 8 slots, the second is padded past them
    cache = cs.KVCache(lm.config, 2, 8)
    lm(*cs.pad_rows([rows[0][:7], rows[1][:1]]), cache)
    hidden = lm(*cs.pad_rows([rows[0][7:], rows[1][1:]]), cache)
    for row, h, start in zip(rows, hidden, (7, 1)):
        assert close(h[: len(row) - start], lm(torch.tensor([row]))[0, start:])


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


def test_prompts_are_computed_in_bounded_passes(policy):
    model, sizes = policy[0], []
    prompts = [[5] * n for n in (30, 10, 20, 40, 10, 25)]
    whole = cs.generate(model, prompts, n=2, max_new_tokens=4)
    handle = model.register_forward_pre_hook(lambda m, args: sizes.append(args[0].numel()))
    narrow = cs.generate(model, prompts, n=2, max_new_tokens=4, prefill_tokens=45)
    handle.remove()
    assert max(sizes) <= 45 and [[c.ids for c in g] for g in narrow] == [[c.ids for c in g] for g in whole]


def test_rows_are_as_many_as_the_memory_allows(monkeypatch):
    config, gib = cs.SHAPES["qwen3-8b-shape"], 2**30
    weight = SimpleNamespace(is_cuda=True, device="cuda", element_size=lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (39 * gib, 80 * gib))
    # 144 KiB a token: 2048 tokens take 0.28 GiB and the logits 3.5 MiB, so that 28 of 40 free GiB hold 98 rows.
    assert cs.rows_that_fit(config, 256, 1024, 1024, weight, 256) == 98  # each row with a prompt of its own
    assert cs.rows_that_fit(config, 256, 1024, 1024, weight, 64) == 64
    assert cs.rows_that_fit(config, 256, 10**7, 1024, weight, 64) == 1
    # 16 prompts take 16 * 1024 * 144 KiB = 2.25 GiB, and 25.75 GiB hold 178 rows of 1024 tokens and 3.5 MiB.
    assert cs.rows_that_fit(config, 16, 1024, 1024, weight, 256) == 178
    assert cs.rows_that_fit(config, 256, 1024, 1024, torch.zeros(1), 256) == 256


def test_sampling_follows_the_distribution():
    logp = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
    u = torch.cat([cs.uniforms(0, k, 0, 400) for k in range(10)])
    counts = torch.bincount(cs.draw(logp, u)[0], minlength=3) / 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)
    # The numbers themselves are part of what a seed means.
    assert cs.uniforms(7, 2**40, 3, 2).tolist() == [0.8036695118874713, 0.5037493983624124]
    last = torch.tensor([1 - 1e-16], dtype=torch.float64)  # u next to 1 never picks what is not allowed
    for seed in range(50):  # sums in fp32 and fp64 differ: in many of these the target lies behind the last token
        some = 2 * torch.randn(1, 100, generator=torch.Generator().manual_seed(seed))
        assert cs.draw(some, last)[0].item() == 99


def test_unused_ids_are_never_sampled(policy):
    model, _ = policy
    whole = model.num_tokens
    try:
        model.num_tokens = 40
        groups = cs.generate(model, [[5, 6]], n=20, max_new_tokens=20)
        logp, _, mask = cs.group_logprobs(model, [5, 6], [c.ids for c in groups[0]])  # the trainer leaves them out, too
        assert close(logp[mask], torch.tensor([x for c in groups[0] for x in c.logps]), 1e-4)
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prompt_computed_once_gives_the_logprobs_and_gradients_of_whole_rows(policy, checkpointing):
    (policy, _), prompt, answers = policy, [9, 8, 7, 6, 5], [[11, 12, 13, 14], [15], [16, 17, 5, 5, 0, 3]]
    ids, lengths = cs.pad_rows([prompt + a for a in answers])
    plain, entropy = cs.token_logprobs(policy, ids, torch.tensor([5] * 3), lengths, temperature=0.7)
    wanted = torch.autograd.grad((plain * plain).sum(), list(policy.parameters()))
    policy.checkpointing = checkpointing
    shared, shared_entropy, mask = cs.group_logprobs(policy, prompt, answers, temperature=0.7, chunk=4)
    found = torch.autograd.grad((shared * shared).sum(), list(policy.parameters()))
    policy.checkpointing = False
    assert mask.sum(1).tolist() == [4, 1, 6] and not shared[~mask].any()
    assert torch.allclose(shared, plain[:, 4:], atol=1e-5) and torch.allclose(shared_entropy, entropy[:, 4:], atol=1e-5)
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(found, wanted))


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
        reward_model.score_many(items)[:5], abs=1e-5
    )


def test_the_token_budget_bounds_every_pass_and_changes_no_score(reward_model, monkeypatch):
    items = [(f"Return {k}.", f"def solve(xs):\n    return {i}" + " + 1" * i) for k in range(2) for i in range(20)]
    whole = reward_model.score_many(items)
    sizes = []
    handle = reward_model.model.register_forward_pre_hook(lambda m, args: sizes.append(args[0].numel()))
    monkeypatch.setattr(reward_model, "token_budget", 400)
    narrow = reward_model.score_many(items)
    handle.remove()
    assert narrow == pytest.approx(whole, abs=1e-5)
    assert max(sizes) <= 400 and len(sizes) > 4
    prompts = sum(len(cs.reward_input_ids(reward_model.tokenizer, f"Return {k}.", "def")[0]) for k in range(2))
    tokens = sum(len(cs.reward_input_ids(reward_model.tokenizer, *item)[0]) for item in items)
    assert sum(sizes) < tokens - 15 * prompts  # each prompt's keys and values were computed once, not once a pass


def test_reward_input_ends_in_the_scored_newline(reward_model):
    tokenizer = reward_model.tokenizer
    ids, cut = cs.reward_input_ids(tokenizer, "P", "C")
    assert not cut and ids == tokenizer.encode(
        "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nC<|im_end|>\n"
    )


def test_long_programs_are_cut_and_counted_but_never_the_prompt(reward_model, tmp_path):
    tokenizer, code = reward_model.tokenizer, "x = 1\n" * 100
    ids, cut = cs.reward_input_ids(tokenizer, "Return the sum.", code, max_length=60)
    closing = tokenizer.encode("<|im_end|>\n")
    assert cut and len(ids) == 60 and ids[-len(closing) :] == closing
    with pytest.raises(UserError, match="max-length"):
        cs.reward_input_ids(tokenizer, "long prompt " * 50, code, max_length=60)
    folder = tmp_path / "reward"  # a checkpoint that does not say how long its inputs were
    shutil.copytree(ROOT / "tiny" / "reward", folder, ignore=shutil.ignore_patterns("codescaler.json"))
    small = cs.RewardModel(folder, device="cpu", max_length=60)
    small.score("Return the sum.", [code, "x = 1"])
    assert small.truncated == 1


def test_score_on_the_command_line(tmp_path, capsys):
    texts = {"task.md": "Return the sum.", "good.py": "def solve(xs):\n    return sum(xs)", "bad.py": "def solve(xs:"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    argv = ["--rm", str(ROOT / "tiny" / "reward"), "--problem", *(str(tmp_path / name) for name in texts)]
    cs.score_command([*argv, "--json", "--device", "cpu"])
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["program"].endswith("good.py") and good["valid"] and good["reward"] > 0 and good["reason"] == "ok"
    assert not bad["valid"] and bad["reward"] == 0 and bad["reason"] == "syntax_error"
    cs.score_command([*argv, "--device", "cpu"])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["rank", "score", "reward", "valid", "reason", "program"]
    assert first.split()[3:5] == ["yes", "ok"] and second.split()[3:5] == ["no", "syntax_error"]


def test_generate_on_the_command_line(capsys):
    cs.generate_command(
        ["--model", str(ROOT / "tiny" / "policy"), "Return the sum.", "-n", "2", "--max-new-tokens", "5"]
    )
    assert capsys.readouterr().out.count("log-probability") == 2


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
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "copy").iterdir()}
    assert len(modes) == 1  # the weights are as readable as the rest
    again = cs.RewardModel(tmp_path / "copy", device="cpu")
    items = [("Return the sum.", "def solve(xs):\n    return sum(xs)")]
    assert again.score_many(items) == reward_model.score_many(items)
    assert set(load_file(tmp_path / "copy" / "model.safetensors")) == set(dict(reward_model.model.named_parameters()))
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and len(config["id2label"]) == 1


def test_another_template_is_refused(tmp_path, reward_model, monkeypatch):
    folder = tmp_path / "copy"
    cs.save_model(reward_model.model, reward_model.tokenizer, folder, max_length=512)
    written = json.loads((folder / "codescaler.json").read_text())
    assert cs.RewardModel(folder, device="cpu").max_length == 512
    assert cs.RewardModel(folder, device="cpu", max_length=512, prompt="bare").max_length == 512
    for values, flag in ((dict(max_length=4096), "--max-length 4096"), (dict(prompt="full"), "--rm-prompt full")):
        with pytest.raises(UserError, match=flag):
            cs.RewardModel(folder, device="cpu", **values)
    for edit in (dict(template="other"), dict(max_length=4096), dict(cut="start of program"), dict(prompt="full")):
        (folder / "codescaler.json").write_text(json.dumps({**written, **edit}))
        with pytest.raises(UserError, match="trained with chat template"):
            cs.load_model(folder, head="score", device="cpu")
    (folder / "codescaler.json").write_text(json.dumps(written))
    monkeypatch.setattr(cs.Tokenizer, "chat", lambda *_: "another renderer")
    with pytest.raises(UserError, match="trained with chat template"):
        cs.load_model(folder, head="score", device="cpu")
    (folder / "codescaler.json").unlink()  # a checkpoint of others says nothing and is accepted
    assert cs.RewardModel(folder, device="cpu").max_length == 4096


def test_a_causal_lm_gets_a_zero_head(lm):
    model = cs.load_model(GOLDEN / "lm_tied", head="score", device="cpu")
    assert "zeros" in model.head_source and not model.score.weight.any()
    with pytest.raises(UserError, match="train_rm.py"):
        cs.RewardModel(ROOT / "tiny" / "policy")


def test_weights_in_several_files(tmp_path, lm, policy):
    cs.save_model(lm, policy[1], tmp_path, max_shard_bytes=300_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1 and not (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.tmp"))
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in lm.parameters())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 300_000 for file in files)
    again = cs.load_model(tmp_path, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lm.parameters(), strict=True))
    cs.save_model(again.to(torch.bfloat16), policy[1], tmp_path)  # one file in the same folder: the shards go away
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert cs.load_model(tmp_path, device="cpu").model.norm.weight.dtype == torch.float32


def test_bf16_stays_within_its_rounding(golden, lm, rm):
    # bf16 keeps 8 bits of a number, so each operation of 3 layers may be off by 2^-9 of its value; the errors add up as
    # in a random walk and grow with depth. Measured here: logits of standard deviation 2 are off by 0.024 on average
    # and 0.26 at the worst of 30,000, scores by 0.04. Transformers in bf16 is as far from fp32: 0.025 and 0.20.
    model = cs.load_model(GOLDEN / "lm_tied", device="cpu", dtype=torch.bfloat16)
    ids, mask = golden["right.input_ids"], golden["right.attention_mask"].bool()
    error = (model.logits(model(ids))[mask] - golden["right.logits"][mask]).abs()
    assert model.model.norm.weight.dtype == torch.bfloat16 and error.max() < 0.4 and error.mean() < 0.04
    g = load_file(GOLDEN / "rm" / "golden.safetensors")
    ids, lengths = g["right.input_ids"], g["right.attention_mask"].sum(1)
    model = cs.load_model(GOLDEN / "rm", head="score", device="cpu", dtype=torch.bfloat16)
    scores = model.score(model(ids), lengths)
    assert model.score.weight.dtype == scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()  # no ties of bf16 numbers
    assert (scores - g["right.logits"][:, 0]).abs().max() < 0.08


@pytest.mark.parametrize(
    "name, count",
    [("0.6b", 596049920), ("1.7b", 1720574976), ("4b", 4022468096), ("8b", 8190735360), ("14b", 14768307200)],
)
def test_published_shapes_have_their_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in cs.Qwen3(cs.SHAPES[f"qwen3-{name}-shape"]).parameters()) == count


def test_a_shape_has_no_weights_but_random_ones(lm, monkeypatch):
    with pytest.raises(UserError, match="--random-init"):
        cs.load_model("qwen3-8b-shape")
    monkeypatch.setitem(cs.SHAPES, "qwen3-test-shape", lm.config)
    a, b = (cs.load_model("qwen3-test-shape", device="cpu", random_init=True) for _ in range(2))
    assert a.head_source == "random" and 0.015 < a.model.embed_tokens.weight.std() < 0.025
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert cs.load_model(GOLDEN / "lm_tied", "score", device="cpu", random_init=True).head == "score"


def test_hub_ids(tmp_path, monkeypatch, lm):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(GOLDEN / "lm_tied")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert cs.load_model("some/model@abc123", device="cpu").config == lm.config
    assert asked == [("some/model", {"revision": "abc123", "allow_patterns": ["*.json", "*.jinja", "*.safetensors"]})]
    monkeypatch.undo()
    # What an earlier download left in the cache is found without a network.
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(GOLDEN / "lm_tied", snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "v1").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cs.model_folder("some/model@v1") == snapshot
    with pytest.raises(UserError, match="some/other"):
        cs.model_folder("some/other")


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


@pytest.mark.network
def test_the_published_pair_of_scores():
    """The model card of CodeScaler-8B scores a right and a wrong program: 6.5424 and -0.0313 in fp32 (33 GB)."""
    card = Path(huggingface_hub.hf_hub_download("LARK-Lab/CodeScaler-8B", "README.md")).read_text()
    texts = dict(re.findall(r'^(question|program_\w+) = """\\\n(.*?)"""', card, re.M | re.S))
    model = cs.RewardModel("LARK-Lab/CodeScaler-8B", dtype=torch.float32)
    scores = model.score(texts["question"], [texts["program_correct"], texts["program_wrong"]])
    assert scores == pytest.approx([6.5424, -0.0313], abs=0.01)
