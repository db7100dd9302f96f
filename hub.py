"""A model folder in Hugging Face layout, without the model: config.json, tokenizer, stored tensors.

    config = Config.from_dict(read_json(model_folder("Qwen/Qwen3-8B") / "config.json"))

Everything that is not computed or not understood is refused by name before a run begins: other
architectures, RoPE scaling, quantized or damaged weights, a tokenizer of another model.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as FastTokenizer

from common import UserError


def check(holds, mistake):
    """Raises UserError with the text of the mistake unless a condition holds."""
    if not holds:
        raise UserError(mistake)


# --------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class Config:
    """The fields of a Qwen3 config.json that change the computation, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e4  # transformers' default; published Qwen3 checkpoints say 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40960

    @staticmethod
    def from_dict(raw, where="config.json"):
        """config.json as a dict -> Config. What this file does not compute is refused by name."""
        kind = raw.get("model_type")
        check(kind == "qwen3", f"{where}: model_type {kind!r}: only dense Qwen3 ('qwen3') is here")
        # Three spellings are in use; where two blocks stand beside each other, transformers takes
        # rope_scaling. A block may be nested by layer type; dense Qwen3 has one type.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        rope = rope.get("full_attention", rope) if isinstance(rope, dict) else rope
        check(isinstance(rope, dict), f"{where}: rope_scaling {rope!r}: expected an object")
        refused = {
            "RoPE scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
            "sliding-window attention": raw.get("use_sliding_window")
            or "sliding_attention" in (raw.get("layer_types") or []),
            "attention_bias": raw.get("attention_bias"),
            "hidden_act other than silu": raw.get("hidden_act", "silu") != "silu",
            "quantization_config (load the original weights)": raw.get("quantization_config"),
        }
        for name, found in refused.items():
            check(not found, f"{where}: {name} is not implemented")
        raw, values = raw | {"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}, {}
        for f in dataclasses.fields(Config):
            found = raw.get(f.name)
            if found is None and f.default is not dataclasses.MISSING:
                continue  # absent or null: the default
            if f.type in (int, float):  # JSON may write a float as an integer
                mistake = f"{where}: {f.name} {found!r}: expected a positive {f.type.__name__}"
                check(type(found) in (f.type, int) and found > 0, mistake)
            values[f.name] = found
        heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        mistake = f"{where}: {heads} query heads over {kv_heads} key/value heads"
        check(heads % kv_heads == 0, mistake)
        return Config(**values)

    def to_dict(self, head, dtype="float32"):
        """config.json as transformers reads it; `dtype` is that of the weights beside it."""
        name = "Qwen3ForCausalLM" if head == "lm" else "Qwen3ForSequenceClassification"
        raw = {"architectures": [name], "model_type": "qwen3", "torch_dtype": dtype}
        raw |= dataclasses.asdict(self)
        if head == "score":  # num_labels = 1 is written as a label map with one entry
            raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return raw


# --------------------------------------------------------------------------------------------------
# files


def model_folder(path):
    """A folder (a run folder means its checkpoint/) or a hub id -> the folder with the model's
    files. Raises UserError."""
    for folder in (Path(path, "checkpoint"), Path(path)):
        if folder.is_dir():
            return folder
    text, advice = str(path), "give a folder with config.json, a run folder or a hub id"
    is_path = text.count("/") != 1 or text.startswith((".", "/", "out/", "tiny/"))
    check(not (folder.exists() or is_path), f"no model folder at {text!r}: {advice}")
    name, _, revision = text.partition("@")
    try:
        files = ["*.json", "*.jinja", "*.safetensors"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the hub's client raises many kinds: no network, no such model
        mistake = f"no folder at {text!r}, and as a hub id it cannot be had"
        raise UserError(f"{mistake}: {str(error).splitlines()[0]}") from None


def read_json(path):
    """The object in a JSON file of a model folder. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}: not a model folder") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    check(isinstance(found, dict), f"{path}: expected an object, found {type(found).__name__}")
    return found


def input_files(flag, path):
    """[(flag, file)] of a model folder or hub id, for a resumed run to compare."""
    kinds = (".safetensors", ".json")
    return [(flag, file) for file in sorted(model_folder(path).iterdir()) if file.suffix in kinds]


def stored_tensors(folder):
    """{tensor name: slice of its mapped file} of a checkpoint in one file or in shards. Raises
    UserError."""
    index, single, shard_of = folder / "model.safetensors.index.json", "model.safetensors", {}
    if index.is_file() and not (folder / single).is_file():  # of both transformers takes the file
        shard_of = read_json(index).get("weight_map")
        whole = isinstance(shard_of, dict) and all(isinstance(f, str) for f in shard_of.values())
        check(whole, f"{index}: no weight_map")
    stored = {}
    for file in sorted(set(shard_of.values())) or [single]:
        try:
            weights = safe_open(folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file} is damaged or missing: {error}") from None
        names = [name for name in weights.keys() if shard_of.get(name, file) == file]
        stored |= {name: weights.get_slice(name) for name in names}
    for name, file in shard_of.items():
        check(name in stored, f"{index}: {file} has no tensor {name}")
    return stored


# --------------------------------------------------------------------------------------------------
# tokenizer

# What is copied beside weights that are saved.
TOKENIZER_FILES = "tokenizer.json tokenizer_config.json chat_template.jinja generation_config.json"
# The beginning of the SHA-256 of Qwen3's chat template, which codescaler.py renders by hand.
KNOWN_TEMPLATES = {"87a2728cb8dc9fe4"}


class Tokenizer:
    """tokenizer.json of a model folder or hub id. Raises UserError where it is damaged."""

    def __init__(self, path):
        self.path = model_folder(path)
        file = self.path / "tokenizer.json"
        spec = read_json(file) | {"truncation": None, "padding": None}
        try:
            self.fast = FastTokenizer.from_str(json.dumps(spec))
            # The same vocabulary without added tokens: text is text, whatever it spells.
            plain = spec | {"added_tokens": [], "normalizer": None}
            self.plain = FastTokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise UserError(f"{file} is damaged: {error}") from None
        id_of = self.fast.get_vocab(with_added_tokens=True)
        self.num_tokens, last = len(id_of), max(id_of.values())
        check(self.num_tokens > last, f"{file}: {self.num_tokens} tokens, but ids up to {last}")
        for token in ("<|im_start|>", "<|im_end|>"):
            check(token in id_of, f"{file}: no token {token}: not a Qwen3 tokenizer")
        self.pad_id = id_of.get("<|endoftext|>", 0)
        # An answer ends at the end of its turn or of the text, or where the model's files say so.
        stops = {id_of["<|im_end|>"], id_of.get("<|endoftext|>")}
        for name in ("generation_config.json", "config.json"):
            if (self.path / name).is_file():
                eos = read_json(self.path / name).get("eos_token_id")
                stops |= set(eos) if isinstance(eos, list) else {eos}
        self.stop_ids = sorted(stops - {None})

    def encode(self, text):
        """Text -> ids; special tokens that are written in it are parsed, as Hugging Face does."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text):
        """Text of others -> ids that decode to it, character by character: a special token that is
        written in it is ordinary text, so no statement or program can open a turn of its own."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, special tokens left out."""
        return self.fast.decode(list(ids), skip_special_tokens=True)


def check_tokenizer(tokenizer, config):
    """Raises UserError where a tokenizer belongs to another model; says so where the model's own
    chat template is not the one that is rendered here."""
    found = f"{tokenizer.path / 'tokenizer.json'} has {tokenizer.num_tokens} tokens, config.json "
    found += f"vocab_size {config.vocab_size}: it belongs to another model"
    check(tokenizer.num_tokens <= config.vocab_size, found)
    tell_template(tokenizer.path)


@functools.cache  # once, however often a model is loaded
def tell_template(folder):
    """Says on rank 0 where a model's own chat template is not Qwen3's."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template = file.read_text(encoding="utf-8") if file.is_file() else None
    if template is None and settings.is_file():
        template = read_json(settings).get("chat_template")
    found = hashlib.sha256(str(template).encode()).hexdigest()[:16]
    if template and found not in KNOWN_TEMPLATES and os.environ.get("RANK", "0") == "0":
        notice = f"{folder}: its chat template ({found}) is not Qwen3's, which is used here"
        print(notice, file=sys.stderr)
