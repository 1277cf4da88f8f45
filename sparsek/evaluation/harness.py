"""A run as lm-eval (EleutherAI's evaluation harness) asks models; `sparsek.lm_eval` registers it.

Requests are objects whose `args` are (context, continuation), (text,) or (context, settings).
Token by token they are read as lm-eval's own model `hf` reads them, so that both give the same
numbers for the same model: names of special tokens in a text are these tokens, a text begins with
bos where the run's documents do, and the first tokens of what is longer than max_length are left
out.
"""

import dataclasses
import difflib
import functools
import os
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
from absl import flags as absl_flags
from tqdm import tqdm

from sparsek.command_line import flags
from sparsek.command_line.configs import override_config, refuse_unused
from sparsek.command_line.definer import Definer, names_of
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_mesh_flags
from sparsek.config import TransformerConfig
from sparsek.data.chat_messages import DEFAULT, ChatTemplate, find_templates, special_tokens
from sparsek.errors import RunError, UsageError
from sparsek.evaluation.completions import Writing, completions
from sparsek.evaluation.likelihoods import Likelihood, Pair, log_likelihoods
from sparsek.generation.inference import inference_params
from sparsek.generation.rows import without_context
from sparsek.model.baselines import context_refusal
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_directory, run_record

LM_EVALS_DEVICE = "cuda:0"  # what lm-eval asks for by default, whatever there is
# Names that tasks give the number of new tokens; the first that is given counts.
MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = ("until", *MAX_NEW_TOKENS, "do_sample", "temperature", "top_p", "top_k")

T = TypeVar("T")


class Request(Protocol):
  """An `Instance` of lm-eval."""

  @property
  def args(self) -> tuple:
    """The arguments of the request."""


def _arguments() -> absl_flags.FlagValues:
  """Returns the arguments of `HarnessModel`, which are checked as the flags of commands are."""
  flag_values = absl_flags.FlagValues()
  flags.define_workdir_flag(flag_values)
  flags.define_attention_flags(flag_values)
  flags.define_step_flags(flag_values)
  define_mesh_flags(flag_values)
  define = Definer(flag_values)
  define.integer("batch_size", 1, "Texts per device that are read or written together.", lower=1)
  define.integer("max_length", None, "Most tokens of a text. By default as in training.", lower=2)
  define.integer("max_gen_toks", 256, "New tokens, where a task does not say how many.", lower=1)
  define.integer("prefix_token_id", None, "Token before an empty context. By default bos.", lower=0)
  define.integer("seed", 0, "Seed of the texts that are drawn at random.", lower=0)
  return flag_values


def parse_arguments(arguments: Mapping[str, Any]) -> absl_flags.FlagValues:
  """Returns the arguments of `HarnessModel` as parsed flags.

  Raises:
    UsageError: naming the argument, its value and what is allowed.
  """
  values = _arguments()
  known = names_of(values)
  given = {name: value for name, value in arguments.items() if value is not None}
  for name, value in given.items():
    if name not in known:
      near = difflib.get_close_matches(name, known, 1)
      meant = f"did you mean {near[0]}? " if near else ""
      raise UsageError(f"{name}={value} is no argument: {meant}known are {', '.join(known)}")
  parse(["model_args", *(f"--{name}={value}" for name, value in given.items())], values)
  if not values.workdir:
    raise UsageError("--workdir is required: the folder of a run")
  return values


def check_device(device: str | None) -> None:
  """Raises UsageError for a device that JAX does not compute on."""
  backend = jax.default_backend()
  names = {"cuda", "gpu"} if backend == "gpu" else {backend}
  if device not in (None, LM_EVALS_DEVICE) and device.partition(":")[0] not in names:
    raise UsageError(
      f"device={device}: JAX computes on {backend} here; leave it out: $JAX_PLATFORMS chooses"
    )


class HarnessModel:
  """A run that answers lm-eval's requests.

  Args:
    device: checked only, since JAX chooses the devices.
    max_batch_size: refused; it is of batch sizes that are found by trying.
    trust_remote_code: ignored; it is of data sets.
    **arguments: those of `_arguments`.

  Attributes:
    config: of the model.
    max_length: most tokens of a text.
    eot_token_id: the token that ends a text.

  Raises:
    UsageError: for bad arguments, and where there is no such run or checkpoint.
  """

  def __init__(
    self,
    device: str | None = None,
    max_batch_size: int | None = None,
    trust_remote_code: bool | None = None,
    **arguments: Any,
  ):
    super().__init__()
    try:
      self._load(device, max_batch_size, arguments)
    except (UsageError, RunError) as error:
      # Flags are arguments here.
      names = "|".join(names_of(_arguments()))
      error.args = (re.sub(rf"--({names})\b", r"\1", str(error)),)
      raise

  def _load(self, device, max_batch_size, arguments):
    check_device(device)
    if max_batch_size is not None:
      raise UsageError(f"max_batch_size={max_batch_size}: give a batch_size, which is not searched")
    if str(arguments.get("batch_size")).startswith("auto"):
      raise UsageError(
        f"batch_size={arguments['batch_size']}: it is not found by trying; give the texts that a "
        "device reads together, at least 1"
      )
    values = parse_arguments(arguments)
    config, record = run_record.load_run_config(values.workdir)
    config = override_config(config, values)
    refuse_unused([config], values)
    refusal = context_refusal(config) if values.context > 1 else ""
    if refusal:
      raise UsageError(f"--context={values.context}: {refusal}")
    mesh = make_mesh(values.fsdp, values.context)
    self._mesh = mesh if mesh.size > 1 else None
    self.config, self._values = config, values
    self._tokenizer = run_record.load_run_tokenizer(values.workdir)
    self._folder = os.path.join(values.workdir, "tokenizer")
    self.max_length = _max_length(config, record, values.max_length)
    self.eot_token_id = self._tokenizer.eos_id
    self._end_ids = tuple(record["tokenizer"].get("eos_ids", [self.eot_token_id]))
    self._prefix = self._read_prefix(values.prefix_token_id)
    self._template: ChatTemplate | None = None
    params, self._step = checkpoint.load_params(
      values.workdir, config, values.step, self._mesh, allow_older=values.allow_older_step
    )
    self._params = inference_params(config, params, without_context(self._mesh))
    self._batch_size = values.batch_size * mesh.size

  def _read_prefix(self, prefix_token_id: int | None) -> list[int]:
    """Returns the tokens of an empty context."""
    if prefix_token_id is not None:
      if prefix_token_id >= self.config.vocab_size:
        raise UsageError(
          f"--prefix_token_id={prefix_token_id}: must be at most {self.config.vocab_size - 1}"
        )
      return [prefix_token_id]
    named = special_tokens(self._folder).get("bos_token")
    ids = self._tokenizer.encode(named, special_tokens=True) if named else []
    return self._tokenizer.bos_ids or (ids if len(ids) == 1 else [self.eot_token_id])

  def loglikelihood(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[Likelihood]:
    """Returns for each (context, continuation) the log-likelihood of the continuation.

    With it comes whether greedy decoding writes the continuation.
    """
    pairs = [self._pair(*request.args) for request in requests]
    answers: dict[int, Likelihood] = {}
    for i, answer in self._read(pairs, "loglikelihood", disable_tqdm):
      answers[i] = answer
      self.remember("loglikelihood", requests[i].args, answer)
    return [answers[i] for i in range(len(requests))]

  def loglikelihood_rolling(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-likelihood of each (text,), given the token before an empty context.

    A text longer than max_length is cut; all but the first part follow the token before them, and
    the last one as many as fit.
    """
    pairs: list[Pair] = []
    owners = []
    for i, request in enumerate(requests):
      parts = rolling_parts(self._encode(request.args[0]), self._prefix[-1:], self.max_length)
      pairs += parts
      owners += [i] * len(parts)
    totals = [0.0] * len(requests)
    for i, (value, _) in self._read(pairs, "loglikelihood_rolling", disable_tqdm):
      totals[owners[i]] += value
    for request, total in zip(requests, totals):
      self.remember("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
    """Returns for each (context, settings) the text that the model writes after the context.

    It ends before the first of the strings "until", with the document, or after "max_gen_toks"
    tokens. It is greedy without a "temperature".
    """
    groups: dict[Writing, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(self._writing(request.args[1]), []).append(i)
    texts, seen = {}, dict[str, int]()
    bar = functools.partial(tqdm, desc="generate_until", disable=disable_tqdm or None)
    for writing, indices in groups.items():
      prompts: list[Sequence[int]] = []
      keys = []
      for i in indices:
        context = requests[i].args[0]
        prompts.append(self._encode(context) or self._prefix)
        keys.append(self._key(context, seen))
      prompts = self._cut(prompts, self.max_length - writing.max_new_tokens)
      written = completions(
        self.config,
        self._params,
        self._tokenizer,
        prompts,
        writing,
        keys,
        self._batch_size,
        self._mesh,
      )
      for place, text in bar(written, total=len(indices)):
        texts[indices[place]] = text
        self.remember("generate_until", requests[indices[place]].args, text)
    return [texts[i] for i in range(len(requests))]

  def remember(self, kind: str, arguments: tuple, answer: Any) -> None:
    """Takes each answer as it is known; lm-eval's cache of answers does something with it."""

  @property
  def tokenizer_name(self) -> str:
    """The name under which lm-eval keeps prompts that a chat template made."""
    templates = "".join(repr(template) for template in self._templates().values())
    return f"sparsek-{self._tokenizer.fingerprint[:16]}-{zlib.crc32(templates.encode()):08x}"

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the text of the template that is applied from now on, None for False.

    Raises:
      UsageError: where the run has no chat template, or none of this name.
    """
    if not chat_template:
      return None
    self._template = self._chosen(chat_template)
    return self._template.text

  def apply_chat_template(
    self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns the prompt of messages; see `sparsek.data.chat_messages`."""
    self._template = self._template or self._chosen(True)
    return self._template.render(chat_history, add_generation_prompt)

  def get_model_info(self) -> dict[str, Any]:
    """Returns what lm-eval writes into its results about the model."""
    flag_values = {name: self._values[name].value for name in names_of(self._values)}
    return {
      "sparsek": {
        **flag_values,
        "step": self._step,
        "max_length": self.max_length,
        "devices": 1 if self._mesh is None else self._mesh.size,
        "model": dataclasses.asdict(self.config),
        "versions": run_directory.versions(),
      }
    }

  def _templates(self) -> dict[str, ChatTemplate]:
    return find_templates(self._folder)

  def _chosen(self, name: bool | str) -> ChatTemplate:
    templates = self._templates()
    wanted = DEFAULT if name is True else str(name)
    if wanted not in templates:
      have = f"it has {', '.join(templates)}" if templates else "it has none"
      raise UsageError(
        f"apply_chat_template={wanted}: the tokenizer of {self._values.workdir} has no chat "
        f"template of this name; {have}"
      )
    return templates[wanted]

  def _encode(self, text: str) -> list[int]:
    """Returns the tokens of a text that begins a document."""
    ids, bos = self._tokenizer.encode(text, special_tokens=True), self._tokenizer.bos_ids
    return ids if ids[: len(bos)] == bos else [*bos, *ids]

  def _pair(self, context: str, continuation: str) -> Pair:
    """Returns the tokens of a context and of its continuation, cut to max_length.

    They are those of the whole text, cut where the context's own tokens end: a space at the end of
    the context belongs to the continuation.
    """
    if context:
      before = self._encode(context.rstrip())
      after = self._encode(context + continuation)[len(before) :]
    else:
      before = self._prefix
      after = self._tokenizer.encode(continuation, special_tokens=True)
      if after[:1] == before:
        after = after[1:]
    if len(after) > self.max_length:
      raise UsageError(
        f"a continuation has {len(after)} tokens: give a max_length of at least as many, "
        f"not {self.max_length}"
      )
    return before or self._prefix, after

  def _cut(self, rows: Sequence[Sequence[int]], most: int) -> list[Sequence[int]]:
    """Returns the last `most` tokens of each row; says on stderr how many rows were longer."""
    if most < 1:
      raise UsageError(
        f"max_length={self.max_length} leaves no room for a prompt before the new tokens"
      )
    longer = sum(len(row) > most for row in rows)
    if longer:
      print(
        f"warning: {longer} of {len(rows)} texts are longer than {most} tokens, which "
        f"max_length={self.max_length} leaves: only their last tokens are read",
        file=sys.stderr,
      )
    return [row[-most:] for row in rows]

  def _read(
    self, pairs: Sequence[Pair], name: str, quiet: bool
  ) -> Iterable[tuple[int, Likelihood]]:
    """Returns the log-likelihoods of pairs, whose contexts are cut to max_length."""
    sizes = [len(after) for _, after in pairs]
    wholes = self._cut([[*before, *after] for before, after in pairs], self.max_length + 1)
    cut = [
      (whole[: len(whole) - size], whole[len(whole) - size :]) for whole, size in zip(wholes, sizes)
    ]
    values = log_likelihoods(self.config, self._params, cut, self._batch_size, self._mesh)
    return tqdm(values, name, len(cut), disable=quiet or None)

  def _key(self, context: str, seen: dict[str, int]) -> jax.Array:
    """Returns the PRNG key of a text: of its prompt, and of how often it was asked for before."""
    seen[context] = seen.get(context, -1) + 1
    key = jax.random.key(self._values.seed)
    of_prompt = jax.random.fold_in(key, zlib.crc32(context.encode("utf-8", "replace")))
    return jax.random.fold_in(of_prompt, seen[context])

  def _writing(self, settings: Mapping[str, Any]) -> Writing:
    """Returns how a task wants its texts written.

    Raises:
      UsageError: naming the setting, its value and what is allowed.
    """
    for name, value in settings.items():
      if name not in SETTINGS:
        raise UsageError(
          f"{name}={value!r} is no setting of generation here: known are {', '.join(SETTINGS)}"
        )
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not all(isinstance(text, str) for text in until):
      raise UsageError(f"until={until!r} must be a text or a list of texts")
    tokens = (settings[name] for name in MAX_NEW_TOKENS if settings.get(name) is not None)
    most = _number("max_gen_toks", next(tokens, self._values.max_gen_toks), int, 1)
    do_sample, given = settings.get("do_sample"), settings.get("temperature")
    temperature = _number("temperature", (1.0 if do_sample else 0.0) if given is None else given)
    if do_sample and not temperature:
      raise UsageError("do_sample=True with temperature=0.0: drawing needs a temperature above 0")
    ends = {text: self._special_id(text) for text in until}
    return Writing(
      most,
      temperature if do_sample is None or do_sample else 0.0,
      _number("top_p", 1.0 if settings.get("top_p") is None else settings["top_p"]),
      _number("top_k", settings.get("top_k") or 0, int),
      tuple(text for text, end in ends.items() if end is None),
      (*self._end_ids, *(end for end in ends.values() if end is not None)),
    )

  def _special_id(self, text: str) -> int | None:
    """Returns the special token of this name, which no decoded text contains, or None."""
    ids = self._tokenizer.encode(text, special_tokens=True) if text else []
    return ids[0] if len(ids) == 1 and not self._tokenizer.decode(ids) else None


def rolling_parts(tokens: Sequence[int], prefix: Sequence[int], max_length: int) -> list[Pair]:
  """Returns the pairs that together predict each token of a text once, as lm-eval cuts it.

  Args:
    tokens: of the text.
    prefix: the token before it.
    max_length: most tokens that a pair reads.
  """
  parts: list[Pair] = []
  for start in range(0, len(tokens), max_length):
    stop = min(start + max_length, len(tokens))
    # The last part reads as many tokens before it as fit.
    first = max(stop - max_length - 1, 0) if start else 0
    parts.append((tokens[first:start] if start else prefix, tokens[start:stop]))
  return parts


def _max_length(config: TransformerConfig, record: Mapping[str, Any], given: int | None) -> int:
  """Returns the most tokens of a text."""
  learned = config.positions == "learned"
  if given is None:
    return config.max_positions if learned else max(config.max_positions, record["data"]["seq_len"])
  if learned and given > config.max_positions:
    raise UsageError(
      f"--max_length={given}: the model has positions for {config.max_positions} tokens"
    )
  return given


def _number(name: str, value: Any, kind: type = float, lower: float = 0) -> Any:
  """Returns a setting of generation as a number. Raises UsageError for what is none."""
  try:
    number = kind(value)
  except (TypeError, ValueError):
    number = None
  if number is None or number != float(value) or not lower <= number < float("inf"):
    what = "a whole number" if kind is int else "a number"
    raise UsageError(f"{name}={value!r} must be {what} of at least {lower}")
  return number
