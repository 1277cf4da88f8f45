"""Flagfiles: precedence, messages, nested files, encodings."""

import pytest
from absl import flags as absl_flags

from sparsek.command_line import main
from sparsek.command_line.definer import Definer
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import UsageError


def parsed(*arguments):
  """Returns the flags, and the messages."""
  values, said = absl_flags.FlagValues(), []
  define_pretrain_flags(values)
  Definer(values).strings("stop", "Texts.")
  main.parse(["pretrain", *arguments], values, said.append)
  return values, said


def write(folder, **files):
  folder.mkdir(exist_ok=True)
  for name, text in files.items():
    (folder / f"{name}.flags").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
  "arguments, k, told",
  [
    (["--flagfile=a.flags"], 1, []),
    (["--flagfile", "a.flags"], 1, []),
    (["-flagfile=a.flags"], 1, []),
    (["--flagfile="], None, []),
    (["--flagfile=a.flags", "--flagfile=b.flags"], 2, []),  # the later file wins
    (["--flagfile=b.flags", "--flagfile=a.flags"], 1, []),
    (
      ["--k=9", "--flagfile=a.flags"],
      9,
      ["--k=1 in a.flags gives way to --k=9 of the command line"],
    ),
    (
      ["--flagfile=a.flags", "--k=9"],
      9,
      ["--k=1 in a.flags gives way to --k=9 of the command line"],
    ),
    (["--k", "9", "--flagfile", "a.flags", "--k=1"], 1, []),  # the same value
    (["--k=9", "--flagfile=a.flags", "--flagfile=b.flags"], 9, ["--k=2 in b.flags"]),
    (["--flagfile=outer.flags"], 1, []),
    (["--flagfile=comments.flags"], 3, []),
  ],
)
def test_the_command_line_wins_and_says_so(arguments, k, told, tmp_path, monkeypatch):
  write(
    tmp_path,
    a="--k=1\n",
    b="--k=2\n",
    outer="--k=5\n--flagfile=a.flags\n",
    comments="# x\n// y\n\n  # z\n --k=3 \r\n",
  )
  monkeypatch.chdir(tmp_path)
  values, said = parsed(*arguments)
  assert values["k"].value == k
  assert len(said) == len(told) and all(map(str.startswith, said, told)), said


def test_the_folder_of_the_command_line_is_the_one_that_runs(tmp_path):
  write(tmp_path, flags=f"--workdir={tmp_path}/run\n--scan_layers\n--stop=a\n--stop=b\n")
  arguments = [f"--workdir={tmp_path}/copy", "--noscan_layers", "--stop=c", "--stop=d"]
  for order in (1, -1):
    values, said = parsed(*[f"--flagfile={tmp_path}/flags.flags", *arguments][::order])
    assert values["workdir"].value == f"{tmp_path}/copy" and values["scan_layers"].value is False
    assert sorted(values["stop"].value) == ["c", "d"] and len(said) == 3, said
  assert parsed(f"--flagfile={tmp_path}/flags.flags")[0]["stop"].value == ["a", "b"]
  write(tmp_path, outer="--flagfile=flags.flags\n--stop=e\n")  # not all of both files
  assert parsed(f"--flagfile={tmp_path}/outer.flags")[0]["stop"].value == ["e"]


def test_nested_files_lie_beside_their_parent_or_where_we_are(tmp_path, monkeypatch):
  write(
    tmp_path / "deep",
    outer="--flagfile=inner.flags\n",
    inner="--k=1\n",
    other="--flagfile=here.flags\n",
    none="--flagfile=no.flags\n",
  )
  write(tmp_path, here="--k=2\n")
  monkeypatch.chdir(tmp_path)
  values, said = parsed("--flagfile=deep/outer.flags")
  assert values["k"].value == 1 and not said
  assert parsed("--flagfile=deep/other.flags")[0]["k"].value == 2
  with pytest.raises(
    UsageError,
    match="--flagfile=no.flags, which deep/none.flags names: there is "
    f"no file {tmp_path}/deep/no.flags nor {tmp_path}/no.flags",
  ):
    parsed("--flagfile=deep/none.flags")
  write(tmp_path, inner="--k=3\n")
  values, said = parsed("--flagfile=deep/outer.flags")
  assert values["k"].value == 1
  assert said == [
    f"--flagfile=inner.flags in deep/outer.flags is deep/inner.flags, not {tmp_path}/inner.flags"
  ]


@pytest.mark.parametrize(
  "content", ["--k=7 # no comment", "--k=7\n--undefok=b\n--b=3"], ids=["comment", "undefok"]
)
def test_the_rest_is_as_in_absl(content, tmp_path):
  write(tmp_path, a=content)
  if "undefok" in content:
    assert parsed(f"--flagfile={tmp_path}/a.flags", "--undefok=c", "--c=3")[0]["k"].value == 7
  else:
    with pytest.raises(UsageError, match="--k=7 # no comment: must be an integer"):
      parsed(f"--flagfile={tmp_path}/a.flags")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "mac"])
def test_encodings_that_are_read(encoding, tmp_path):
  text = "# größe\n--k=7\n--data=größe\n"
  content = {"utf-16-le-bom": "\ufeff" + text}.get(encoding, text).replace(
    "\n", "\r" if encoding == "mac" else "\n"
  )
  codec = {"utf-16-le-bom": "utf-16-le", "mac": "utf-8"}.get(encoding, encoding)
  write(tmp_path, a=content.encode(codec))
  values, _ = parsed(f"--flagfile={tmp_path}/a.flags")
  assert values["k"].value == 7 and values["data"].value.endswith("/größe")


@pytest.mark.parametrize(
  "content, words",
  [
    ("--k=7\n# größe".encode("latin-1"), "line 2: byte 0xf6 at offset 10 is no UTF-8 text"),
    (b"\xef\xbb\xbf--k=7\n# gr\xf6\xdfe", "line 2: byte 0xf6 at offset 13 is no UTF-8 text"),
    ("--k=7\n".encode("utf-16-le"), "line 1: byte 0x00 at offset 1"),
    (b"\xff\xfe-\x00\x00\xd8", "not UTF-16 at byte"),
    (b"#" * (2**20 + 1), "more than 1,048,576 bytes"),
  ],
)
def test_encodings_that_are_refused(content, words, tmp_path):
  write(tmp_path, a=content)
  with pytest.raises(UsageError, match=words) as error:
    parsed(f"--flagfile={tmp_path}/a.flags")
  assert str(error.value).replace(" ", "=").startswith(f"--flagfile={tmp_path}/a.flags")


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--flagfile", "--flagfile: the path of the file is missing"),
    ("--flagfile=gs://x/y", "gs: URLs are not supported"),
    ("--flagfile={}", "is a folder, expected a regular file"),
    ("--flagfile={}/nowhere", "there is no file"),
    ("--flagfile={}/tiny_stdlib", "and no recipe of that name"),
    ("--flagfile={}/a.flags", "includes itself: {0}/a.flags -> {0}/b.flags -> {0}/a.flags"),
    ("--flagfile={}/word.flags", "unexpected argument 'word'"),
    ("--flagfile={}/d0.flags", "more than 1000 flagfiles"),
  ],
)
def test_what_is_no_flagfile(argument, words, tmp_path):
  write(tmp_path, a="--flagfile=b.flags\n", b=f"--flagfile={tmp_path}/a.flags\n", word="word\n")
  write(tmp_path, **{f"d{i}": f"--flagfile=d{i + 1}.flags\n" * 2 for i in range(20)}, d20="--k=1")
  with pytest.raises(UsageError, match=words.format(tmp_path)):
    parsed(argument.format(tmp_path))


@pytest.mark.parametrize("name", ["tiny_stdlib", "experiments/recipes/tiny_stdlib.flags"])
def test_a_recipe_is_found_by_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  values, (said,) = parsed(f"--flagfile={name}")
  assert values.k == 64 and values.data == "stdlib"
  assert said.startswith(f"--flagfile={name} is the recipe ")
  write(tmp_path, tiny_stdlib="--k=5")
  assert parsed("--flagfile=tiny_stdlib.flags")[0].k == 5  # a file comes first


@pytest.mark.parametrize(
  "arguments, attention, pattern, told",
  [
    (["--flagfile=a.flags", "--attention=full"], "full", None, 1),
    (["--layer_pattern=full", "--flagfile=b.flags"], None, "full", 1),
    (["--flagfile=a.flags", "--flagfile=b.flags"], "linear", None, 0),
    (["--flagfile=b.flags", "--flagfile=a.flags"], None, "sparsek,full", 0),
    (["--attention=full", "--layer_pattern=full"], "full", "full", 0),  # refused elsewhere
  ],
)
def test_attention_and_layer_pattern_give_way_to_each_other(
  arguments, attention, pattern, told, tmp_path, monkeypatch
):
  write(tmp_path, a="--layer_pattern=sparsek,full\n", b="--attention=linear\n")
  monkeypatch.chdir(tmp_path)
  values, said = parsed(*arguments)
  assert (values.attention, values.layer_pattern, len(said)) == (attention, pattern, told)


@pytest.mark.parametrize("by_user", (True, False))
def test_only_the_user_is_told_what_gives_way(by_user, tmp_path, monkeypatch, capsys):
  write(tmp_path, a="--k=1\n")
  monkeypatch.setattr(main, "by_user", lambda: by_user)
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  main.parse(["pretrain", f"--flagfile={tmp_path}/a.flags", "--k=2"], values)
  assert bool(capsys.readouterr().err) == by_user
