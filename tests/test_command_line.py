"""What every script does with the paths on its command line and in its config."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags

from avd_jax import command_line, convert, methods
from avd_jax.errors import UserError
from avd_jax.experiments import cells
from avd_jax.fields import flags_parser, parse_flags

SCRIPTS = sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))
# The flags and fields of text that are no path.
TEXT_FLAGS = {"push", "beam_args", "topology", "prompt", "negative_prompt", "coordinator", "name", "shard", "sizes"}
TEXT_FLAGS |= {"rank"}  # a number, or "full"
TEXT_FLAGS |= {"compare", "host"}  # NAME=FOLDER, whose folder goes through local_path; and a name of a machine
TEXT_FIELDS = {"method", "model", "checkpoint.best_metric", "which"}
FIELDS = {f"{name}.{field}": row for name in methods.names() for field, row in methods.get(name).fields.items()} | {
    f"ablation.{field}": row for field, row in cells.FIELDS.items()
}


@pytest.fixture(scope="module")
def flag():
    return command_line.path_flag("a_path_of_a_test", None, "for this test")


def test_a_flag_for_a_path(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def parse(text):
        flags.FLAGS(["x", f"--a_path_of_a_test={text}"])
        return flag.value

    assert parse("runs/x/") == "runs/x"
    assert parse("~/x") == f"{tmp_path}/x"
    assert parse("file:///data/x") == "/data/x"
    assert parse("") == ""
    with pytest.raises(UserError, match="--a_path_of_a_test s3://bucket/x: s3:// is not supported, only local"):
        parse("s3://bucket/x")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_text_flag_of_a_script_is_a_path_or_known_to_be_none(script):
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    texts = {call.args[0].value for call in calls if getattr(call.func, "attr", "") == "DEFINE_string"}
    assert texts <= TEXT_FLAGS


@pytest.mark.parametrize("name", sorted(name for name, field in FIELDS.items() if isinstance(field.default, str)))
def test_every_text_field_of_a_config_is_a_path_or_known_to_be_none(name):
    field, short = FIELDS[name], name.partition(".")[2].removeprefix("train.")
    if field.default or short in TEXT_FIELDS:
        return
    assert "s3:// is not supported" in field.check("s3://bucket/x")
    assert field.check("") is field.check("~/x") is field.check("/data/x") is None


def test_a_config_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.py").write_text("")
    seen = []
    monkeypatch.setattr("avd_jax.fields.parse_flags", seen.append)
    parse = flags_parser(lambda path: seen.append(path) or {})
    for arguments in (["--config=~/config.py"], ["--config", "~/config.py"]):
        parse(["train.py", *arguments])
        assert seen.pop() == ["train.py", *(part.replace("~", str(tmp_path)) for part in arguments)]
        assert seen.pop() == f"{tmp_path}/config.py"
    with pytest.raises(UserError, match="--config gs://bucket/c: gs:// is not supported"):
        parse(["train.py", "--config", "gs://bucket/c"])


def test_a_config_is_named_once_and_before_its_fields(tmp_path):
    (config := tmp_path / "config.py").write_text("")
    parse = flags_parser(lambda path: {"num_steps": None})
    with pytest.raises(UserError, match=rf"--config is given twice: {config} and {config}"):
        parse(["train.py", "--config", str(config), f"--config={config}"])
    with pytest.raises(UserError, match=r"--config.num_steps comes before --config; give --config first"):
        parse(["train.py", "--config.num_steps=5", f"--config={config}"])


def test_after_ctrl_c_nothing_is_waited_for():
    code = """
import threading, time
from avd_jax.errors import report_user_errors
threading.Thread(target=time.sleep, args=(3600,)).start()

@report_user_errors
def main():
    raise KeyboardInterrupt

main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_what_absl_says_of_a_bad_flag_is_one_line():
    flags.DEFINE_integer("count_of_a_test", None, "a number", lower_bound=1)
    flags.DEFINE_string("text_of_a_test", None, "a text")
    for given, message in (
        (["--count_of_a_tets=1"], r"Unknown command line flag 'count_of_a_tets'.* did you mean.* count_of_a_test"),
        (["--count_of_a_test=x"], r"--count_of_a_test=x: .*; --help lists the flags"),
    ):
        with pytest.raises(UserError, match=rf"(?i)^[^\n]*{message}[^\n]*$"):
            parse_flags(["x", *given])
    flags.mark_flag_as_required("text_of_a_test")
    with pytest.raises(UserError, match=r"^--text_of_a_test is missing; --help lists the flags$"):
        parse_flags(["x"])
    del flags.FLAGS.text_of_a_test


@pytest.mark.parametrize(("given", "numbers"), [(None, []), (["1,2", "4"], [1, 2, 4]), (["3"], [3])])
def test_numbers_of_a_repeatable_flag(given, numbers):
    assert command_line.numbers_of(SimpleNamespace(name="steps", value=given)) == numbers


def test_numbers_that_are_none():
    with pytest.raises(UserError, match="--steps 1,a: give whole numbers, separated by commas"):
        command_line.numbers_of(SimpleNamespace(name="steps", value=["1,a"]))


@pytest.mark.parametrize(
    "load",
    [
        *(convert.load_dit, convert.load_vae, convert.load_umt5, convert.load_tokenizer, convert.load_interpolator),
        *(convert.dit_config, convert.find_components, convert.open_interpolator_of, convert.student_settings),
        convert.training_settings,
        lambda path: convert.check_writable(path, overwrite=False),
        lambda path: convert.export_dit("none", path, layout="native"),
    ],
)
def test_the_loaders_and_writers_refuse_a_scheme(load):
    with pytest.raises(UserError, match="s3:// is not supported, only local paths"):
        load("s3://bucket/Wan2.1-T2V-1.3B")


def test_weights_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tokenizer.json").symlink_to(Path(__file__).parent / "fixtures" / "tokenizer.json")
    assert convert.load_tokenizer("~").vocab_size == convert.load_tokenizer(tmp_path).vocab_size


def test_a_script_of_several_commands(monkeypatch):
    for name in ("command_a", "command_b", "command_c"):
        flags.DEFINE_string(name, None, f"what {name} is")
    seen = []
    commands = {
        "make": command_line.Command(lambda: seen.append("make") or 3, ("command_a",), ("command_b",)),
        "read": command_line.Command(lambda more: seen.append(more), ("command_c",), more=True),
    }

    def run(*arguments):
        for name in ("command_a", "command_b", "command_c"):
            flags.FLAGS[name].unparse()
        flags.FLAGS.set_gnu_getopt(True)
        monkeypatch.setenv("HOME", "/home/x")
        return command_line.run_command(commands, flags.FLAGS(["x", *arguments])[1:])

    try:
        assert run("make", "--command_a=1", "--command_b", "2") == 3
        assert run("read", "--command_c", "1", "more.txt", "~/y") is None
        assert seen == ["make", ["more.txt", "/home/x/y"]]
        for arguments, message in (
            ((), "give one of make, read, before the flags"),
            (("mke", "--command_a=1"), r"'mke': is no command \(did you mean 'make'\?\); give one of make, read"),
            (("make",), "--command_a is missing: what command_a is"),
            (("make", "--command_a=1", "--command_c=1"), "--command_c: does not go with make; leave it out"),
            (("make", "x", "--command_a=1"), "'x' is not a flag"),
            (("read", "--command_c=1", "s3://x"), "s3://x: s3:// is not supported"),
        ):
            with pytest.raises(UserError, match=message):
                run(*arguments)
    finally:
        flags.FLAGS.set_gnu_getopt(False)
    assert len(seen) == 2
