"""The layout's rules, read off the source: who may import whom, how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "avd_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

# What a part may import besides itself; `errors` may be imported by all.
ALLOWED = {
    "errors": set(),
    "shapes": set(),
    "command_line": {"parallel", "training.fields"},
    "models": {"shapes"},
    "diffusion": {"shapes"},
    "losses": {"shapes", "diffusion"},
    "convert": {"models", "data.tokenizer"},
    "parallel": {"shapes"},
    "capacity": {"shapes", "models", "parallel"},
    "data": {"models", "parallel"},
    "evaluation": {"shapes", "data.shapes_world"},
    "generation": {"models", "diffusion", "convert", "data", "parallel"},
    "training": {
        *("shapes", "models", "diffusion", "losses", "convert", "parallel", "data", "evaluation", "generation"),
        "capacity",
    },
    "experiments": {"convert", "parallel", "data", "evaluation", "generation", "training"},
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
        within == part or within.startswith(f"{part}.") for part in {part_of(path), "errors", *ALLOWED[part_of(path)]}
    )


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE or p.name != "__init__.py"], ids=relative)
def test_imports_follow_the_layout(path):
    ours = [name for name, _ in imports(path) if name.split(".")[0] == "avd_jax"]
    assert [name for name in ours if not allowed(path, name)] == []


def test_the_rule_notices_an_import_against_the_layout():
    models, training = PACKAGE / "models" / "rope.py", PACKAGE / "training" / "loop.py"
    assert not allowed(models, "avd_jax.training.loop")
    assert not allowed(models, "avd_jax.diffusion")
    assert not allowed(PACKAGE / "convert" / "engine.py", "avd_jax.data.latents.EncodedSet")
    assert not allowed(models, "avd_jax")
    assert allowed(models, "avd_jax.shapes.Latents")
    assert allowed(models, "avd_jax.models.attention.attention")
    assert allowed(training, "avd_jax.convert")


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
