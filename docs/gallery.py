"""Makes the pictures of the README from the sample run: docs/timeline.png, tokens.png, curves.png.

    python train.py config.yaml                        the sample run, if it is not there
    python docs/gallery.py [--run runs/sample]

The three pages of prospect/report/ are written to a temporary folder and photographed by Chromium, driven by selenium
(requirements-dev.txt).
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prospect.checkpoint import flatten
from prospect.config import load_config, to_dict
from prospect.errors import ProspectError, run_entry_point
from prospect.jobs import load_jobs
from prospect.load import load_for_inference
from prospect.report.curves import read_run, write_runs
from prospect.report.timeline import timeline, write_timelines
from prospect.report.tokens import write_settings
from prospect.show import setting
from prospect.stream import streamed_clips

SHORT_CONTEXT = "data.max_seq_len=420"  # so short that the context is refreshed while we watch
WIDTH, HEIGHT = 1280, 830


def timeline_page(run: Path, page: Path) -> None:
    """The longest validation clip, streamed."""
    config, tokenizer, model = load_for_inference(run / "best", [SHORT_CONTEXT])
    job = max(load_jobs(config.data.val, config, tokenizer), key=lambda job: job.num_frames)
    [(_, records)] = streamed_clips(model, tokenizer, [job], config, streams=1)
    write_timelines(page, [timeline(records, job.clip, flatten(to_dict(config)))])


def tokens_page(run: Path, page: Path) -> None:
    file = str(run / "config.yaml")
    settings = [
        setting(load_config(file), None, "train", "binary_at: frames, where inference decides"),
        setting(load_config(file, ["data.binary_at=text"]), None, "train", "binary_at: text, to compare"),
    ]
    write_settings(page, f"{settings[0].sequences[0].clip_id}, as it is trained on", settings)


def photograph(page: Path, picture: Path, *keys: str) -> None:
    """A picture of what a laptop's window shows of the page, after pressing the keys in its main part."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError as error:
        raise ProspectError("pictures of pages need selenium", remedy="pip install -r requirements-dev.txt") from error
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        what, remedy = "pictures of pages need chromium and chromedriver", "apt-get install chromium chromium-driver"
        raise ProspectError(what, remedy=remedy)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        flags += " disable-component-update disable-sync hide-scrollbars"
        for flag in [*flags.split(), f"user-data-dir={profile}"]:
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(service=Service(driver), options=options)
        try:
            size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
            browser.get(page.as_uri())
            if keys:
                browser.find_element("css selector", "#time, .sequence, #charts").send_keys(*keys)
            browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
            if not browser.save_screenshot(str(picture)):
                raise ProspectError("cannot be written", where=str(picture))
        finally:
            browser.quit()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/sample"), metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR")
    arguments = parser.parse_args()
    if not (arguments.run / "best").exists():
        raise ProspectError("holds no best checkpoint", where=str(arguments.run), remedy="python train.py config.yaml")
    with tempfile.TemporaryDirectory() as folder:
        pages = {name: Path(folder) / f"{name}.html" for name in ("timeline", "tokens", "curves")}
        timeline_page(arguments.run, pages["timeline"])
        tokens_page(arguments.run, pages["tokens"])
        write_runs(pages["curves"], [read_run(arguments.run)])
        photograph(pages["timeline"], arguments.out / "timeline.png", *"nnnnn")
        photograph(pages["tokens"], arguments.out / "tokens.png", *"nn")
        photograph(pages["curves"], arguments.out / "curves.png")
    print("written: " + ", ".join(str(path) for path in sorted(arguments.out.glob("*.png"))))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
