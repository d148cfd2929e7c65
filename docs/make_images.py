"""Make the pictures in ``docs/images`` from a finished demo: python docs/make_images.py DEMO_FOLDER.

Needs chromium, and Pillow, which fedvision brings. Nothing is fetched: the report stands alone.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
WIDTH = 1040
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
REPORT_TOP, REPORT_BOTTOM = 40, 1545  # from the heading to the figure of the results
GAP = 16


def screenshot(page: Path, target: Path) -> None:
    """Draw a report as a browser shows it, ``WIDTH`` pixels wide."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("make_images: chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={WIDTH},4000"]
        subprocess.run(  # noqa: S603, our own arguments
            [*command, f"--screenshot={target}", page.resolve().as_uri()], check=True, capture_output=True
        )


def save(picture: Image.Image, name: str) -> None:
    """Write a PNG into ``docs/images`` and say how large it is."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    picture.convert("RGB").save(path, optimize=True)
    sys.stdout.write(f"{path.name}: {path.stat().st_size // 1000} kB\n")


def main(demo: Path) -> None:
    """Write report.png and examples.png."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        screenshot(demo / "runs" / "demo-segmentation" / "report.html", shot)
        save(Image.open(shot).crop((0, REPORT_TOP, WIDTH, REPORT_BOTTOM)), "report.png")
    examples = [
        Image.open(demo / "runs" / f"demo-{kind}" / "sites" / "north" / "examples" / "median.png")
        for kind in ("segmentation", "detection")
    ]
    width, height = max(e.width for e in examples), sum(e.height for e in examples) + GAP
    together = Image.new("RGB", (width, height), "white")
    top = 0
    for example in examples:
        together.paste(example, (0, top))
        top += example.height + GAP
    together = together.resize((800, height * 800 // width))
    save(together.point(lambda value: value & 0xFC), "examples.png")  # noise of the images does not compress


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/make_images.py DEMO_FOLDER")
    main(Path(sys.argv[1]))
