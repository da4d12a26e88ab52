"""The layout's rules, read off the source: who may import whom, how long a file may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "avd_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

# What a room may import besides itself, in the words of CONTRIBUTING.md's table; all may import `errors` and `paths`.
ALLOWED = {
    "errors": set(),
    "bucket_requests": set(),
    "buckets": {"bucket_requests"},
    "paths": {"buckets", "bucket_requests"},
    "fields": set(),
    "shapes": set(),
    "models": {"shapes"},
    "diffusion": {"shapes"},
    "losses": {"shapes", "diffusion"},
    "convert": {"models", "parallel.rules", "data.tokenizer"},
    "parallel": {"shapes", "models.placement"},
    "capacity": {"shapes", "models", "parallel"},
    "data": {"models", "parallel"},
    "curation": {"fields", "models", "convert", "data"},
    "evaluation": {"shapes", "models", "data"},
    "generation": {"shapes", "models", "diffusion", "convert", "parallel", "data"},
    "training": {"fields", "models", "parallel", "capacity", "data"},
    "methods": {
        *("shapes", "fields", "models", "diffusion", "losses", "convert", "parallel", "capacity", "data"),
        *("evaluation", "generation", "training"),
    },
    "experiments": {"fields", "convert", "parallel", "data", "evaluation", "generation", "training", "methods"},
    "serving": {"convert", "parallel", "data", "evaluation", "generation", "experiments"},
    "command_line": {"fields", "models", "convert", "diffusion", "parallel", "generation", "training", "methods"},
}
FRAMEWORKS = {"torch", "tensorflow", "diffusers", "transformers"}


def relative(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Yield (dotted name, node) of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed(path, name):
    within = name.removeprefix("avd_jax").removeprefix(".")
    return any(
        within == part or within.startswith(f"{part}.")
        for part in {part_of(path), "errors", "paths", *ALLOWED[part_of(path)]}
    )


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE or p.name != "__init__.py"], ids=relative)
def test_imports_follow_the_layout(path):
    ours = [name for name, _ in imports(path) if name.split(".")[0] == "avd_jax"]
    assert [name for name in ours if not allowed(path, name)] == []


def test_the_rule_notices_an_import_against_the_layout():
    models, training = PACKAGE / "models" / "rope.py", PACKAGE / "training" / "loop.py"
    assert not allowed(training, "avd_jax.methods.avd")
    assert not allowed(training, "avd_jax.losses.temporal")
    assert not allowed(models, "avd_jax.training.loop")
    assert not allowed(models, "avd_jax.diffusion")
    assert not allowed(PACKAGE / "convert" / "engine.py", "avd_jax.data.latents.EncodedSet")
    assert not allowed(models, "avd_jax")
    assert allowed(models, "avd_jax.shapes.Latents")
    assert allowed(models, "avd_jax.models.attention.attention")
    assert allowed(training, "avd_jax.capacity.flops")


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=relative)
def test_no_other_framework(path):
    assert not {name.split(".")[0] for name, _ in imports(path)} & FRAMEWORKS


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=relative)
def test_length(path):
    lines = path.read_text().count("\n")
    assert lines < 400
    assert lines <= 100 or path not in SCRIPTS
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


def test_every_file_of_the_package_says_what_it_is():
    assert [path for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_no_room_imports_from_one_that_imports_from_it():
    above: dict[str, set[str]] = {}
    for room, others in ALLOWED.items():  # in an order in which each room comes behind those that it imports from
        rooms = {other for other in others if "." not in other}
        assert rooms <= set(above), room
        above[room] = rooms.union(*(above[other] for other in rooms))
    assert set(above) == {part_of(path) for path in SOURCES if path.name != "__init__.py" or path.parent != PACKAGE}


def test_contributing_says_the_same():
    rows = [line.split("|")[1:4] for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if "/` |" in line]
    written = {re.search(r"`(\w+)/`", name)[1]: set(re.findall(r"`([\w.]+)`", may)) for name, _, may in rows}
    assert written == {room: may for room, may in ALLOWED.items() if (PACKAGE / room).is_dir()}


def test_the_trainer_knows_no_method():
    names = {path.name for path in (PACKAGE / "methods").iterdir() if (path / "__init__.py").is_file()}
    words = re.compile(rf"\b({'|'.join({*names, 'fake_score', 'teacher', 'student'} - {'vae', 'interpolator'})})\b")
    found = {
        relative(path): words.findall(path.read_text())
        for path in SOURCES
        if part_of(path) in ("training", "capacity") and words.search(path.read_text())
    }
    assert found == {}


def test_fake_score_is_named_where_it_belongs():
    """The methods that have one, their losses, the pages about them, and the table of the checkpoints' keys."""
    named = {relative(path) for path in SOURCES if "fake_score" in path.read_text()}
    rooms = tuple(f"avd_jax/{room}/" for room in ("methods", "losses", "experiments"))
    assert {path for path in named if not path.startswith(rooms)} == {"avd_jax/convert/layouts.py"}
