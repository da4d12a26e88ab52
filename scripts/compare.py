"""Set training runs, or folders of videos, side by side on one page.

  python scripts/compare.py runs/adaptive runs/dmd --out page.html
  python scripts/compare.py out/a out/b out/c --out page.html

Of each folder the page shows what scripts/evaluate.py measured there, the last values and the curves of a training,
and videos: those that were measured, else the latest samples of a training, else all. Videos of the same prompt and
seed stand side by side, or of the same file name. The page needs nothing else, unless its videos are larger than 12 MB
together: then it links to them.
"""

from avd_jax import command_line
from avd_jax.experiments.runs_page import write_comparison
from avd_jax.paths import local_path

OUT = command_line.disk_flag("out", None, "The page, an .html file.")


def main(folders: list[str]) -> None:
    """Write the page and say where it is."""
    page = command_line.page_named(OUT)
    write_comparison([local_path(folder) for folder in folders], page)
    print(page)


if __name__ == "__main__":
    command_line.run_with_arguments(main, required=(OUT,))
