"""Compiler options: what the compiler does not know is left out; where programs are kept."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from avd_jax.parallel.compiler import OPTIONS, compiler_options, convolution_options, keep_programs, options_of
from avd_jax.parallel.mesh import make_mesh


def test_an_option_that_the_compiler_does_not_know_is_left_out():
    wanted = {"cpu": {"xla_cpu_enable_fast_math": False, "xla_cpu_no_such_option": True}}
    options = compiler_options(make_mesh(), wanted)
    assert options == {"xla_cpu_enable_fast_math": False}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_no_such_option"):
        jax.jit(jnp.negative, compiler_options=wanted["cpu"])(1.0)
    assert jax.jit(jnp.negative, compiler_options=options)(1.0) == -1


def test_each_platform_has_its_own():
    assert compiler_options(make_mesh()) == {}
    assert {name.split("_")[1] for name in OPTIONS["gpu"]} == {"gpu"}


@pytest.mark.parametrize(("kind", "large"), [("TPU v4", False), ("TPU v5 lite", True), ("TPU v5", True), ("", False)])
def test_tpus_with_large_vector_memory_have_one_more(kind, large):
    """The compiler takes the option for every chip, and so does not tell that a v4 has not got so much."""
    wanted = {"tpu": {"one": 1}, "large_vmem": {"two": 2}}
    device = SimpleNamespace(platform="tpu" if kind else "cpu", device_kind=kind)
    expected = ({"one": 1} if kind else {}) | ({"two": 2} if large else {})
    assert options_of(device, wanted) == expected


def test_convolutions_are_compiled_quickly_if_the_search_takes_minutes():
    assert convolution_options() == {}, "these are CPUs"
    options = convolution_options("tpu")
    assert options
    assert jax.jit(jnp.negative, compiler_options=options)(1.0) == -1, "every compiler takes it"


@pytest.fixture
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_cache")
def test_programs_are_kept_in_the_folder_unless_another_is_named(tmp_path, monkeypatch):
    keep_programs(tmp_path)
    assert not jax.config.jax_compilation_cache_dir, "a CPU's are not"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    keep_programs(tmp_path / "first")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "first")
    keep_programs(tmp_path / "second")
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "first")


@pytest.mark.usefixtures("no_cache")
def test_programs_of_commands_without_a_workdir_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "avd_jax" / "programs")
