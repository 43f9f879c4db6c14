"""The export: transformers and llama.cpp load what it writes, and compute and tokenize as we do."""

import errno
import json
import math
import os
import types
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model

import eval as evaluation
from config import SamplingConfig, UserError
from data import END_OF_TEXT, BPETokenizer, CharTokenizer, Stream, encode_stories, open_dataset
from eval import bpe_vocabulary, export, loss_figures
from model import Transformer

SHARED = ROOT.parent / "shared"
NAMES, THINGS = ("Tom", "Mia", "Sue"), ("red ball", "café", "boat")
STORIES = [f"Once upon a time {name} had a {thing}. {name} said, \"I like my {thing}!\"" + " Yes!" * (i % 3)
           for i, (name, thing) in enumerate((name, thing) for name in NAMES for thing in THINGS)]
NASTY = [
    "", " ", "\n", "  \n\n \t ", " a", "a ", "a  b", "a\r\nb\x00c\x7f\x85\xa0\xad", "don't I'LL we'Ve 's 'S",
    "x" * 300, "12 345  6", "e\u0301 é \ufb01 Ⅳ ½ ²", "\u200b\u200d\ufeff\ufffd\U0010ffff", "日本語。ｶﾞ",
    "👩‍👩‍👧‍👦 🇩🇪 ☃️", "שלום مرحبا नमस्ते ไทย", "\u2028\u2029\u3000x\u1680 y", "<unk> <pad> [UNK] <s> ▁ Ġ Ċ",
    "<|endoftext", "ǅ İ ß ſ", "a\u0300\u0316\u0301", "...!?—“”‘’"]


def small_model(vocab_size: int, head_dim: int = 32, context: int = 64) -> Transformer:
    return make_model(vocab_size, d_model=64, n_heads=64 // head_dim, d_ff=96, max_seq_len=context)


def real_stories() -> list[str]:
    path = SHARED / "tinystories" / "valid.txt"
    return list(open_dataset(str(path), True)["train"]()) if path.exists() else STORIES


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(STORIES, 320)


@pytest.fixture(scope="module")
def char() -> CharTokenizer:
    return CharTokenizer.train([*STORIES, "\ufffd"])


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    if not (SHARED / "tiktoken").exists():
        pytest.skip("GPT-2's vocabulary is not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
        return BPETokenizer.gpt2("data")


# ---------------------------------------------------------------- transformers

@pytest.fixture(params=["bpe", "char"])
def exported(request, tmp_path) -> types.SimpleNamespace:
    """A model of ours and what transformers makes of its folder."""
    transformers = pytest.importorskip("transformers")
    tokenizer = request.getfixturevalue(request.param)
    model = small_model(tokenizer.vocab_size, context=256)
    export(model, tokenizer, SamplingConfig(temperature=0.7), str(tmp_path / "my model"))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "my model", output_loading_info=True)
    assert not any(report.values()), report
    return types.SimpleNamespace(
        model=model, tokenizer=tokenizer, folder=str(tmp_path / "my model"), theirs=theirs,
        their_tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "my model"))


@torch.no_grad()
def test_transformers_computes_our_logits(exported):
    ours = exported.tokenizer
    for story in STORIES:
        tokens = torch.tensor([[ours.eot_id, *ours.encode(story), ours.eot_id]])
        logits = exported.theirs(tokens).logits
        torch.testing.assert_close(logits, exported.model(tokens), rtol=1e-5, atol=1e-5)


def test_transformers_tokenizes_as_we_do(exported):
    ours, theirs = exported.tokenizer, exported.their_tokenizer
    for text in (*NASTY, *STORIES, *real_stories()):
        tokens = theirs(text)["input_ids"]
        assert tokens == [ours.eot_id, *ours.encode(text)], text
        if ours.name != "char" or not ours.unknown(text):
            assert theirs.decode(tokens, skip_special_tokens=True) == text == ours.decode(tokens[1:])
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot_id
    batch = theirs(STORIES[:2], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"} and batch["attention_mask"][:, -1].all()


def test_gpt2s_tokenizer_has_the_published_ids_and_merges_and_tokenizes_as_we_do(gpt2):
    ids, merges = bpe_vocabulary(gpt2)
    files = [path.read_text() for path in (SHARED / "tiktoken").iterdir()]
    encoder, published = sorted(files, key=lambda text: text.startswith("#"))
    published = dict.fromkeys(published.splitlines()[1:])
    assert ids == json.loads(encoder) and [merge for merge in merges if merge in published] == list(published)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(evaluation.tokenizer_json(gpt2)))
    for text in (*NASTY, *real_stories()):
        assert theirs.encode(text).ids == [gpt2.eot_id, *gpt2.encode(text)], text


def test_transformers_tells_the_same_story(exported):
    transformers, ours = pytest.importorskip("transformers"), exported.tokenizer
    tell = transformers.pipeline("text-generation", exported.folder)
    for opening in ("Once upon a time", ""):
        prompt = [ours.eot_id, *ours.encode(opening)]
        row, = exported.model.generate([prompt], 40, temperature=0, eot_id=ours.eot_id)
        story = ours.decode(row[1:]).removesuffix(END_OF_TEXT)
        assert tell(opening, do_sample=False, max_new_tokens=40)[0]["generated_text"] == story
    settings = exported.theirs.generation_config
    assert settings.do_sample and (settings.temperature, settings.top_k) == (0.7, 50)
    assert isinstance(tell("Tom")[0]["generated_text"], str)


@pytest.mark.parametrize(("sampling", "options"), [
    (SamplingConfig(temperature=0, top_k=None), "--temp 0 --top-k 0 --top-p 1 --min-p 0"),
    (SamplingConfig(temperature=0.5, top_k=7, top_p=0.9), "--temp 0.5 --top-k 7 --top-p 0.9 --min-p 0")])
def test_a_story_is_sampled_as_the_settings_say(bpe, tmp_path, sampling, options):
    model = small_model(bpe.vocab_size)
    use = export(model, bpe, sampling, str(tmp_path / "model.gguf"))
    assert all(options in line for line in use.splitlines())
    transformers = pytest.importorskip("transformers")
    export(model, bpe, sampling, str(tmp_path / "folder"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    settings = theirs.generation_config
    assert settings.do_sample == (sampling.temperature > 0) and settings.top_k == sampling.top_k
    assert (settings.temperature, settings.top_p) == (sampling.temperature, sampling.top_p or 1)
    prompt = [bpe.eot_id, *bpe.encode("Tom")]
    told = theirs.generate(torch.tensor([prompt]), max_new_tokens=10)[0].tolist()
    greedy, = model.generate([prompt], 10, temperature=0, eot_id=bpe.eot_id)
    assert told[:len(prompt)] == prompt and (told == greedy or sampling.temperature > 0)


@torch.no_grad()
def test_perplexity_with_transformers_alone_is_that_of_eval(exported):
    total = n_tokens = 0
    tokenize = exported.their_tokenizer
    for story in STORIES:
        tokens = tokenize(story + tokenize.eos_token, return_tensors="pt")["input_ids"]
        total += exported.theirs(tokens, labels=tokens).loss.item() * (tokens.numel() - 1)
        n_tokens += tokens.numel() - 1
    chunks = []
    info = encode_stories(STORIES, exported.tokenizer, chunks.append)
    stream = Stream(np.frombuffer(b"".join(chunks), np.uint16), info)
    figures = loss_figures(exported.model, exported.tokenizer, stream)
    assert math.exp(total / n_tokens) == pytest.approx(figures["perplexity"], rel=1e-4)


# ---------------------------------------------------------------- llama.cpp

@pytest.mark.parametrize("head_dim", [32, 64])
def test_gguf_holds_our_weights_and_tokens(bpe, tmp_path, head_dim):
    gguf = pytest.importorskip("gguf")
    model = small_model(bpe.vocab_size, head_dim)
    export(model, bpe, SamplingConfig(), str(tmp_path / "model.gguf"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    weights = list(model.state_dict().values())
    assert len(reader.tensors) == len(weights)
    for theirs, ours in zip(reader.tensors, weights):
        expected = ours.numpy().astype(np.float16 if ours.ndim > 1 else np.float32)
        assert theirs.data.dtype == expected.dtype and np.array_equal(theirs.data, expected), theirs.name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["qwen3.attention.key_length"]) == ("qwen3", head_dim)
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == bpe.vocab_size
    assert fields["tokenizer.ggml.tokens"][bpe.eot_id] == END_OF_TEXT
    types = reader.fields["tokenizer.ggml.token_type"].types
    assert types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]


@pytest.mark.parametrize("head_dim", [32, 64])
def test_llama_cpp_tokenizes_and_tells_as_we_do(bpe, tmp_path, head_dim):
    xllamacpp = pytest.importorskip("xllamacpp")
    model = small_model(bpe.vocab_size, head_dim)
    export(model, bpe, SamplingConfig(), str(tmp_path / "model.gguf"))
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(tmp_path / "model.gguf"), 64, False
    parameters.cpuparams.n_threads = parameters.n_parallel = 1
    server = xllamacpp.Server(parameters)

    def ask(path: str, **question) -> dict:
        request = urllib.request.Request(f"{server.listening_address}{path}", json.dumps(question).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    for text in (*NASTY, *STORIES, *real_stories()):
        tokens = ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert tokens == [bpe.eot_id, *bpe.encode(text)], text
    for p in model.parameters():
        p.data = p.half().float() if p.ndim > 1 else p  # what the file holds
    for opening in ("Once upon a time", "Mia"):
        prompt = [bpe.eot_id, *bpe.encode(opening)]
        told = ask("/completion", prompt=opening, temperature=0, n_predict=24, return_tokens=True)["tokens"]
        assert told == model.generate([prompt], 24, temperature=0, eot_id=bpe.eot_id)[0][len(prompt):]


def test_gguf_of_a_char_tokenizer_is_refused(char, tmp_path):
    with pytest.raises(UserError, match="no char tokenizer.*without .gguf"):
        export(small_model(char.vocab_size), char, SamplingConfig(), str(tmp_path / "model.gguf"))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("name", ["my-model", "my-model.gguf"])
def test_export_prints_how_to_use_it_and_refuses_an_existing_target(bpe, tmp_path, monkeypatch, capsys, name):
    model = small_model(bpe.vocab_size)
    monkeypatch.setattr(evaluation, "load_model", lambda *_: (model, bpe, {"config": {}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["eval.py", "--export", f"new/{name}"])
    evaluation.main()
    assert f"new/{name}" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == (1 if name.endswith(".gguf") else 5)
    with pytest.raises(UserError, match=f"new/{name} exists"):
        evaluation.main()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["my-model", "my-model.gguf"])
@pytest.mark.parametrize("error, raised", [(OSError(errno.ENOSPC, "No space left on device"), UserError),
                                           (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failure_leaves_nothing_half_written(bpe, tmp_path, monkeypatch, name, error, raised):
    synced = []

    def fail_at_the_last_file(descriptor):
        synced.append(descriptor)
        if len(synced) == (1 if name.endswith(".gguf") else 5):
            raise error

    monkeypatch.setattr(os, "fsync", fail_at_the_last_file)
    with pytest.raises(raised):
        export(small_model(bpe.vocab_size), bpe, SamplingConfig(), str(tmp_path / name))
    assert synced and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["my-model", "my-model.gguf"])
def test_a_folder_that_cannot_be_made_is_a_users_mistake(bpe, tmp_path, name):
    tmp_path.joinpath("file").touch()
    with pytest.raises(UserError, match="cannot write .*file"):
        export(small_model(bpe.vocab_size), bpe, SamplingConfig(), str(tmp_path / "file" / name))
