"""The house rules: who may import whom, how long files and functions are, how sentences begin."""

import ast
import functools
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A room may import those of later lines, and itself; rooms of one line do not import each other.
ORDER = (
  "experiments",
  "lm_eval",
  "programs",
  "evaluation",
  "training",
  "huggingface linen nnx",
  "functional",
  "generation runs",
  "model",
  "attention data parallel",
  "command_line",
  "storage",
  "config errors",
)
MAY_ALSO = {
  ("parallel", "attention"),
  ("experiments", "sparsek"),
  ("__main__", "sparsek"),
  ("__main__", "command_line"),
}
USE_KERNELS = {"attention", "model", "generation", "parallel", "experiments", "kernels"}
FOLDERS = ("sparsek", "kernels", "experiments", "tests")
GENERATED = {ROOT / "docs" / name for name in ("flags.md", "results.md")}  # pages
FIRST_WORDS = {"What", "Of", "Whether", "Where", "As", "Which", "How"}


def room_of(module: str) -> str:
  """Returns the room of "sparsek.training.loop", "sparsek.experiments.bench.cells", ..."""
  parts = module.split(".")
  return parts[1] if parts[0] == "sparsek" and len(parts) > 1 else parts[0]


def sources(*folders: str) -> list[pathlib.Path]:
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
  return f"sparsek.{name}" if name.startswith(("kernels", "experiments")) else name


def imported(tree: ast.AST) -> list[str]:
  """Returns every module of ours that is imported, also inside functions."""
  names: list[str] = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "sparsek":
      names += [f"sparsek.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names.append(node.module or "")
  return [name for name in names if re.match(r"(sparsek|experiments|tests|kernels)\b", name)]


def allowed(source: str, target: str) -> bool:
  """Returns whether a room may import another; experiments may import the public face, too."""
  rank = {room: i for i, line in enumerate(ORDER) for room in line.split()}
  if source == target or (source, target) in MAY_ALSO:
    return True
  if target == "kernels":
    return source in USE_KERNELS
  return source in rank and target in rank and rank[source] < rank[target]


def library() -> list[pathlib.Path]:
  return [p for p in sources("sparsek", "kernels", "experiments") if p.stem != "__init__"]


@pytest.mark.parametrize("path", library(), ids=module_of)
def test_imports_follow_the_rule(path):
  source = room_of(module_of(path))
  targets = {room_of(name) for name in imported(ast.parse(path.read_text()))}
  assert [room for room in sorted(targets) if not allowed(source, room)] == []


def test_no_module_imports_itself_in_a_circle():
  graph = {module_of(p): imported(ast.parse(p.read_text())) for p in sources("sparsek", "kernels")}
  names = set(graph)
  edges = {name: [t for t in targets if t in names] for name, targets in graph.items()}
  done: set[str] = set()
  while ready := {name for name in names - done if set(edges[name]) - {name} <= done}:
    done |= ready
  assert names - done == set()


def functions(path: pathlib.Path):
  tree = ast.parse(path.read_text())
  return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_fit_in_the_head(folder):
  most = 700 if folder == "tests" else 500
  lengths = {str(p): len(p.read_text().splitlines()) for p in sources(folder)}
  # It has to be one file; sparse_export_test.py counts its code.
  lengths = {p: n for p, n in lengths.items() if not p.endswith("/modeling_sparsek.py")}
  assert {p: n for p, n in lengths.items() if n > most} == {}


def lines_of_code(node: ast.FunctionDef) -> int:
  """Counts the lines of a function from `def` on, without its docstring."""
  first = node.body[0]
  is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
  docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
  return node.end_lineno - node.lineno + 1 - docstring


def test_functions_fit_on_a_page():
  lengths = {(str(p), f.name): lines_of_code(f) for p in library() for f in functions(p)}
  assert {name: lines for name, lines in lengths.items() if lines > 80} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(folder):
  wrong = []
  for path in sources(folder):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
        words = (ast.get_docstring(node) or "").split()
        if words and words[0].strip(",:") in FIRST_WORDS:
          wrong.append(f"{path}:{getattr(node, 'name', '')}: {' '.join(words[:5])}")
  assert wrong == []


def test_functions_that_return_say_so():
  """A public function's docstring begins with a verb in the third person."""
  wrong = []
  for path in library():
    for node in functions(path):
      words = (ast.get_docstring(node) or "").split()
      is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
      if words and not is_property and not re.fullmatch(r"[A-Z][a-z-]+s[,:.]?", words[0]):
        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {' '.join(words[:6])}")
  assert wrong == []


def test_public_functions_have_hints():
  bare = []
  for path in library():
    tree = ast.parse(path.read_text())
    scopes = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for scope in scopes for node in scope):
      if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
        args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        if (
          any(a.annotation is None and a.arg not in ("self", "cls") for a in args)
          or not node.returns
        ):
          bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
  assert bare == []


def test_lambdas_are_not_nested():
  nested = []
  for path in sources(*FOLDERS):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Lambda):
        if any(isinstance(inner, ast.Lambda) for inner in ast.walk(node.body)):
          nested.append(f"{path.relative_to(ROOT)}:{node.lineno}")
  assert nested == []


@functools.cache
def words_of_code(text: str) -> set[str]:
  """Returns the names in a file's code, without those in its strings and comments."""
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return {token.string for token in tokens if token.type == tokenize.NAME}


def test_names_in_backticks_exist():
  """Looks for the second name of a dotted one in the module, folder or class before the dot."""
  texts = {path: path.read_text() for path in sources(*FOLDERS)}
  unknown = []
  for path, text in texts.items():
    for outer, inner in set(re.findall(r"`(?:\w+\.)*(\w+)\.(\w+)(?:\([^`]*\))?`", text)):
      homes = [other for other in texts if outer in (other.stem, other.parent.name)]
      if outer[0].isupper():
        homes = [other for other in texts if f"class {outer}" in texts[other]]
      stems = [name for home in homes for name in (home.stem, home.parent.name)]
      known = inner in stems or any(inner in words_of_code(texts[home]) for home in homes)
      if not known and (homes or outer[0].isupper()):
        unknown.append(f"{path.relative_to(ROOT)}: {outer}.{inner}")
  assert unknown == []


def test_prose_of_pages_is_wrapped():
  """Tables, code and the targets of links may be longer, and pages that are generated."""
  long = []
  for path in sorted({*(ROOT / "docs").rglob("*.md")} - GENERATED):
    is_code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
      is_code ^= line.lstrip().startswith("```")
      text = re.sub(r"\]\([^)]*\)", "]", line)
      if len(text) > 100 and not is_code and not line.startswith(("|", "    ")):
        long.append(f"{path.relative_to(ROOT)}:{number}: {len(text)} columns")
  assert long == []
