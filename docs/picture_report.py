"""Picture a report's top and its traces: ``python docs/picture_report.py runs/demo/report.html docs/report.png``.

Needs Chromium, and Pillow, which comes with matplotlib.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from chromium import chromium

WIDTH, TOP, TRACES = 1280, 960, 832  # pixels
COLORS = 256


def main(report: Path, target: Path) -> None:
    both = Image.new("RGB", (WIDTH, TOP + TRACES))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, chromium(folder) as page:
        page("Emulation.setDeviceMetricsOverride", width=WIDTH, height=TOP, deviceScaleFactor=1, mobile=False)
        page.open(report.resolve().as_uri())
        start = page.evaluate("document.querySelector('#traces h2').getBoundingClientRect().top") - 24
        for place, y, height in ((0, 0, TOP), (TOP, start, TRACES)):
            clip = {"x": 0, "y": y, "width": WIDTH, "height": height, "scale": 1}
            shot = page("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
            both.paste(Image.open(io.BytesIO(base64.b64decode(shot["data"]))), (0, place))
    both.quantize(COLORS, dither=Image.Dither.FLOYDSTEINBERG).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
