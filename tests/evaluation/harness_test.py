"""The adapter for lm-eval by its methods, without lm-eval."""

import dataclasses
import functools
import json
import shutil
import types
import warnings

import jax
import numpy as np
import pytest

from sparsek.data.tokenizer import train_bpe
from sparsek.errors import UsageError
from sparsek.evaluation import harness, likelihoods
from sparsek.evaluation.harness import HarnessModel
from sparsek.generation.session import Session, run_steps
from sparsek.model.transformer import Transformer, init_params
from sparsek.runs import checkpoint
from tests.experiments.evaluate_test import write_run
from tests.helpers import SMALLEST, quick_jit

TEMPLATE = (
  "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
  "<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = dataclasses.replace(
  SMALLEST, embed_dim=16, num_heads=2, head_dim=8, vocab_size=300, dtype="float32"
)
CORPUS = ["def return class value name list text while for"] * 3


def make_run(folder, seq_len=64, bos=(), **fields):
  """Writes a run with a BPE tokenizer and a chat template."""
  config = dataclasses.replace(CONFIG, **fields)
  params = init_params(config, jax.random.key(0))
  # Texts are not all the same token.
  params["embed"]["embedding"] = 8 * params["embed"]["embedding"]
  write_run(folder, "data", config, seq_len, params)
  tokenizer = train_bpe(CORPUS, 300)
  (folder / "tokenizer").mkdir()
  tokenizer.save(str(folder / "tokenizer"))
  names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
  (folder / "tokenizer" / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
  )
  record = json.loads((folder / "model.json").read_text())
  made = {name: getattr(tokenizer, name) for name in ("name", "fingerprint", "vocab_size")}
  record["tokenizer"] = {**made, "bos_ids": list(bos)}
  (folder / "model.json").write_text(json.dumps(record))
  return folder


def requests(*arguments):
  return [types.SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("harness")
  make_run(folder / "run")
  return folder


@pytest.fixture(scope="module")
def model(folder):
  return HarnessModel(workdir=str(folder / "run"), batch_size=3)


@pytest.fixture(scope="module")
def params(folder, model):
  return checkpoint.load_params(str(folder / "run"), model.config)[0]


@functools.cache
def tokenizer():
  return train_bpe(CORPUS, 300)


@functools.cache
def whole_row(config):
  return quick_jit(lambda params, tokens: Transformer(config).apply({"params": params}, tokens))


def truth(model, params, context, continuation):
  """Returns the log-likelihood of tokens from a pass over the whole row."""
  row = np.array([[*context, *continuation]])
  padded = np.pad(row, ((0, 0), (0, 64 - row.size)))
  logits = whole_row(model.config)(params, padded)[0]
  logprobs = np.asarray(jax.nn.log_softmax(logits))[len(context) - 1 : row.size - 1]
  is_greedy = (logprobs.argmax(-1) == continuation).all()
  return logprobs[np.arange(len(continuation)), continuation].sum(), is_greedy


def greedy(model, params, ids, max_new_tokens):
  """Returns the tokens that a session writes after a prompt."""
  session = Session(model.config, params, 3)
  eos = tokenizer().eos_id
  turn = session.generate([ids] * 3, max_new_tokens=max_new_tokens, temperature=0, eos_id=eos)
  return [tokens[0] for tokens in turn]


QUESTION = "def value(list):"
ASKED = (
  (QUESTION, " return"),
  ("while name for", " class text list value"),
  (QUESTION, " return"),
  (QUESTION, " return text"),
  (QUESTION, " for"),
  ("", "class"),
  ("def ", "name"),
  ("<|endoftext|>", " x"),
  (QUESTION * 3, ""),
)


def test_log_likelihoods_are_those_of_whole_rows(model, params):
  encode = functools.partial(tokenizer().encode, special_tokens=True)
  got = model.loglikelihood(requests(*ASKED))
  assert got[0] == got[2] and got[8] == (0.0, True)
  for (context, continuation), (value, is_greedy) in zip(ASKED[:8], got):
    whole = encode(context + continuation)
    size = len(encode(context.rstrip()))
    before, after = (whole[:size], whole[size:]) if context else ([tokenizer().eos_id], whole)
    want = truth(model, params, before, after)
    assert value == pytest.approx(want[0], abs=1e-3) and is_greedy == want[1], (context, value)


def test_what_greedy_decoding_writes_is_greedy(model, params):
  context = tokenizer().encode(QUESTION)
  written = greedy(model, params, context, 3)
  answers = dict(model._read([(context, written), (context, [1])], "", True))
  assert answers[0][1] and not answers[1][1]


def test_a_context_is_read_once_for_all_continuations(model, monkeypatch):
  fed = []
  prefill = harness.log_likelihoods.__globals__["prefill"]

  def counted(config, params, cache, tokens, lengths, **options):
    fed.append(int(np.sum(lengths)))
    return prefill(config, params, cache, tokens, lengths, **options)

  monkeypatch.setitem(harness.log_likelihoods.__globals__, "prefill", counted)
  long = QUESTION * 4
  size = len(tokenizer().encode(long))
  one = HarnessModel.loglikelihood(model, requests(*((long, f" {c}") for c in "abcdefgh")))
  # Copies of the only context fill the batch; each answer begins with the context's last token.
  assert fed[0] == 3 * (size - 1) and sum(fed[1:]) <= 3 * 4 and len(one) == 8


def test_scores_without_room_in_the_cache_are_told():
  with pytest.warns(UserWarning, match="scores above the threshold had no room in the cache"):
    likelihoods.warn_of_lost(np.array([0, 3]))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    likelihoods.warn_of_lost(np.array([0, 0]))


def test_rolling_reads_each_token_once(model, params):
  text = "def name: return value " * 6
  tokens = tokenizer().encode(text)
  short = HarnessModel(workdir=model._values.workdir, max_length=16, batch_size=3)
  (got,) = short.loglikelihood_rolling(requests((text,)))
  parts = harness.rolling_parts(tokens, [tokenizer().eos_id], 16)
  assert [token for _, part in parts for token in part] == tokens and len(parts[-1][0]) > 1
  assert got == pytest.approx(sum(truth(model, params, *part)[0] for part in parts), rel=1e-5)
  assert short.loglikelihood_rolling(requests(("",), ("a",)))[0] == 0


def write(model, context, **settings):
  return model.generate_until(requests((context, {"max_gen_toks": 12, **settings})))[0]


def test_texts_are_those_of_generate(model, params):
  contexts = ["def", QUESTION, "while name for text", QUESTION]
  settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
  texts = model.generate_until(requests(*((context, settings) for context in contexts)))
  for context, text in zip(contexts, texts):
    tokens = greedy(model, params, tokenizer().encode(context), 12)
    assert text == tokenizer().decode(tokens) and text
  stop = texts[1][3]
  assert write(model, QUESTION, until=stop) == texts[1].split(stop)[0]
  assert write(model, QUESTION, until=["never", stop, "<|endoftext|>"]) == texts[1].split(stop)[0]
  # What may begin a stop string is not lost at the end.
  assert write(model, QUESTION, until=[f"{texts[1][-1]}never"]) == texts[1]
  (first,) = model.generate_until(requests((QUESTION, {"max_tokens": 1})))
  assert texts[1].startswith(first) and first != texts[1]


def test_few_programs_write_after_prompts_of_many_lengths(folder):
  """A program is compiled for each size of the cache, which full layers fill with all tokens."""
  dense = make_run(folder / "full", seq_len=4096, attention="full", num_layers=1)
  model = HarnessModel(workdir=str(dense))
  before = run_steps._cache_size()
  texts = ["for " * count for count in (2100, 2300, 2500)]
  model.generate_until(requests(*((text, {"max_gen_toks": 2}) for text in texts)))
  assert run_steps._cache_size() - before == 1


def test_a_name_of_a_special_token_ends_a_text_as_the_token(model, params):
  writing = model._writing({"until": ["a", "<|endoftext|>", ""], "max_new_tokens": 3})
  eos = tokenizer().eos_id
  assert writing.stop == ("a", "") and set(writing.end_ids) == {eos}
  ids = tokenizer().encode("while")
  model._end_ids, kept = (greedy(model, params, ids, 3)[2],), model._end_ids
  try:
    ended = write(model, "while")
  finally:
    model._end_ids = kept
  assert write(model, "while").startswith(ended) and ended != write(model, "while")


def test_a_draw_depends_on_the_seed_the_prompt_and_how_often_it_was_asked(folder, model):
  settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
  asked = [(context, settings) for context in ("def", "for", "def")]
  texts = model.generate_until(requests(*asked))
  assert len(set(texts)) == 3
  assert model.generate_until(requests(asked[1], asked[0])) == [texts[1], texts[0]]
  other = HarnessModel(workdir=str(folder / "run"), seed=1, batch_size=3)
  assert other.generate_until(requests(asked[0])) != texts[:1]


def test_what_is_too_long_loses_its_first_tokens(folder, params, capsys):
  model = HarnessModel(workdir=str(folder / "run"), max_length=24, batch_size=3)
  text = QUESTION * 8
  tokens = tokenizer().encode(text)
  (got, _), _ = model.loglikelihood(requests((text, " for"), ("a", " for")))
  after = tokenizer().encode(text + " for")[len(tokens) :]
  kept = [*tokens, *after][-25:]
  assert got == pytest.approx(truth(model, params, kept[: -len(after)], after)[0], abs=1e-3)
  said = capsys.readouterr().err
  assert said.startswith("warning: 1 of 2 texts are longer than 25 tokens, which max_length=24 ")
  assert write(model, text) == write(model, text[-len(tokenizer().decode(tokens[-12:])) :])
  with pytest.raises(UsageError, match="a continuation has .* tokens: give a max_length"):
    model.loglikelihood(requests(("a", text)))
  with pytest.raises(UsageError, match="max_length=24 leaves no room for a prompt"):
    write(model, text, max_gen_toks=24)


def test_a_text_begins_as_documents_do(folder):
  make_run(folder / "begun", bos=[7])
  model = HarnessModel(workdir=str(folder / "begun"))
  assert model._encode("ab") == [7, *tokenizer().encode("ab")]
  assert model._encode(tokenizer().decode([7]) + "ab")[:2] != [7, 7]
  assert model._pair("", "a")[0] == [7] and model._prefix == [7]
  assert HarnessModel(workdir=str(folder / "begun"), prefix_token_id=3)._pair("", "a")[0] == [3]
  path = folder / "begun" / "tokenizer" / "tokenizer_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<|endoftext|>"}))
  record = folder / "begun" / "model.json"
  record.write_text(record.read_text().replace('"bos_ids": [7]', '"bos_ids": []'))
  assert HarnessModel(workdir=str(folder / "begun"))._prefix == [tokenizer().eos_id]


@pytest.mark.parametrize(
  ("arguments", "error"),
  [
    ({}, "^workdir is required: the folder of a run$"),
    ({"workdir": "nowhere"}, "nowhere holds no run"),
    ({"k": "many"}, "^k=many: must be an integer of at least 1"),
    ({"k": 0}, "^k=0: must be an integer of at least 1"),
    ({"window": True}, "^window=True: must be an integer"),
    ({"windw": 4}, "^windw=4 is no argument: did you mean window"),
    ({"pretrained": "gpt2"}, "^pretrained=gpt2 is no argument: known are workdir, "),
    ({"step": 3}, "no checkpoint of step 3"),
    ({"dtype": "int8"}, "^dtype=int8: .*bfloat16"),
    ({"batch_size": "auto:4"}, "^batch_size=auto:4: it is not found by trying; give .* at least 1"),
    ({"batch_size": 0}, "^batch_size=0: must be an integer of at least 1"),
    ({"max_batch_size": 64}, "^max_batch_size=64: give a batch_size"),
    ({"device": "tpu:1"}, "^device=tpu:1: JAX computes on cpu here"),
    ({"max_length": 1}, "^max_length=1: must be an integer of at least 2"),
    ({"fsdp": 64}, "^fsdp=64 x context=1 must divide the number of devices"),
    ({"prefix_token_id": 300}, "^prefix_token_id=300: must be at most 299"),
    ({"gate": "none"}, "^gate=none"),
  ],
)
def test_bad_arguments_are_named(folder, arguments, error):
  workdir = {"workdir": str(folder / "run")} if arguments else {}
  with pytest.raises(UsageError, match=error):
    HarnessModel(**{**workdir, **arguments})


@pytest.mark.parametrize(
  ("settings", "error"),
  [
    ({"num_beams": 4}, "num_beams=4 is no setting of generation here: known are until, "),
    ({"temperature": -1}, "temperature=-1 must be a number of at least 0"),
    ({"temperature": "hot"}, "temperature='hot' must be a number of at least 0"),
    ({"max_gen_toks": 1.5}, "max_gen_toks=1.5 must be a whole number of at least 1"),
    ({"until": [3]}, "until=.3. must be a text or a list of texts"),
    ({"do_sample": True, "temperature": 0}, "do_sample=True with temperature=0.0"),
    ({"temperature": 1, "top_p": 0}, "top_p=0"),
  ],
)
def test_bad_settings_are_named(model, settings, error):
  with pytest.raises(ValueError, match=error):
    write(model, "a", **settings)


def test_arguments_of_a_run_without_selection_are_refused(folder):
  dense = folder / "dense"
  shutil.copytree(folder / "run", dense)
  record = json.loads((dense / "model.json").read_text())
  record["model"] |= {"attention": ["full"], "positions": "learned", "max_positions": 64}
  (dense / "model.json").write_text(json.dumps(record))
  with pytest.raises(UsageError, match="^k=3 has no effect"):
    HarnessModel(workdir=str(dense), k=3)
  with pytest.raises(UsageError, match="^max_length=65: the model has positions for 64 tokens"):
    HarnessModel(workdir=str(dense), max_length=65)


def test_the_arguments_are_in_the_record(folder, model):
  more = {"device": "cpu", "trust_remote_code": True, "allow_older_step": True}
  other = HarnessModel(workdir=str(folder / "run"), k=1, window=2, **more)
  assert (other.config.k, other.config.window) == (1, 2) != (model.config.k, model.config.window)
  recorded = json.loads(json.dumps(other.get_model_info()))["sparsek"]
  assert recorded["model"]["k"] == recorded["k"] == 1 and recorded["step"] == 7
  assert model.tokenizer_name == other.tokenizer_name
