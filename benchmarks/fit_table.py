"""The table of docs/pods.md: does a whole run fit which devices. Compiled ahead of time; needs neither TPU nor GPU.

    python benchmarks/fit_table.py --cache runs/fit.jsonl --write docs/pods.md
    python benchmarks/fit_table.py --cache runs/fit.jsonl --rows h100:8

A program that is compiled, or does not fit, is a line of the cache and is not compiled again, unless the code, the
config or the compiler has changed. So the command can be stopped at any moment and given again. The table comes last,
and is written if no row is missing. It needs the compilers for TPUs and
GPUs, `pip install -e ".[cuda-compiler]" "jax[tpu]"`, and for all rows an hour or two on two CPU cores and 6 GB.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from absl import flags

from avd_jax import command_line, methods
from avd_jax.capacity.budget import Verdict
from avd_jax.capacity.compiling import Report, compile_program
from avd_jax.errors import UserError
from avd_jax.parallel.topology import topology_devices
from avd_jax.training.assembly import Assembly
from avd_jax.training.cost import whole_run

ROOT = Path(__file__).parents[1]
VIDEO = {"frames": 81, "height": 480, "width": 832}
PACKAGES = "jax", "jaxlib", "flax", "libtpu", "jax-cuda13-pjrt"


@dataclass(frozen=True)
class Row:
    """A run: a config, devices, and fields that differ."""

    config: str
    topology: str
    fields: dict = field(default_factory=dict)

    def __str__(self) -> str:
        changed = "".join(f", {name}={value}" for name, value in self.fields.items())
        return f"{self.config}{changed} | {self.topology}"


ROWS = (
    Row("wan13b", "v5e:4x4"),
    Row("wan13b", "v5e:2x4", {"batch_size": 8, "accumulation_steps": 2}),
    Row("wan13b", "h100:8", {"batch_size": 8}),
    Row("wan13b", "h100:1", {"batch_size": 1}),
    Row("wan14b", "v5e:8x8"),
    Row("wan14b", "v5p:2x2x4"),
    Row("wan14b_h100", "h100:8"),
    Row("wan14b", "h100:2x8"),
    Row("wan14b_h100", "h100:3x8", {"batch_size": 24, "mesh.data": 3}),
)
HEAD = (
    "| config | devices | mesh (data, fsdp, seq); batch | GiB a device | GiB a host | largest |",
    "| --- | --- | --- | --- | --- | --- |",
)
CACHE = command_line.path_flag("cache", "runs/fit.jsonl", "JSON lines, one a program")
ONLY = flags.DEFINE_list("rows", [], "only rows that contain one of these texts, such as wan14b or h100:8")
WRITE = command_line.path_flag("write", "", "a page whose table is replaced, with all rows")


def main() -> int:
    """Compile what is missing, and print the table."""
    if WRITE.value and ONLY.value:
        raise UserError("--write: takes all rows; leave out --rows")
    if WRITE.value and HEAD[0] not in Path(WRITE.value).read_text():
        raise UserError(f"--write {WRITE.value}: has no table that begins with {HEAD[0]}")
    rows = [row for row in ROWS if not ONLY.value or any(text in str(row) for text in ONLY.value)]
    if not rows:
        raise UserError(f"--rows {','.join(ONLY.value)}: there is no such row; there are " + "; ".join(map(str, ROWS)))
    Path(CACHE.value).parent.mkdir(parents=True, exist_ok=True)
    lines, failed = [], []
    for row in rows:
        # A compiler is told of its devices once a process, and one that crashes takes its process along.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                lines.append(table_line(row, pool.submit(verdict_of, row, Path(CACHE.value)).result()))
            except Exception as error:
                failed.append(f"{row}: {' '.join(str(error).split())[:300] or type(error).__name__}")
    table = "\n".join([*HEAD, *lines])
    print(table)
    if failed:
        raise UserError(f"{len(failed)} rows are missing; " + "; ".join(failed))
    if WRITE.value:
        page = Path(WRITE.value)
        before, _, after = page.read_text().partition(HEAD[0])
        rest = after.partition("\n\n")[2]
        page.write_text(f"{before}{table}\n\n{rest}")
    return 0


def table_line(row: Row, verdict: Verdict) -> str:
    """Return a row's line of the table."""
    mesh = ", ".join(map(str, verdict.mesh.values()))
    total, where = verdict.largest.total_gib, f"{verdict.largest.stage}: {verdict.largest.program}"
    fits = "" if verdict.fits else ", does not fit"
    return (
        f"| {row} | {mesh}; {verdict.batch_size} | {total:.1f} of {verdict.limit_gib:.1f}{fits} "
        f"| {verdict.host_gib:.0f} | {where} |"
    )


def verdict_of(row: Row, cache: Path) -> Verdict:
    """Return whether a row's run fits."""
    source = ROOT / "configs" / f"{row.config}.py"
    spec = importlib.util.spec_from_file_location(row.config, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(row.fields)
    recipe = methods.get(config.method)
    recipe.validate_values(config)
    assembly = Assembly(recipe.build(config, devices=topology_devices(row.topology), video=VIDEO))
    known = {line["key"]: line["report"] for line in read(cache)}
    code, reports = fingerprint(source), {}
    for name in assembly.run_programs():
        key = hashlib.sha256(f"{code} {row} {name}".encode()).hexdigest()[:16]
        if key not in known:
            print(f"{row} | {name}", file=sys.stderr, flush=True)
            about = {"mesh": assembly.mesh, "batch_size": assembly.rows.batch_size, "topology": row.topology}
            known[key] = compile_program(assembly.program(name), **about)[0].as_dict()
            with cache.open("a") as file:
                file.write(json.dumps({"row": str(row), "key": key, "report": known[key]}) + "\n")
        # A size that the compiler does not tell is null in JSON.
        report = known[key] | ({"total_gib": float("inf")} if known[key]["total_gib"] is None else {})
        reports[name] = Report(**report)
    return whole_run(assembly, reports, row.topology)


def read(cache: Path) -> Iterator[dict]:
    """Yield the lines of the cache; the last one may be cut off."""
    for line in cache.read_text().splitlines() if cache.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def fingerprint(config: Path) -> str:
    """Return what identifies the code, a config and the compilers."""
    digest = hashlib.sha256(config.read_bytes())
    for path in sorted((ROOT / "avd_jax").rglob("*.py")):
        digest.update(path.read_bytes())
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    command_line.run(main)
