"""Writes the README's picture of the probability page from a file of records:

    python tests/make_pictures.py RECORDS.jsonl docs/images/probabilities.png [sSAMPLEtTOKEN]

The token at the end is the one that the panel shows; else it is the most surprising one. Needs
Chromium, its driver, selenium and Pillow. Without RECORDS ("-") the example of the tests is shown.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from example_records import sampled
from PIL import Image
from selenium import webdriver

from llm.inference.records import read_records
from llm.pages.view import page

SIZE = {"width": 1280, "height": 860, "deviceScaleFactor": 1.5, "mobile": False}


def main(source: str, target: str, token: str = "") -> None:
    records = sampled(110) if source == "-" else read_records(source)
    checkpoint = records[0]["checkpoint"]
    title = f"Samples from {checkpoint['run']}, step {checkpoint['step']:,}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        path.write_text(page(records, title=title), "utf-8")
        picture = photograph(f"{path.as_uri()}#{token}")
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(target, optimize=True)


def photograph(address: str) -> bytes:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
        driver.get(address)
        driver.execute_script("scrollTo(0, 0)")
        return driver.get_screenshot_as_png()
    finally:
        driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
